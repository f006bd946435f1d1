#!/usr/bin/env bash
# Pretrains on all NVIDIA GPUs of this machine, in one process; makes its own environment in .venv.
#
#   launch/gpu_local.sh --config=configs/X.py --workdir=DIR [--config.KEY=VALUE ...]
#
# Ctrl-C saves and ends; the same command again resumes. Paths are seen from the root of the
# checkout. What follows a -- goes to the training as it is. --dry-run prints the commands and
# starts nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh
parse gpu_local.sh "" "" "$@"
need config workdir
[[ -n "$dry" ]] || command -v nvidia-smi > /dev/null ||
  die "there is no nvidia-smi, hence no driver of an NVIDIA GPU on this machine" 1

call nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader
call use_environment ".[$(gpu_extras)]"
call exec python -m sop_jax.train --processes=1 "${train[@]}"
