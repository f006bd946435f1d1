#!/usr/bin/env bash
# Runs the checks of the project: style, types, shell scripts and tests. They have an environment of
# their own, .venv-test, because the tests need the compiler for TPUs, which makes every command
# print errors on a machine without TPUs.
#
#   bash launch/test.sh [--fast | --all] [ARGUMENT ...]
#
#   --fast  runs the tests that are not marked medium or slow, for use after every edit: under 4
#           minutes on 2 CPU cores
#   (none)  runs the tests that are not marked slow: under 25 minutes
#   --all   runs all tests, as continuous integration does: under 70 minutes
#
# Arguments are passed to pytest. For example: bash launch/test.sh --all -k checkpoint
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
shellcheck launch/*.sh benchmarks/*.sh .ci/install .ci/run .ci/release
python -m pytest -n 2 --dist=loadgroup --no-loadscope-reorder -m "$tests" "$@"
