"""The quick start: a small ViT on scikit-learn's digits, which need no download.

    python -m sop_jax.train --config=configs/digits.py --workdir=runs/digits

Expected: docs/results.md has the measured accuracy and time on two CPU cores.

At this scale the choices below decide between learning and collapse (docs/results.md shows both): a
low teacher temperature, mild crops, and an initialization that distinguishes images and positions.
"""

import ml_collections

from sop_jax.config import paper


def get_config() -> ml_collections.ConfigDict:
    config = paper()
    config.epochs = 54.0  # 1212 steps
    config.batch_size = 64
    config.log_every = 20
    config.eval_every = 300
    config.checkpoint_every = 300
    config.data.source = "digits"
    config.data.workers = 0
    config.data.threads = 1
    a = config.augment
    a.global_size, a.local_size, a.local_crops = 16, 8, 4
    a.global_scale, a.local_scale = (0.6, 1.0), (0.3, 0.7)
    a.flip = a.grayscale = a.solarize = a.hue = 0.0
    a.brightness = a.contrast = a.saturation = 0.1
    a.blur = (0.0, 0.0, 0.0)
    m = config.model
    m.size, m.width, m.depth, m.heads, m.patch = "custom", 64, 4, 2, 4
    m.drop_path, m.dtype = 0.0, "float32"
    m.init_std, m.position_std = 0.1, 0.5
    config.head.hidden, config.head.dim = 256, 64
    s = config.sop
    s.cls.memory, s.cls.anchors, s.cls.supports, s.cls.tasks = 1024, 128, 4, 1
    s.patch.memory, s.patch.anchors = 512, 64
    s.teacher_temperature = (0.015, 0.015)
    config.optim.lr = 8e-3
    config.optim.warmup_steps = 100
    config.optim.weight_decay = (0.04, 0.04)
    config.optim.momentum = (0.99, 0.995)
    config.eval.resize = config.eval.crop = 16
    return config
