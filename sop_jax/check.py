"""Finds what is wrong with a config before the long work starts."""

from collections.abc import Iterable
from typing import Any

import ml_collections

from sop_jax.config import flatten, misnamed, paper
from sop_jax.data import named
from sop_jax.errors import UserError
from sop_jax.models import FAMILIES, linear, positions, size_of, token_side
from sop_jax.models.attention import IMPLEMENTATIONS
from sop_jax.models.vit import REMATS
from sop_jax.objectives.sop.objective import ANCHORS
from sop_jax.objectives.sop.prototypes import POOLS, VOTES
from sop_jax.parallel.search import PRECISIONS
from sop_jax.training.optim import CLIPS

CHOICES = {
    "data.source": ("tfds", "folder", "packed", "digits"),
    "data.orientation": ("auto", "exif", "ignore"),
    "augment.resample": ("opencv", "pillow"),
    "mask.kind": ("block", "random"),
    "model.family": tuple(FAMILIES),
    "model.positions": positions.RULES,
    "model.dtype": ("float32", "bfloat16"),
    "model.precision": tuple(linear.PRECISIONS),
    "model.remat": tuple(REMATS),
    "model.attention": IMPLEMENTATIONS,
    "sop.cls.votes": VOTES,
    "sop.patch.votes": VOTES,
    "sop.pool": POOLS,
    "sop.anchors": ANCHORS,
    "sop.search_precision": tuple(PRECISIONS),
    "optim.clip_kind": tuple(CLIPS),
}

POSITIVE = (
    "batch_size",
    "accumulate",
    "mesh.fsdp",
    "data.max_pixels",
    "augment.global_size",
    "augment.local_size",
    "model.patch",
    "model.norm_eps",
    "model.window",
    "head.hidden",
    "head.dim",
    "sop.cls.memory",
    "sop.cls.tasks",
    "sop.student_temperature",
    "eval.resize",
    "eval.crop",
    "eval.batch_size",
    "eval.knn_temperature",
    "augment.blur_sigma",
    "sop.teacher_temperature",
    "checkpoint.keep_last",
)


NOT_NEGATIVE = (
    "augment.local_crops",
    "data.workers",
    "data.threads",
    "data.white",
    "data.retry_seconds",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "checkpoint.keep_every",
    "sop.cls.supports",
    "sop.patch.supports",
    "sop.patch.tasks",
    "sop.patch.memory",
    "optim.clip",
    "mesh.data",
    "seed",
    "optim.lr",
    "optim.min_lr",
    "optim.weight_decay",
    "model.init_std",
    "model.position_std",
    "model.registers",
    "model.layer_scale",
    "sop.cls.weight",
    "sop.patch.weight",
    "augment.hue",
    "augment.brightness",
    "augment.contrast",
    "augment.saturation",
)

SHARES = (
    "sop.smoothing",
    "mask.ratio",
    "mask.none",
    "model.drop_path",
    "augment.global_scale",
    "augment.local_scale",
    "augment.flip",
    "augment.jitter",
    "augment.grayscale",
    "augment.blur",
    "augment.solarize",
    "data.max_corrupt_share",
    "optim.momentum",
)

RANGES = (
    (POSITIVE, lambda value: value > 0, "more than 0"),
    (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first setting that cannot work, saying which would."""
    flat = flatten(config)
    if wrong := misnamed(flat):
        raise UserError("; ".join(wrong))
    for key, default in flatten(paper()).items():
        if isinstance(default, list) and key != "eval.knn_k" and len(flat[key]) != len(default):
            raise UserError(
                f"{key} is {tuple(flat[key])}; expected {len(default)} numbers, as {tuple(default)}"
            )
    for key, known in CHOICES.items():
        if flat[key] not in known:
            raise UserError(f"{key} is {flat[key]!r}; expected one of {', '.join(known)}")
    for keys, fits, expected in RANGES:
        for key in keys:
            values = flat[key] if isinstance(flat[key], list) else [flat[key]]
            if not all(fits(value) for value in values):
                raise UserError(f"{key} is {flat[key]}; expected {expected}")
    check_length(config)
    check_sizes(config)
    for name in ("cls", "patch"):
        check_memory(name, config)
    if config.model.family == "resnet":
        check_cls_alone(flat)


# What the networks of a family do not have, beside the numbers of a size of its own.
NOT_OF = {
    "vit": ("window", "stage_depths", "stage_heads"),
    "swin": ("patch", "depth", "heads", "registers", "layer_scale", "positions"),
    "resnet": (
        *("patch", "window", "depth", "heads", "stage_heads", "registers", "layer_scale"),
        *("positions", "position_std", "norm_eps"),
    ),
}
NUMBERS = ("width", "depth", "heads", "stage_depths", "stage_heads")  # of model.size=custom
LENGTHS = ("", "mask.start_", "sop.temperature_warmup_", "optim.warmup_")


def check_used(
    config: ml_collections.ConfigDict,
    given: Iterable[str],
    made: ml_collections.ConfigDict | None = None,
) -> None:
    """Refuses settings that a person asks for and that have no effect.

    Args:
        config: of the run.
        given: the settings on the command line, by their dotted names.
        made: the config of the same run when it was started; what it has already may stay.

    Raises:
        UserError: names the first of them, and why it has none.
    """
    reasons, flat = without_use(config), flatten(config)
    kept = flatten(made or {})
    for name in given:
        if name in reasons and (name not in kept or kept[name] != flat[name]):
            raise UserError(f"--config.{name} would have no effect: {reasons[name]}")


def without_use(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The settings that have no effect beside the others of a config, and why."""
    flat, model = flatten(config), config.model
    reasons = {}
    for name in config.data:
        if reason := named.without_use(config.data.source, name):
            reasons[f"data.{name}"] = reason
    if model.size != "custom":
        for name in NUMBERS:
            reasons[f"model.{name}"] = f"model.size={model.size} decides; for others choose custom"
    for name in NOT_OF[model.family]:
        reasons[f"model.{name}"] = f"model.family={model.family} has no use for it"
    for name in LENGTHS:
        if flat[f"{name}steps"] is not None:
            reasons[f"{name}epochs"] = f"{name}steps is {flat[f'{name}steps']}, and steps win"
    if not config.sop.patch.tasks:
        for name in ("anchors", "supports", "votes", "weight"):
            reasons[f"sop.patch.{name}"] = "sop.patch.tasks is 0"
    if not config.augment.local_crops:
        for name in ("local_size", "local_scale"):
            reasons[f"augment.{name}"] = "augment.local_crops is 0"
    return reasons


def check_length(config: ml_collections.ConfigDict) -> None:
    """A run has steps, or epochs."""
    first, last = config.profile_steps
    if not (first == last == 0 or 1 <= first <= last):
        raise UserError(
            f"profile_steps is {first},{last}; expected the first and the last step to trace, "
            "counted from 1, such as --config.profile_steps=20,25, or 0,0 for none"
        )
    for key in ("optim.warmup", "sop.temperature_warmup", "mask.start"):
        section, name = key.split(".")
        steps, epochs = config[section][f"{name}_steps"], config[section][f"{name}_epochs"]
        if (steps or 0) < 0 or epochs < 0:
            raise UserError(f"{key}_steps is {steps}, {key}_epochs {epochs}; expected 0 or more")
    length = config.steps if config.steps is not None else config.epochs
    if length <= 0:
        raise UserError(
            f"the run has {config.steps} steps and {config.epochs} epochs; set --config.steps or "
            "--config.epochs to more than 0 (steps win over epochs)"
        )
    if config.model.drop_path == 1:
        raise UserError("model.drop_path is 1.0, which drops everything; expected less")


def check_trace(profile_steps: tuple[int, int], steps: int) -> None:
    """A trace begins and ends in a run of so many steps."""
    first, last = profile_steps
    if last > steps:
        raise UserError(
            f"profile_steps is {first},{last}, but the run has {steps} steps, so that nothing "
            f"would be traced after the last one; choose steps of 1 to {steps}"
        )


def check_sizes(config: ml_collections.ConfigDict) -> None:
    """Images are whole tokens, heads are whole."""
    size = size_of(config.model)
    side = token_side(config.model)
    of_patches = config.model.family == "vit"
    unit = f"model.patch {side}" if of_patches else f"the {side} pixels of a token"
    sizes = ["augment.global_size", "eval.crop"]
    if config.augment.local_crops:
        sizes.append("augment.local_size")
    for key in sizes:
        pixels = flatten(config)[key]
        if config.model.family == "resnet":
            if pixels < side and key == "augment.global_size":
                raise UserError(f"{key} is {pixels}; a ResNet needs {side} pixels or more")
        elif pixels % side:
            below, above = pixels // side * side, (pixels // side + 1) * side
            raise UserError(
                f"{key} {pixels} is not a multiple of {unit}; "
                f"choose {f'{below} or ' if below else ''}{above}"
                f"{', or another patch' if of_patches else ''}"
            )
    if config.eval.resize < config.eval.crop:
        raise UserError(
            f"eval.resize {config.eval.resize} is smaller than eval.crop {config.eval.crop}; "
            "the crop is taken from the resized image"
        )
    NETWORKS[config.model.family](size)
    if config.model.attention == "cudnn" and config.model.family != "vit":
        raise UserError(
            f"model.attention is cudnn, which model.family={config.model.family} has no use for; "
            "choose auto"
        )


def check_resnet(size: Any) -> None:
    """Every stage has blocks."""
    if min(size.width, *size.depths) <= 0:
        raise UserError(
            f"model.width is {size.width} and model.stage_depths {size.depths}; expected more "
            "than 0"
        )


def check_vit(size: Any) -> None:
    """Heads are whole."""
    if min(size) <= 0:
        raise UserError(
            f"model.width, depth and heads are {size.width}, {size.depth} and {size.heads}; "
            "expected more than 0"
        )
    if size.width % size.heads:
        raise UserError(
            f"model.width {size.width} cannot be split over model.heads {size.heads}; "
            "choose a width that the heads divide"
        )


def check_swin(size: Any) -> None:
    """There are four stages, layers come in pairs, heads are whole."""
    if not len(size.depths) == len(size.heads) == 4:
        raise UserError(
            f"model.stage_depths is {size.depths} and stage_heads {size.heads}; expected four "
            "stages"
        )
    if min(size.width, *size.depths, *size.heads) <= 0:
        raise UserError(
            f"model.width, stage_depths and stage_heads are {size.width}, {size.depths} and "
            f"{size.heads}; expected more than 0"
        )
    if any(depth % 2 for depth in size.depths):
        raise UserError(
            f"model.stage_depths is {size.depths}; expected even numbers, because every second "
            "layer moves the windows of the one before"
        )
    for i, heads in enumerate(size.heads):
        if size.width * 2**i % heads:
            raise UserError(
                f"model.width {size.width} makes stage {i + 1} {size.width * 2**i} wide, which "
                f"cannot be split over its {heads} heads; choose other model.stage_heads"
            )


NETWORKS = {"vit": check_vit, "swin": check_swin, "resnet": check_resnet}


# A ResNet has no patches to mask or to remember, and no drop path.
CLS_ALONE = {"sop.patch.tasks": 0, "sop.patch.memory": 0, "mask.none": 1.0, "model.drop_path": 0.0}


def check_cls_alone(flat: dict[str, Any]) -> None:
    """What a ResNet has no use for is switched off, so that nobody believes it to be at work."""
    others = {key: value for key, value in CLS_ALONE.items() if flat[key] != value}
    if others:
        raise UserError(
            "model.family=resnet learns from [CLS] alone: it has no patches to mask and no drop "
            f"path, but {', '.join(f'{key} is {flat[key]}' for key in others)}; set "
            + " ".join(f"--config.{key}={value}" for key, value in others.items())
        )


def check_memory(name: str, config: ml_collections.ConfigDict) -> None:
    """A memory holds a batch, the anchors of a draw, and their supports."""
    level, batch = config.sop[name], config.batch_size
    if level.memory == 0 and level.tasks == 0:
        return
    if batch > level.memory:
        raise UserError(
            f"batch_size {batch} does not fit sop.{name}.memory {level.memory}: every image stores "
            f"a row; use a batch of at most {level.memory} or a larger memory"
        )
    if config.sop.anchors == "fixed_slots" and level.memory % batch:
        raise UserError(
            f"sop.anchors=fixed_slots needs slots that stay in the memory, and batch_size {batch} "
            f"does not divide sop.{name}.memory {level.memory}; choose sizes that do"
        )
    if level.tasks == 0:
        return
    if not 2 <= level.anchors <= level.memory:
        raise UserError(
            f"sop.{name}.anchors {level.anchors} cannot be drawn from sop.{name}.memory "
            f"{level.memory}; expected 2 to {level.memory}"
        )
    others = level.memory - (level.anchors if config.sop.pool == "non_anchors" else 1)
    if not 0 <= level.supports <= others:
        raise UserError(
            f"sop.{name}.supports {level.supports} cannot be found among the {others} rows that "
            f"sop.pool={config.sop.pool} leaves of sop.{name}.memory {level.memory} beside "
            f"{level.anchors} anchors; use fewer supports or anchors, or a larger memory"
        )
