"""CAPI on scikit-learn's digits, with the network and the global crops of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_capi.py --workdir=runs/digits_capi

Expected: docs/results.md has what was measured.

CAPI learns features of patches only, so their mean represents an image. It sees no local views and
a third of the patches, and trains for twice the epochs of the other methods in about the same time.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "capi"
    config.epochs = 108.0
    config.augment.local_crops = 0  # it does not see them
    config.model.pool = "mean"
    config.mask.kind = "random"
    config.mask.ratio = (0.65, 0.65)
    c = config.capi
    c.prototypes, c.predictor_depth, c.predicted = 128, 1, 1.0
    c.lr = 2e-2
    config.optim.clip = 0.0
    return config
