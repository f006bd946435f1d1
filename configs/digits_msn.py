"""MSN on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_msn.py --workdir=runs/digits_msn

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "msn"
    config.msn.prototypes = 128
    config.msn.teacher_temperature = (0.0125, 0.0125)
    return config
