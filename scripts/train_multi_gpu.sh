#!/usr/bin/env bash
# Trains on all GPUs of this machine with one process each; arguments go to `segtrain train`. Run
# the same command again to continue after an interruption. GPUS=2 uses only two GPUs.
#   scripts/train_multi_gpu.sh --config configs/tiramisu_coco.yaml --data /data/coco --name week
set -euo pipefail

count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    # CUDA ignores everything after the first -1.
    local device devices count=0
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    for device in "${devices[@]}"; do
      case $device in -1 | NoDevFiles) break ;; esac
      count=$((count + 1))
    done
    echo "$count"
  else
    # One line per GPU; the MIG partitions of a GPU follow in indented lines.
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  fi
}

gpus=${GPUS:-$(count_gpus)}
if ! [[ $gpus =~ ^[0-9]{1,3}$ ]]; then
  echo "error: GPUS=$gpus is not a number of GPUs; set e.g. GPUS=2, or unset it to use all" >&2
  exit 2
fi

# An explicit --resume takes precedence; otherwise continue an existing run or start a new one.
resume=(--resume auto)
for argument in "$@"; do
  case $argument in --resume | --resume=*) resume=() ;; esac
done

venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv
if [ -x "$venv/bin/segtrain" ]; then
  PATH=$venv/bin:$PATH
fi

if [ "$gpus" -le 1 ]; then
  exec segtrain train "${resume[@]}" "$@"
fi
# Otherwise every process would start one thread per core of the machine.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  threads=$(($(nproc) / gpus))
  export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
fi
exec segtrain-launch --standalone --nproc-per-node "$gpus" -m segtrain train "${resume[@]}" "$@"
