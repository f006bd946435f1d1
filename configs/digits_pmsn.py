"""PMSN on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_pmsn.py --workdir=runs/digits_pmsn

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "pmsn"
    config.pmsn.prototypes = 128
    config.pmsn.teacher_temperature = (0.0125, 0.0125)
    config.pmsn.prior_weight = 1.0
    return config
