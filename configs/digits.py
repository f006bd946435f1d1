"""placeholder"""

from sop_jax.config import paper


def get_config():
    c = paper()
    c.batch_size = 64
    c.steps = 300
    c.log_every = 20
    c.eval_every = 100
    c.checkpoint_every = 100
    c.optim.warmup_steps = 100
    c.sop.temperature_warmup_steps = 100
    a = c.augment
    a.global_size = 16
    a.local_size = 8
    a.local_crops = 4
    c.data.source = "digits"
    c.data.workers = 0
    m = c.model
    m.size = "custom"
    m.width, m.depth, m.heads, m.patch, m.dtype, m.drop_path = 96, 4, 3, 4, "float32", 0.0
    c.head.hidden, c.head.dim = 256, 64
    s = c.sop
    s.cls.update(dict(memory=1024, anchors=128, supports=4, tasks=1))
    s.patch.update(dict(memory=512, anchors=64))
    s.teacher_temperature = (0.02, 0.02)
    c.optim.lr = 4e-3
    c.optim.momentum = (0.98, 0.995)
    c.eval.resize = c.eval.crop = 16
    return c
