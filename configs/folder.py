"""A folder of your own images: what no property of the images or of the machine decides.

    python -m sop_jax.train --images=FOLDER --workdir=runs/mine

looks at the folder and at the devices, and chooses everything else: docs/own_images.md says how.
By itself, this recipe is one for some ten thousand photos on a GPU:

    python -m sop_jax.train --config=configs/folder.py --workdir=runs/mine \
        --config.data.path=FOLDER

The folder contains images, or one folder of images per class, or train/ and val/ with such folders.
The paper has no number for it.
"""

import ml_collections

from sop_jax.recipes import folder


def get_config() -> ml_collections.ConfigDict:
    return folder()
