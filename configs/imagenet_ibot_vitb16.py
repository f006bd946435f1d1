"""iBOT with ViT-B/16 on ImageNet-1k.

    python -m sop_jax.train --config=configs/imagenet_ibot_vitb16.py --workdir=runs/ibot_vitb16 \
        --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py.
Expected after 400 epochs (table 1 of SOP's paper): k-NN 77.1 %, linear probe 79.5 %. "On Partial
Prototype Collapse" counts 875 unique prototypes of 8192 (its table 1).
Cost, estimated from operation counts and not measured: about 2.4e20 floating-point operations,
which is 170 hours on an H200 at 400 TFLOP/s.
"""

import ml_collections

from sop_jax.recipes import imagenet_prototypes


def get_config() -> ml_collections.ConfigDict:
    return imagenet_prototypes("ibot", large=True)
