"""iBOT-vMF with ViT-S/16 on ImageNet-1k, and variants with KoLeo.

    python -m sop_jax.train --config=configs/imagenet_ibot_vmf_vits16.py \
        --workdir=runs/ibot_vmf_vits16 --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py.
Append :kd or :kp to the config file for KoLeo on data or on prototypes, of weight 0.1.

Expected after 800 epochs (table 2 of "On Partial Prototype Collapse"): k-NN 75.3 % and linear probe
77.9 %; with KoLeo on prototypes k-NN 75.5 % and linear probe 77.9 %.
Cost, not measured here: for iBOT, table B.1 of SOP's paper gives 193.4 hours for 800 epochs on
hardware that it does not specify.
"""

import ml_collections

from sop_jax.recipes import imagenet_prototypes, with_vmf


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    return with_vmf(imagenet_prototypes("ibot"), variant)
