"""Swin-T with windows of 14 on ImageNet-1k with the paper's recipe.

    python -m sop_jax.train --config=configs/imagenet_swint14.py --workdir=runs/swint14 \
        --config.data.path=DATA_DIR

Settings that the paper does not specify are those of iBOT's Swin-T. The data is prepared as for
configs/imagenet_vits16.py. [CLS] is the mean of the tokens, and masks are drawn for tokens of 32
pixels, from epoch 50 on, as in iBOT.

Expected after 300 epochs (the paper's table 1): k-NN 77.2 %, linear probe 79.4 %.
Cost, estimated from operation counts and not measured: about 7.6e19 floating-point operations,
which is 53 hours on an H200 at 400 TFLOP/s; small matrix products reach less.
"""

import ml_collections

from sop_jax.recipes import imagenet


def get_config() -> ml_collections.ConfigDict:
    config = imagenet()
    config.epochs = 300.0
    config.mask.start_epochs = 50.0
    config.model.family = "swin"
    config.model.size = "t"
    config.model.window = 14
    return config
