"""Decoupled prototypes on scikit-learn's digits, otherwise as configs/digits.py.

    python -m sop_jax.train --config=configs/digits_decoupled.py --workdir=runs/digits_decoupled

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "decoupled"
    config.head.unit, config.head.batch_norm = False, True
    config.decoupled.prototypes, config.decoupled.block = 512, 64
    return config
