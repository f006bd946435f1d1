"""What several files in `configs/` have in common."""

import ml_collections

from sop_jax.config import paper
from sop_jax.errors import UserError


def imagenet(large: bool = False) -> ml_collections.ConfigDict:
    """Returns the paper's recipe for ImageNet-1k as `sop_jax.data.prepare` converts it.

    Args:
        large: whether the settings that ViT-B and larger networks have in common are used.
    """
    config = paper()
    config.data.update(name="imagenet", test_split="val")
    config.sop.search_precision = "high"  # TF32 on GPUs; docs/results.md has its recall
    if large:
        config.augment.update(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32))
        config.sop.temperature_warmup_epochs = 50.0
        config.optim.update(lr=7.5e-4, min_lr=2e-6, clip=0.3)
    return config


def imagenet_prototypes(method: str, large: bool = False) -> ml_collections.ConfigDict:
    """Returns iBOT's recipe for ImageNet-1k, of which DINO's is the part without masked patches.

    These are table 6 of "On Partial Prototype Collapse" and iBOT's mixture of masks.

    Args:
        method: `dino` or `ibot`.
        large: whether the settings that ViT-B and larger networks have in common are used.
    """
    config = imagenet(large)
    config.method = method
    config.mask.update(ratio=(0.1, 0.5), none=0.5)
    config.optim.momentum = (0.996, 1.0)
    if large:
        config.epochs, config.batch_size, config.model.size = 400.0, 512, "b"
        config[method].update(freeze_epochs=3.0, temperature_warmup_epochs=50.0)
    return config


def with_vmf(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """Returns a recipe with vMF densities, probability centering and KoLeo of weight 0.1 or none.

    Args:
        config: a recipe of a method with prototypes.
        variant: base for no KoLeo, kd for KoLeo on data, or kp for KoLeo on prototypes.

    Raises:
        UserError: there is no such variant.
    """
    weights = {"base": {}, "kd": {"koleo_data": 0.1}, "kp": {"koleo_prototypes": 0.1}}
    if variant not in weights:
        raise UserError(
            f"the variant of the recipe is {variant!r}; expected one of {', '.join(weights)}, "
            "after a colon, as in --config=FILE.py:kp"
        )
    config[config.method].update(layer="vmf", marginal="probability_centering", **weights[variant])
    return config


def inat18() -> ml_collections.ConfigDict:
    """Returns what the recipes of MSN and PMSN for iNaturalist 2018 have in common.

    Epochs, batch and optimizer are those of table 7 of "On Partial Prototype Collapse"; everything
    else is from MSN's released recipe.
    """
    config = paper()
    config.epochs = 300.0
    config.batch_size = 1536
    config.data.update(name="i_naturalist2018", test_split="validation")
    config.augment.update(
        global_scale=(0.3, 1.0),
        local_scale=(0.05, 0.3),
        saturation=0.4,
        blur=(0.5, 0.5, 0.5),
        solarize=0.0,
    )
    config.head.batch_norm = True
    config.optim.update(lr=1e-3, warmup_epochs=15.0, clip_kind="global", momentum=(0.996, 1.0))
    return config


def folder() -> ml_collections.ConfigDict:
    """Returns the recipe for a folder of images, of which `own_images.decisions` changes the rest.

    The memory is that of about one epoch of ten thousand images, with the number of SOPs in the
    paper's proportion to it. With few images, milder crops keep the agreement of views above the
    temperature ratio.
    """
    config = paper()
    config.epochs = 300.0
    config.batch_size = 256
    config.log_every = 10
    config.eval_every = 1000
    config.checkpoint_every = 500
    config.data.update(source="folder", test_split="val")
    config.sop.search_precision = "high"  # as for ImageNet
    config.sop.cls.update(memory=8192, anchors=512)
    config.sop.patch.update(memory=4096, anchors=256)
    config.sop.teacher_temperature = (0.04, 0.04)
    config.augment.update(global_scale=(0.4, 1.0), local_scale=(0.1, 0.4))
    return config


def digits() -> ml_collections.ConfigDict:
    """Returns what the recipes for scikit-learn's digits have in common: all but the method.

    At this scale the network's start and the crops decide between learning and collapse.
    """
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
    config.optim.lr = 8e-3
    config.optim.warmup_steps = 100
    config.optim.weight_decay = (0.04, 0.04)
    config.optim.momentum = (0.99, 0.995)
    config.eval.resize = config.eval.crop = 16
    return config
