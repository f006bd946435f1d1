"""MaSSL with ViT-S/16 on ImageNet-1k, with the settings of its authors' command.

    python -m sop_jax.train --config=configs/imagenet_massl_vits16.py \
        --workdir=runs/massl_vits16 --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py.

Expected after 800 epochs (table 1 of SOP's paper): k-NN 75.1 %, linear probe 77.8 %.
After 100 and 300 epochs (its table B.1): k-NN 72.7 % and 74.7 %.
Cost, not measured here: that table gives 177.3 hours for 800 epochs on hardware that it does not
specify.
"""

import ml_collections

from sop_jax.recipes import imagenet


def get_config() -> ml_collections.ConfigDict:
    config = imagenet()
    config.method = "massl"
    config.batch_size = 128
    config.augment.global_scale = (0.32, 1.0)
    config.augment.local_scale = (0.05, 0.32)
    config.optim.warmup_epochs = 0.0
    config.optim.momentum = (0.992, 1.0)
    return config
