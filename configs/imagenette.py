"""ViT-S/16 on Imagenette, or on any folder tree of images of about 10,000 files.

    python -m sop_jax.train --config=configs/imagenette.py --workdir=runs/imagenette \
        --config.data.path=imagenette2-320

The folder contains train/ and val/ with one folder per class (ImageFolder's layout). A folder
without classes or without a test split also works; the k-NN fields are then null.

The paper has no number for Imagenette, and none was measured with this config.
Cost, estimated from operation counts and not measured: 300 epochs of 9,469 images are about 3.5e17
floating-point operations, half an hour on an H200 at 200 TFLOP/s and days on a laptop.
"""

import ml_collections

from sop_jax.config import paper


def get_config() -> ml_collections.ConfigDict:
    config = paper()
    config.epochs = 300.0
    config.batch_size = 256
    config.log_every = 10
    config.eval_every = 1000
    config.checkpoint_every = 500
    config.data.source = "folder"
    config.data.test_split = "val"
    # A memory of about one epoch, with the number of SOPs in the paper's proportion to it.
    config.sop.cls.memory = 8192
    config.sop.cls.anchors = 512
    config.sop.patch.memory = 4096
    config.sop.patch.anchors = 256
    config.sop.teacher_temperature = (0.04, 0.04)
    # With few images, milder crops keep the agreement of views above the temperature ratio.
    config.augment.global_scale = (0.4, 1.0)
    config.augment.local_scale = (0.1, 0.4)
    return config
