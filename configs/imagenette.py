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

from sop_jax.recipes import folder


def get_config() -> ml_collections.ConfigDict:
    return folder()
