#!/usr/bin/env bash
# A Slurm job that trains on all GPUs of its nodes; arguments go to `segtrain train`. Submit it from
# the folder of the checkout; options of sbatch come before the script and win over those below.
#   sbatch scripts/train_slurm.sh --config configs/tiramisu_coco.yaml --data /data/coco --name week
#   SEGTRAIN_CHAIN=6 sbatch --nodes=2 --gpus-per-node=4 scripts/train_slurm.sh --data /data/coco
# A job that was pre-empted, or whose node failed, is queued again by Slurm and goes on. One that
# reaches its time limit ends with its state saved; with SEGTRAIN_CHAIN=n it is queued again too,
# as long as it has been started again fewer than n times, for whatever reason.
#SBATCH --job-name=segtrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=segtrain-%j.log
# To the processes of srun, not to this script.
#SBATCH --signal=TERM@120
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo 'error: this is no Slurm job; submit it: sbatch scripts/train_slurm.sh ...' >&2
  exit 2
fi
chain=${SEGTRAIN_CHAIN:-0}
restarts=${SLURM_RESTART_COUNT:-0}
if ! [[ $chain =~ ^[0-9]{1,4}$ ]]; then
  echo "error: SEGTRAIN_CHAIN=$chain is no number of restarts" >&2
  exit 2
fi

# A job keeps its number when it is queued again, so it finds its own run and no other job's.
resume=(--resume auto)
name=(--name "slurm-$SLURM_JOB_ID")
for argument in "$@"; do
  case $argument in
    --resume | --resume=*) resume=() name=() ;;
    --name | --name=*) name=() ;;
  esac
done

# Slurm runs a copy of this script from elsewhere, so its own place says nothing.
if [ -x "${SLURM_SUBMIT_DIR:-.}/.venv/bin/segtrain" ]; then
  PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH
fi

nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-1}} # of each node
if ! [[ $gpus =~ ^[1-9][0-9]{0,2}$ ]]; then
  echo "error: GPUS=$gpus is no number of GPUs of a node; ask for some: --gpus-per-node=4" >&2
  exit 2
fi
launch=(segtrain-launch --nnodes "$nodes" --nproc-per-node "$gpus")
if [ "$nodes" -gt 1 ]; then
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Two jobs may share a host: the number of the job keeps their ports apart.
  launch+=(--rdzv-backend c10d --rdzv-id "segtrain-$SLURM_JOB_ID-$restarts"
    --rdzv-endpoint "${hosts%%$'\n'*}:$((10000 + SLURM_JOB_ID % 20000))")
else
  launch+=(--standalone)
fi

step=(srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60)
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # since Slurm 22.05 srun no longer inherits it
  if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$((SLURM_CPUS_PER_TASK / gpus))
    export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
  fi
fi

# No exec here. When Slurm ends a job it sends SIGTERM to torchrun on every node and to the batch
# script. A shell can outlive it; srun in its place would answer by killing torchrun at once, before
# anything is saved. https://github.com/SchedMD/slurm: _srun_signal_mgr of src/srun, and
# _rpc_terminate_job of src/slurmd/slurmd/req.c.
ended_by_slurm=
trap 'ended_by_slurm=1' TERM
status=0
"${step[@]}" "${launch[@]}" -m segtrain train "${resume[@]}" "${name[@]}" "$@" || status=$?

# A warning ahead of an end goes to torchrun alone. So a SIGTERM here means that somebody cancelled
# the job, or that Slurm has queued it again already.
if [ "$status" -eq 0 ] || [ -n "$ended_by_slurm" ]; then
  exit "$status"
fi
shown=$(SLURM_TIME_FORMAT=standard scontrol show job "$SLURM_JOB_ID") || exit "$status"
time_of() {
  if [[ $shown =~ $1=([0-9][^[:space:]]*) ]]; then echo "${BASH_REMATCH[1]}"; fi
}
start=$(time_of StartTime)
end=$(time_of EndTime)
preempted=$(time_of PreemptTime)
# Slurm queues again what it has to end itself, not what saves and ends within its time of grace.
# The time of an earlier pre-emption may still stand there.
if [[ -n $preempted && ! $preempted < $start ]]; then
  echo 'pre-empted: queued again'
  exec scontrol requeue "$SLURM_JOB_ID"
fi
# Slurm warns up to a minute before the 120 s; an error long before the end would only come again.
if [ "$restarts" -lt "$chain" ] && [ -n "$end" ] &&
  [ $(($(date -d "$end" +%s) - $(date +%s))) -le 240 ]; then
  echo "time limit: queued again, restart $((restarts + 1)) of at most $chain"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
