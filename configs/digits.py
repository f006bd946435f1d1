"""The quick start: a small ViT on scikit-learn's digits, which need no download.

    python -m sop_jax.train --config=configs/digits.py --workdir=runs/digits

Expected: docs/results.md has the measured accuracy and time on two CPU cores.

At this scale the choices below decide between learning and collapse (docs/results.md shows both): a
low teacher temperature, mild crops, and an initialization that distinguishes images and positions.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    s = config.sop
    s.cls.memory, s.cls.anchors, s.cls.supports, s.cls.tasks = 1024, 128, 4, 1
    s.patch.memory, s.patch.anchors = 512, 64
    s.teacher_temperature = (0.015, 0.015)
    return config
