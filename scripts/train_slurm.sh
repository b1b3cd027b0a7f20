#!/usr/bin/env bash
# A Slurm job that trains on all GPUs of its nodes. Arguments go to `segtrain train`. Submit it from
# the repository root; sbatch options come before the script and override those below.
#   sbatch scripts/train_slurm.sh --config configs/tiramisu_coco.yaml --data /data/coco --name week
#   SEGTRAIN_CHAIN=6 sbatch --nodes=2 --gpus-per-node=4 scripts/train_slurm.sh --data /data/coco
# Slurm requeues a job that was preempted or whose node failed, and the job continues. A job that
# reaches its time limit saves its state and ends; with SEGTRAIN_CHAIN=n it is requeued too, if it
# has been restarted fewer than n times for any reason.
#SBATCH --job-name=segtrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=segtrain-%j.log
# Sent to the processes of srun, not to this script.
#SBATCH --signal=TERM@120
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo 'error: this is not a Slurm job; submit it: sbatch scripts/train_slurm.sh ...' >&2
  exit 2
fi
chain=${SEGTRAIN_CHAIN:-0}
restarts=${SLURM_RESTART_COUNT:-0}
if ! [[ $chain =~ ^[0-9]{1,4}$ ]]; then
  echo "error: SEGTRAIN_CHAIN=$chain is not a number of restarts; set e.g. SEGTRAIN_CHAIN=6" >&2
  exit 2
fi

# A job keeps its ID when it is requeued, so this name identifies its own run.
resume=(--resume auto)
name=(--name "slurm-$SLURM_JOB_ID")
for argument in "$@"; do
  case $argument in
    --resume | --resume=*) resume=() name=() ;;
    --name | --name=*) name=() ;;
  esac
done

# Slurm runs a copy of this script, so its own path does not lead to the repository.
if [ -x "${SLURM_SUBMIT_DIR:-.}/.venv/bin/segtrain" ]; then
  PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH
fi

nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-1}} # per node
if ! [[ $gpus =~ ^[1-9][0-9]{0,2}$ ]]; then
  echo "error: GPUS=$gpus is not a number of GPUs per node; request e.g. --gpus-per-node=4" >&2
  exit 2
fi
launch=(segtrain-launch --nnodes "$nodes" --nproc-per-node "$gpus")
if [ "$nodes" -gt 1 ]; then
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Two jobs may share a host: the job ID gives them different ports.
  launch+=(--rdzv-backend c10d --rdzv-id "segtrain-$SLURM_JOB_ID-$restarts"
    --rdzv-endpoint "${hosts%%$'\n'*}:$((10000 + SLURM_JOB_ID % 20000))")
else
  launch+=(--standalone)
fi

step=(srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60)
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it since Slurm 22.05
  if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$((SLURM_CPUS_PER_TASK / gpus))
    export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
  fi
fi

# Without exec: when Slurm ends a job, it sends SIGTERM to torchrun on every node and to the batch
# script. A shell can ignore it. srun in its place would kill torchrun immediately, before it saves
# its state. https://github.com/SchedMD/slurm: _srun_signal_mgr in src/srun, and _rpc_terminate_job
# in src/slurmd/slurmd/req.c.
ended_by_slurm=
trap 'ended_by_slurm=1' TERM
status=0
"${step[@]}" "${launch[@]}" -m segtrain train "${resume[@]}" "${name[@]}" "$@" || status=$?

# The warning before a time limit goes to torchrun only. So a SIGTERM here means that the job was
# cancelled, or that Slurm has already requeued it.
if [ "$status" -eq 0 ] || [ -n "$ended_by_slurm" ]; then
  exit "$status"
fi
job=$(SLURM_TIME_FORMAT=standard scontrol show job "$SLURM_JOB_ID") || exit "$status"
time_of() {
  if [[ $job =~ $1=([0-9][^[:space:]]*) ]]; then echo "${BASH_REMATCH[1]}"; fi
}
start=$(time_of StartTime)
end=$(time_of EndTime)
preempted=$(time_of PreemptTime)
# Slurm requeues jobs that it has to kill, but not jobs that end within the grace period.
# PreemptTime may be left from an earlier preemption.
if [[ -n $preempted && ! $preempted < $start ]]; then
  echo 'preempted: requeued'
  exec scontrol requeue "$SLURM_JOB_ID"
fi
# Slurm may warn up to a minute before the 120 s. An error long before the time limit would recur.
if [ "$restarts" -lt "$chain" ] && [ -n "$end" ] &&
  [ $(($(date -d "$end" +%s) - $(date +%s))) -le 240 ]; then
  echo "time limit: requeued, restart $((restarts + 1)) of at most $chain"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
