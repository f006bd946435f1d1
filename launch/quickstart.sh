#!/usr/bin/env bash
# Sets everything up in .venv and pretrains a small ViT on scikit-learn's digits: under 5 minutes
# on 2 CPU cores after the install. Arguments go to the training: --config.epochs=10, for one.
# Run again, it resumes an interrupted run and leaves a finished one as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/environment.sh
source launch/environment.sh
use_environment .

python -m sop_jax.train --config=configs/digits.py --workdir=runs/digits "$@"

cat <<'END'

The curves of this run are in runs/digits. To look at them:
  .venv/bin/pip install tensorboard
  .venv/bin/tensorboard --logdir runs/digits

Next, CIFAR-10 from a packed .npz file of yours:
  .venv/bin/python -m sop_jax.train --config=configs/cifar10.py --workdir=runs/cifar10 \
    --config.data.path=cifar10.npz
END
