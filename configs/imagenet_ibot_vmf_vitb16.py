"""iBOT-vMF with ViT-B/16 on ImageNet-1k, and variants with KoLeo.

    python -m sop_jax.train --config=configs/imagenet_ibot_vmf_vitb16.py \
        --workdir=runs/ibot_vmf_vitb16 --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py.
Append :kd or :kp to the config file for KoLeo on data or on prototypes, of weight 0.1.

Expected after 400 epochs (table 2 of "On Partial Prototype Collapse"): k-NN 78.7 % and linear probe
80.3 %; with KoLeo on prototypes k-NN 78.8 % and linear probe 80.5 %. It counts 1170 unique
prototypes of 8192 without KoLeo (its table 1).
Cost, estimated from operation counts and not measured: about 2.4e20 floating-point operations,
which is 170 hours on an H200 at 400 TFLOP/s.
"""

import ml_collections

from sop_jax.recipes import imagenet_prototypes, with_vmf


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    return with_vmf(imagenet_prototypes("ibot", large=True), variant)
