#!/usr/bin/env bash
# Installs everything in .venv and pretrains a small ViT on scikit-learn's digits, which takes less
# than 5 minutes on 2 CPU cores after the installation.
#
#   bash launch/quickstart.sh [--config.KEY=VALUE ...]
#
# Arguments are passed to the training. For example: bash launch/quickstart.sh --config.steps=300
# Running it again resumes an interrupted run and leaves a finished one unchanged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
if [[ " $* " =~ \ (-h|--help)\  ]]; then
  show_help quickstart.sh
  exit
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh
use_environment ".[plot]"

python -m sop_jax.train --config=configs/digits.py --workdir=runs/digits "$@"

cat <<'END'

The report of this run is runs/digits/report.html: open it in a browser. This adds pictures to it:
  .venv/bin/python -m sop_jax.report --workdir=runs/digits

The curves are in runs/digits too:
  .venv/bin/pip install tensorboard
  .venv/bin/tensorboard --logdir runs/digits

Next, train on a folder of your own images, with or without sub-folders (much faster on a GPU):
  .venv/bin/python -m sop_jax.train --images=FOLDER --workdir=runs/mine
END
