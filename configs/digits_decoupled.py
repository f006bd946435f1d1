"""Decoupled prototypes on scikit-learn's digits, otherwise as configs/digits.py.

    python -m sop_jax.train --config=configs/digits_decoupled.py --workdir=runs/digits_decoupled

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "decoupled"
    d = config.decoupled
    d.loss, d.prior, d.prototypes = "dino", "none", 512
    d.student_temperature, d.teacher_temperature = 0.1, (0.015, 0.015)
    return config
