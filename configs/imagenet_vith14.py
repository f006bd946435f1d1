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

from sop_jax.config import paper


def get_config() -> ml_collections.ConfigDict:
    config = paper()
    config.epochs = 250.0
    config.batch_size = 1024
    config.data.name = "imagenet"
    config.data.test_split = "val"
    config.model.size = "h"
    config.model.patch = 14
    config.model.remat = "full"
    config.augment.local_size = 98
    config.augment.global_scale = (0.32, 1.0)
    config.augment.local_scale = (0.05, 0.32)
    config.sop.temperature_warmup_epochs = 50.0
    config.optim.lr = 7.5e-4
    config.optim.min_lr = 2e-6
    config.optim.clip = 0.3
    return config
