#!/usr/bin/env bash
# Pretrains on all NVIDIA GPUs of this machine, in one process; makes its own environment in .venv.
#
#   launch/gpu_local.sh --config=NAME|FILE --workdir=DIR [--config.KEY=VALUE ...]
#
#   --config=NAME|FILE  a recipe of configs/ by its name, or a file
#   --workdir=DIR       where the run is kept; the same command again resumes it
#   --config.KEY=VALUE  changes a setting
#   --dry-run           prints the commands and starts nothing
#
# For example: launch/gpu_local.sh --config=cifar10 --workdir=runs/a --config.data.path=DATA
#
# Ctrl-C saves and ends. Relative paths start at the root of the checkout. What follows a -- goes to
# the training as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh
parse gpu_local.sh "" "" "$@"
need config workdir
check_config
[[ -n "$dry" ]] || command -v nvidia-smi > /dev/null ||
  die "there is no nvidia-smi, hence no driver of an NVIDIA GPU on this machine" 1

call nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader
call use_environment ".[$(gpu_extras)]"
call exec python -m sop_jax.train --processes=1 "${train[@]}"
