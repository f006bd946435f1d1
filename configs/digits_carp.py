"""CARP on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_carp.py --workdir=runs/digits_carp

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "carp"
    config.head.unit, config.head.batch_norm = False, True
    config.carp.prototypes, config.carp.block = 512, 64
    return config
