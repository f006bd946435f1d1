"""DINO-vMF with ViT-S/16 on ImageNet-1k, and variants with KoLeo.

    python -m sop_jax.train --config=configs/imagenet_dino_vmf_vits16.py \
        --workdir=runs/dino_vmf_vits16 --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py.
Append :kd or :kp to the config file for KoLeo on data or on prototypes, of weight 0.1.

Expected after 800 epochs: its accuracy is not among the numbers of our sources; that of DINO is
k-NN 74.5 % (table 1 of SOP's paper). "On Partial Prototype Collapse" counts 1157 unique prototypes
of 65536 (its table 1).
Cost, not measured here: for DINO, table B.1 of SOP's paper gives 180.0 hours for 800 epochs on
hardware that it does not specify.
"""

import ml_collections

from sop_jax.recipes import imagenet_prototypes, with_vmf


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    return with_vmf(imagenet_prototypes("dino"), variant)
