#!/usr/bin/env bash
# Trains on all GPUs of this machine, a process for each; arguments go to `segtrain train`. Given
# again after a stop, the same command goes on where it was. GPUS=2 takes only two of them.
#   scripts/train_multi_gpu.sh --config configs/tiramisu_coco.yaml --data /data/coco --name week
set -euo pipefail

count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    # CUDA itself looks no further than the first -1.
    local device devices count=0
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    for device in "${devices[@]}"; do
      case $device in -1 | NoDevFiles) break ;; esac
      count=$((count + 1))
    done
    echo "$count"
  else
    # A GPU is a line; the parts that one is cut into follow it, indented.
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  fi
}

gpus=${GPUS:-$(count_gpus)}
if ! [[ $gpus =~ ^[0-9]{1,3}$ ]]; then
  echo "error: GPUS=$gpus is no number of GPUs; say e.g. GPUS=2, or nothing for all" >&2
  exit 2
fi

# The user's own --resume wins; else a stopped run goes on and a new one begins.
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
# Without it every process would start a thread for each core of the machine.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  threads=$(($(nproc) / gpus))
  export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
fi
exec segtrain-launch --standalone --nproc-per-node "$gpus" -m segtrain train "${resume[@]}" "$@"
