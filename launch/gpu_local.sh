#!/usr/bin/env bash
# Pretrains on all NVIDIA GPUs of this machine, in one process, with its own environment in .venv.
#
#   launch/gpu_local.sh --config=NAME|FILE --workdir=DIR [--config.KEY=VALUE ...]
#
#   --config=NAME|FILE  the name of a recipe in configs/, or a file
#   --workdir=DIR       the folder of the run; running the same command again resumes it
#   --config.KEY=VALUE  changes a setting
#   --dry-run           prints the commands without starting anything
#
# For example: launch/gpu_local.sh --config=cifar10 --workdir=runs/a --config.data.path=DATA
#
# Ctrl-C saves and ends. Paths are relative to the root of the checkout. Arguments after -- are
# passed to the training unchanged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh
# shellcheck source=launch/flags.sh
source launch/flags.sh
parse gpu_local.sh "" "" "$@"
need config workdir
check_config
[[ -n "$dry" ]] || command -v nvidia-smi > /dev/null ||
  die "there is no nvidia-smi, so no NVIDIA driver on this machine; install the driver" 1

call nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader
call use_environment ".[$(gpu_extras)]"
call use_gpu_flags
call exec python -m sop_jax.train --processes=1 "${train[@]}"
