#!/usr/bin/env bash
# Runs every check of the project: style, types, shell scripts and tests, in about half an hour on 2
# CPU cores after the install. Its environment is .venv-test: the compiler of TPUs, which it needs,
# makes every command complain on a machine without TPUs.
#
#   bash launch/test.sh [ARGUMENT ...]
#
# Arguments go to pytest. For example: bash launch/test.sh -k checkpoint
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
if [[ " $* " =~ \ (-h|--help)\  ]]; then
  show_help test.sh
  exit
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh
use_environment '.[test]' .venv-test

ruff check .
ruff format --check .
mypy
shellcheck launch/*.sh benchmarks/*.sh .ci/run
python -m pytest -n 2 --dist=loadgroup "$@"
