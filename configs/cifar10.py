"""A small ViT on CIFAR-10 at its native 32 pixels, for one GPU.

    python -m sop_jax.train --config=configs/cifar10.py --workdir=runs/cifar10 \
        --config.data.path=cifar10.npz

The file contains {train,test}_{blob,offsets,labels}: the concatenated encoded images, their offsets
and their classes. A folder with train/ and test/ also works, with --config.data.source=folder, and
so does a prepared TFDS cifar10, with --config.data.source=tfds --config.data.name=cifar10.

The paper has no CIFAR-10 pretraining, and this config was not measured at its full length;
configs/cifar10_cpu.py was, see docs/results.md.
Cost, estimated from operation counts and not measured: 300 epochs are about 2e17 floating-point
operations, an hour on an H200 at 60 TFLOP/s.
"""

import ml_collections

from sop_jax.config import paper


def get_config() -> ml_collections.ConfigDict:
    config = paper()
    config.epochs = 300.0
    config.batch_size = 512
    config.log_every = 20
    config.eval_every = 2000
    config.checkpoint_every = 1000
    config.data.source = "packed"
    config.data.test_split = "test"
    config.data.workers = 8
    a = config.augment
    a.global_size, a.local_size, a.local_crops = 32, 16, 6
    a.global_scale, a.local_scale = (0.3, 1.0), (0.1, 0.3)
    a.blur = (0.0, 0.0, 0.0)  # it would leave little of 32 pixels
    m = config.model
    m.size, m.width, m.depth, m.heads, m.patch = "custom", 256, 8, 4, 4
    m.init_std = 0.05
    config.head.hidden, config.head.dim = 1024, 128
    config.sop.cls.memory, config.sop.cls.anchors = 16384, 1024
    config.sop.patch.memory, config.sop.patch.anchors = 4096, 256
    config.sop.teacher_temperature = (0.02, 0.04)
    config.sop.search_precision = "high"  # TF32 on GPUs
    config.optim.lr = 5e-4
    config.optim.momentum = (0.99, 1.0)
    config.eval.resize = config.eval.crop = 32
    config.eval.batch_size = 512
    return config
