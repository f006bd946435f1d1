"""SwAV on scikit-learn's digits, with the network, the crops and the length of configs/digits.py.

    python -m sop_jax.train --config=configs/digits_swav.py --workdir=runs/digits_swav

Expected: docs/results.md has what was measured.
"""

import ml_collections

from sop_jax.recipes import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits()
    config.method = "swav"
    config.head.layers, config.head.batch_norm = 2, True
    config.optim.momentum = (0.0, 0.0)
    config.optim.lr = 4e-3
    s = config.swav
    s.prototypes, s.freeze_steps = 128, 100
    s.queue, s.queue_start_epochs = 960, 0.0
    return config
