#!/usr/bin/env bash
# Pretrains on the GPUs of a SLURM cluster, with one task per GPU. Submit it from the root of a
# checkout on a file system that all nodes share:
#
#   sbatch --nodes=4 launch/gpu_slurm.sh --config=NAME|FILE --workdir=DIR \
#       [--config.KEY=VALUE ...]
#   bash launch/gpu_slurm.sh --dry-run ...   prints the commands without starting anything
#
#   --config=NAME|FILE  the name of a recipe in configs/, or a file
#   --workdir=DIR       the folder of the run, on a file system that all nodes share
#   --config.KEY=VALUE  changes a setting
#
# In a job array (sbatch --array=0-2) the runs need workdirs of their own: %a in an argument becomes
# the index of the run, as in --workdir=runs/%a --config.seed=%a.
#
# Before its time limit the job saves, returns to the queue and resumes. Give other sbatch options
# (--partition, --account, --mem, other numbers than those below) before the script; the numbers of
# tasks and GPUs per node must be equal. Arguments after -- are passed to the training unchanged.
#SBATCH --job-name=sop_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Without B: the signal goes to every process of the tasks, not to this shell. It is SIGINT, which
# the input workers of the training ignore, two to three minutes before the time limit.
#SBATCH --signal=INT@120
set -euo pipefail

# SLURM runs a copy of this file, in the folder from which it was submitted.
if [[ " $* " =~ \ (-h|--help)\  ]]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
fi
if [[ ! -f launch/arguments.sh ]]; then
  echo "error: submit this from the root of the checkout, not from $PWD" >&2
  exit 2
fi
# shellcheck source=launch/arguments.sh
source launch/arguments.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh
# shellcheck source=launch/flags.sh
source launch/flags.sh
parse gpu_slurm.sh "" "" "$@"
need config workdir
check_config
[[ -n "$dry" || -n "${SLURM_JOB_ID:-}" ]] ||
  die "this is not a SLURM job; submit it with sbatch, or add --dry-run"

if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
  [[ "$workdir" == *%a* ]] ||
    die "the runs of a job array would share --workdir=$workdir; write %a for the index into it"
  train=("${train[@]//%a/$SLURM_ARRAY_TASK_ID}")
fi

tasks="${SLURM_NTASKS_PER_NODE:-}" gpus="${SLURM_GPUS_ON_NODE:-}"
[[ -z "$tasks" || -z "$gpus" || "$tasks" == "$gpus" ]] ||
  die "$tasks tasks and $gpus GPUs per node: --ntasks-per-node and --gpus-per-node must be equal"

call use_environment ".[$(gpu_extras)]" # once, for all tasks
call use_gpu_flags

# JAX assigns the GPUs of a node to its tasks by number, so every task must see all GPUs. If a task
# is lost, JAX ends the others by itself. srun does not inherit --cpus-per-task from sbatch.
status=0
call srun --gpu-bind=none --kill-on-bad-exit=0 --wait=300 \
  --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  .venv/bin/python -m sop_jax.train --wait=600 "${train[@]}" || status=$?

# 130: saved after a signal. This script has no trap, so scancel ends this shell before it can
# requeue the job.
if [[ -n "$dry" ]]; then
  echo "if that ends with 130: scontrol requeue JOB"
elif ((status == 130)); then
  scontrol requeue "$SLURM_JOB_ID" || echo "the job was not requeued; submit it again to resume" >&2
fi
exit "$status"
