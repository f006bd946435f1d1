"""MaSSL on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_massl.py --workdir=runs/digits_massl

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "massl"
    m = config.massl
    m.memory, m.block = 1024, 128
    m.teacher_temperature = (0.015, 0.015)
    return config
