"""PMSN on iNaturalist 2018 with ViT-S/16, as in "On Partial Prototype Collapse" (its table 7).

    python -m sop_jax.train --config=configs/inat18_pmsn_vits16.py --workdir=runs/inat18_pmsn \
        --config.data.path=DATA_DIR

Everything is as in configs/inat18_msn_vits16.py but the prior, a power law with weight 5, and the
last learning rate.

Expected after 300 epochs (its table 8): linear probe 41.8 %, with 3005 unique prototypes of 8142.
Its k-NN accuracy is not published. With pmsn.prior_weight of 1 and 15: 41.4 % and 41.0 %.
Cost, estimated from operation counts and not measured: about 1.1e19 floating-point operations,
which is 8 hours on an H200 at 400 TFLOP/s.
"""

import ml_collections

from sop_jax.recipes import inat18


def get_config() -> ml_collections.ConfigDict:
    config = inat18()
    config.method = "pmsn"
    config.pmsn.prototypes = 8142
    config.optim.min_lr = 2e-6
    return config
