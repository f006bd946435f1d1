"""CAPI on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_capi.py --workdir=runs/digits_capi

Expected: docs/results.md has what was measured.

CAPI learns features of patches, and none of an image: what its evaluation here measures, [CLS], is
a token of the context among others.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "capi"
    config.augment.local_crops = 0  # it does not see them
    config.mask.kind = "random"
    config.mask.ratio = (0.65, 0.65)
    c = config.capi
    c.prototypes, c.predictor_depth, c.predicted = 32, 1, 1.0
    c.lr = 2e-2
    config.optim.clip = 0.0
    return config
