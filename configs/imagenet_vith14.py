"""ViT-H/14 on ImageNet-1k, which is not in the paper, with the recipe of its ViT-L/16.

    python -m sop_jax.train --config=configs/imagenet_vith14.py --workdir=runs/vith14 \
        --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py. Local views have 98 pixels, or seven
patches.

Expected after 250 epochs: unknown. The paper's ViT-L/16 then has k-NN 79.2 %, linear probe 81.2 %.
Cost, estimated from operation counts and not measured: about 1.8e21 floating-point operations,
including remat, which is 1220 hours on an H200 at 400 TFLOP/s.
The state takes 10 GiB; --config.mesh.fsdp=N shards it over groups of N devices.
"""

import ml_collections

from sop_jax.recipes import imagenet


def get_config() -> ml_collections.ConfigDict:
    config = imagenet(large=True)
    config.epochs = 250.0
    config.batch_size = 1024
    config.model.size = "h"
    config.model.patch = 14
    config.model.remat = "full"
    config.augment.local_size = 98
    return config
