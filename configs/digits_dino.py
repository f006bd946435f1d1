"""DINO on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_dino.py --workdir=runs/digits_dino

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "dino"
    config.dino.prototypes = 512
    config.dino.freeze_epochs = 0.0
    config.dino.teacher_temperature = (0.015, 0.015)
    return config
