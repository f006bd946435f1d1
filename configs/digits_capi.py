"""CAPI on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_capi.py --workdir=runs/digits_capi

Expected: docs/results.md has the measured accuracy and time on two CPU cores.

CAPI sees no local views, so none are made. Its patches learn, and their mean represents an image.
"""

import ml_collections

from sop_jax.config import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "capi"
    config.augment.local_crops = 0
    config.mask.kind = "random"
    config.mask.ratio = (0.65, 0.65)
    config.model.pool = "mean"
    c = config.capi
    c.prototypes, c.predictor_depth, c.predicted = 256, 2, 1.0
    config.optim.clip = 0.0
    return config
