#!/usr/bin/env bash
# From installation to a cutout: installs into .venv, draws people, trains, evaluates and predicts.
# All output is in quickstart/. Run it again to continue.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

out=quickstart
run=$out/runs/people
segtrain() {
  printf '\n$ segtrain %s\n' "$*"
  .venv/bin/segtrain "$@"
}

[ -d $out/people ] || segtrain demo $out/people --train-images 384 --val-images 48
segtrain train --data $out/people --config configs/quickstart.yaml \
  --output $out/runs --name people --resume auto
segtrain eval --checkpoint $run
segtrain predict "$out/people/val2017/*1.jpg" --checkpoint $run --background blur --panel \
  --output $out/predictions --overwrite

cat <<END

Done. Look at
  $run/curves.png              loss and IoU over the epochs
  $run/samples/                image | ground truth | prediction, one sheet per epoch
  $run/metrics.jsonl           the metrics, one line per epoch
  $out/predictions/            masks, cutouts, new backgrounds, panels
Next: your own photo
  .venv/bin/segtrain predict photo.jpg --checkpoint $run --background '#00b140' --panel
END
