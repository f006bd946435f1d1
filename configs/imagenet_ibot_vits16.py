"""iBOT with ViT-S/16 on ImageNet-1k.

    python -m sop_jax.train --config=configs/imagenet_ibot_vits16.py --workdir=runs/ibot_vits16 \
        --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py.
Expected after 800 epochs (table 1 of SOP's paper): k-NN 75.2 %, linear probe 77.9 %.
After 100 and 300 epochs (its table B.1): k-NN 71.5 % and 74.6 %. "On Partial Prototype Collapse"
counts 3242 unique prototypes of 8192 (its table 1).
Cost, not measured here: that table B.1 gives 193.4 hours for 800 epochs on hardware that it does
not specify.
"""

import ml_collections

from sop_jax.recipes import imagenet_prototypes


def get_config() -> ml_collections.ConfigDict:
    return imagenet_prototypes("ibot")
