"""iBOT on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_ibot.py --workdir=runs/digits_ibot

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "ibot"
    config.ibot.prototypes = 512
    config.ibot.freeze_epochs = 0.0
    config.ibot.teacher_temperature = (0.015, 0.015)
    config.ibot.patch_teacher_temperature = (0.015, 0.015)
    return config
