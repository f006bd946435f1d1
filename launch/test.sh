#!/usr/bin/env bash
# Runs every check of the project in .venv: style, types, shell scripts and tests, under 20 minutes
# on 2 CPU cores after the install. Arguments go to pytest: -k checkpoint, for one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/environment.sh
source launch/environment.sh
use_environment '.[test]'

ruff check .
ruff format --check .
mypy
shellcheck launch/*.sh benchmarks/*.sh .ci/run
python -m pytest -n 2 --dist=loadgroup "$@"
