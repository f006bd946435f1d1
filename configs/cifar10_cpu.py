"""A small ViT on CIFAR-10, for about an hour on two CPU cores.

    python -m sop_jax.train --config=configs/cifar10_cpu.py --workdir=runs/cifar10_cpu \
        --config.data.path=cifar10.npz

The file is that of configs/cifar10.py. Expected: docs/results.md has the measured accuracy and
time.
"""

import ml_collections

from sop_jax.config import paper


def get_config() -> ml_collections.ConfigDict:
    config = paper()
    config.epochs = 16.64  # 6500 steps
    config.batch_size = 128
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 500
    config.data.source = "packed"
    config.data.test_split = "test"
    config.data.workers = 0
    config.data.threads = 1
    a = config.augment
    a.global_size, a.local_size, a.local_crops = 32, 16, 4
    a.global_scale, a.local_scale = (0.4, 1.0), (0.1, 0.4)
    a.solarize = 0.0
    a.blur = (0.0, 0.0, 0.0)  # it would leave little of 32 pixels
    m = config.model
    m.size, m.width, m.depth, m.heads, m.patch = "custom", 128, 4, 4, 8
    m.drop_path, m.dtype = 0.0, "float32"
    m.init_std, m.position_std = 0.1, 0.5
    config.head.hidden, config.head.dim = 256, 64
    s = config.sop
    s.cls.memory, s.cls.anchors, s.cls.supports, s.cls.tasks = 4096, 512, 4, 1
    s.patch.memory, s.patch.anchors = 2048, 128
    s.teacher_temperature = (0.02, 0.02)
    config.optim.lr = 2e-3
    config.optim.warmup_steps = 400
    config.optim.weight_decay = (0.04, 0.1)
    config.optim.momentum = (0.99, 0.999)
    config.eval.resize = config.eval.crop = 32
    config.eval.batch_size = 500
    return config
