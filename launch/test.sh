#!/usr/bin/env bash
# Runs the checks of the project: style, types, shell scripts and tests. Its environment is
# .venv-test: the compiler of TPUs, which it needs, makes every command complain on a machine
# without TPUs.
#
#   bash launch/test.sh [--fast | --all] [ARGUMENT ...]
#
#   --fast  leaves out the tests that are marked medium or slow: under 4 minutes on 2 CPU cores,
#           for every edit
#   (none)  leaves out those marked slow: under 25 minutes
#   --all   runs all tests, as continuous integration does: under 70 minutes
#
# Arguments go to pytest. For example: bash launch/test.sh --all -k checkpoint
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
if [[ " $* " =~ \ (-h|--help)\  ]]; then
  show_help test.sh
  exit
fi
tests="not slow"
case "${1:-}" in
  --fast) tests="not medium and not slow" && shift ;;
  --all) tests="" && shift ;;
esac
# shellcheck source=launch/environment.sh
source launch/environment.sh
use_environment '.[test]' .venv-test

ruff check .
ruff format --check .
mypy
shellcheck launch/*.sh benchmarks/*.sh .ci/run
python -m pytest -n 2 --dist=loadgroup -m "$tests" "$@"
