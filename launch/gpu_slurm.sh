#!/usr/bin/env bash
# Pretrains on the GPUs of a SLURM cluster, one task a GPU. Submitted from the root of a checkout
# that every node sees:
#
#   sbatch --nodes=4 launch/gpu_slurm.sh --config=NAME|FILE --workdir=DIR \
#       [--config.KEY=VALUE ...]
#   bash launch/gpu_slurm.sh --dry-run ...   prints the commands and starts nothing
#
#   --config=NAME|FILE  a recipe of configs/ by its name, or a file
#   --workdir=DIR       where the run is kept, on a disk that all nodes share
#   --config.KEY=VALUE  changes a setting
#
# Before its time limit the job saves, goes back to the queue and resumes. What a cluster or a node
# wants otherwise (--partition, --account, --mem, other numbers than those below) goes before the
# script; tasks and GPUs of a node must be as many. What follows a -- goes to the training as it is.
#SBATCH --job-name=sop_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Without B: the signal is for the tasks, not for this shell, and reaches every process of a task:
# SIGINT, which the training's worker processes leave to it, two to three minutes before the end.
#SBATCH --signal=INT@120
set -euo pipefail

# SLURM runs a copy of this file, in the folder where it was submitted.
if [[ " $* " =~ \ (-h|--help)\  ]]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
fi
if [[ ! -f launch/arguments.sh ]]; then
  echo "error: start this from the root of the checkout, not from $PWD" >&2
  exit 2
fi
# shellcheck source=launch/arguments.sh
source launch/arguments.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh
parse gpu_slurm.sh "" "" "$@"
need config workdir
check_config
[[ -n "$dry" || -n "${SLURM_JOB_ID:-}" ]] ||
  die "this is no SLURM job: start it with sbatch, or add --dry-run"

tasks="${SLURM_NTASKS_PER_NODE:-}" gpus="${SLURM_GPUS_ON_NODE:-}"
[[ -z "$tasks" || -z "$gpus" || "$tasks" == "$gpus" ]] ||
  die "$tasks tasks and $gpus GPUs a node: give --ntasks-per-node and --gpus-per-node one number"

call use_environment ".[$(gpu_extras)]" # once, for all tasks

# JAX gives each task the GPU of its number on the node, so every task must see all of them. It ends
# the others by itself when one is lost. srun does not take --cpus-per-task from sbatch.
status=0
call srun --gpu-bind=none --kill-on-bad-exit=0 --wait=300 \
  --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  .venv/bin/python -m sop_jax.train --wait=600 "${train[@]}" || status=$?

# 130: saved after a signal. There is no trap above, so that scancel ends this shell before it could
# put the job back.
if [[ -n "$dry" ]]; then
  echo "when that ends with 130: scontrol requeue JOB"
elif ((status == 130)); then
  scontrol requeue "$SLURM_JOB_ID" || echo "not put back; submit it again to resume" >&2
fi
exit "$status"
