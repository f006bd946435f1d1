"""A small ResNet on CIFAR-10, for less than an hour on two CPU cores.

    python -m sop_jax.train --config=configs/cifar10_cpu.py --workdir=runs/cifar10_cpu \
        --config.data.path=cifar10.npz

The file is that of configs/cifar10.py. Expected: docs/results.md has the measured accuracy and
time, and the curves of other choices.

The network has the width and the strides with which convolutions are fastest on a CPU: 32 channels
or more, and no map smaller than 4 x 4.
"""

import ml_collections

from sop_jax.config import paper


def get_config() -> ml_collections.ConfigDict:
    config = paper()
    config.epochs = 6.4  # 5000 steps
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 500
    config.data.source = "packed"
    config.data.test_split = "test"
    config.data.workers = 0
    config.data.threads = 1
    config.mask.none = 1.0
    a = config.augment
    a.global_size, a.global_scale, a.local_crops = 32, (0.2, 1.0), 0
    a.solarize = 0.0
    a.blur = (0.0, 0.0, 0.0)  # it would leave little of 32 pixels
    m = config.model
    m.family, m.size, m.block, m.stem = "resnet", "custom", "basic", "strided"
    m.width, m.stage_depths = 32, (1, 1, 1)
    m.drop_path, m.dtype, m.remat, m.init_std = 0.0, "float32", "none", 0.1
    config.head.hidden, config.head.dim = 256, 64
    s = config.sop
    s.cls.memory, s.cls.anchors, s.cls.supports, s.cls.tasks = 4096, 512, 4, 1
    s.patch.memory, s.patch.tasks = 0, 0
    s.teacher_temperature = (0.02, 0.02)
    config.optim.lr = 4e-3
    config.optim.warmup_steps = 400
    config.optim.weight_decay = (0.04, 0.1)
    config.optim.momentum = (0.99, 0.999)
    config.eval.resize = config.eval.crop = 32
    config.eval.batch_size = 500
    return config
