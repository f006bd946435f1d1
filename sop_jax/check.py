"""Checks a config before any long work starts."""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from sop_jax.config import misnamed, paper
from sop_jax.data import masks, named
from sop_jax.errors import UserError
from sop_jax.evaluation.tasks import IN_TRAINING
from sop_jax.models import FAMILIES, linear, positions, resnet, size_of, token_side, vit
from sop_jax.models.attention import IMPLEMENTATIONS
from sop_jax.models.layers import REMATS
from sop_jax.monitor.trackers import TRACKERS
from sop_jax.objectives.methods import METHODS, method_of
from sop_jax.rules import (
    COUNT,
    COUNT_OR_ZERO,
    MAX_STEPS,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    STEPS,
    TEXT,
    TRUTH,
    Rule,
    ascending,
    each,
    less_than,
    number,
    one_of,
    positive,
    some,
    unset_or,
    whole,
)
from sop_jax.settings import flatten
from sop_jax.training import optim
from sop_jax.training.optim import CLIPS, KINDS

VIEWS = 1000  # of one kind per image, at most
SIGMA = 1000  # pixels, at most

TRACE = Rule(
    lambda steps: (
        each(COUNT_OR_ZERO, 2).fits(steps) and (steps == [0, 0] or 1 <= steps[0] <= steps[1])
    ),
    "the first and the last step to trace, counted from 1, or 0,0 for none",
)

# The values that each setting can have, in the order of `config.paper`.
RULES: dict[str, Rule] = {
    "seed": whole(0, 2**32 - 1),  # JAX uses only 32 bits of a seed
    "init_from": TEXT,
    "epochs": NOT_NEGATIVE,
    "steps": unset_or(whole(1, MAX_STEPS)),
    "method": one_of(METHODS),
    "batch_size": COUNT,
    "accumulate": COUNT,
    "tracker": one_of(TRACKERS),
    "log_every": COUNT_OR_ZERO,
    "eval_every": COUNT_OR_ZERO,
    "checkpoint_every": COUNT_OR_ZERO,
    "profile_steps": TRACE,
    "data.source": one_of(("tfds", "folder", "packed", "digits")),
    "data.path": TEXT,
    "data.name": TEXT,
    "data.train_split": TEXT,
    "data.test_split": TEXT,
    "data.workers": COUNT_OR_ZERO,
    "data.threads": COUNT_OR_ZERO,
    "data.max_corrupt_share": SHARE,
    "data.orientation": one_of(("auto", "exif", "ignore")),
    "data.white": NOT_NEGATIVE,
    "data.max_pixels": COUNT,
    "data.retry_seconds": NOT_NEGATIVE,
    "augment.resample": one_of(("opencv", "pillow")),
    "augment.global_size": COUNT,
    "augment.local_size": COUNT,
    "augment.global_crops": whole(1, VIEWS),
    "augment.local_crops": whole(0, VIEWS),
    "augment.global_scale": ascending(positive(1)),
    "augment.local_scale": ascending(positive(1)),
    "augment.flip": SHARE,
    "augment.jitter": SHARE,
    "augment.brightness": NOT_NEGATIVE,
    "augment.contrast": NOT_NEGATIVE,
    "augment.saturation": NOT_NEGATIVE,
    "augment.hue": number(0, 0.5),  # of a full turn, in both directions, as in torchvision
    "augment.grayscale": SHARE,
    "augment.blur": each(SHARE, 3),
    "augment.blur_sigma": ascending(positive(SIGMA)),
    "augment.solarize": SHARE,
    "mask.kind": one_of(masks.KINDS),
    "mask.ratio": ascending(SHARE),
    "mask.none": SHARE,
    "mask.start_epochs": NOT_NEGATIVE,
    "mask.start_steps": unset_or(STEPS),
    "model.family": one_of(FAMILIES),
    "model.size": TEXT,  # `size_of` checks that the family has this size
    "model.width": COUNT,
    "model.depth": COUNT,
    "model.heads": COUNT,
    "model.stage_depths": some(COUNT),
    "model.stage_heads": each(COUNT, 4),
    "model.block": one_of(resnet.BLOCKS),
    "model.patch": COUNT,
    "model.window": COUNT,
    "model.registers": COUNT_OR_ZERO,
    "model.layer_scale": NOT_NEGATIVE,
    "model.pool": one_of(vit.POOLS),
    "model.positions": one_of(positions.RULES),
    "model.norm_eps": POSITIVE,
    "model.drop_path": less_than(1),
    "model.init_std": NOT_NEGATIVE,
    "model.position_std": NOT_NEGATIVE,
    "model.remat": one_of(REMATS),
    "model.attention": one_of(IMPLEMENTATIONS),
    "model.stem": one_of(resnet.STEMS),
    "model.unroll": one_of(("auto", "yes", "no")),
    "model.dtype": one_of(("float32", "bfloat16")),
    "model.precision": one_of(linear.PRECISIONS),
    "head.layers": COUNT_OR_ZERO,
    "head.hidden": COUNT,
    "head.dim": COUNT,
    "head.batch_norm": TRUTH,
    "head.batch_norm_views": one_of(("apart", "together")),
    "head.unit": TRUTH,
    **{key: rule for method in METHODS.values() for key, rule in method.rules.items()},
    "optim.kind": one_of(KINDS),
    "optim.sgd_momentum": less_than(1),
    "optim.trust": POSITIVE,
    "optim.lr": NOT_NEGATIVE,
    "optim.min_lr": NOT_NEGATIVE,
    "optim.warmup_epochs": NOT_NEGATIVE,
    "optim.warmup_steps": unset_or(STEPS),
    "optim.weight_decay": each(NOT_NEGATIVE, 2),
    "optim.clip": NOT_NEGATIVE,
    "optim.clip_kind": one_of(CLIPS),
    "optim.momentum": each(SHARE, 2),
    "eval.resize": COUNT,
    "eval.crop": COUNT,
    "eval.batch_size": COUNT,
    "eval.tasks": some(one_of(IN_TRAINING)),
    "eval.knn_k": some(COUNT),
    "eval.knn_temperature": POSITIVE,
    "checkpoint.minutes": NOT_NEGATIVE,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every": COUNT_OR_ZERO,
    "mesh.data": COUNT_OR_ZERO,
    "mesh.fsdp": COUNT,
}


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks that the settings of a config are valid, by themselves and together.

    Raises:
        UserError: names the first setting that is invalid, and a valid value.
    """
    check_values(config)
    check_length(config)
    check_sizes(config)
    check_family(config)
    method_of(config).check(config)


def check_values(config: ml_collections.ConfigDict) -> None:
    """Checks that each setting exists and has a value that its rule allows."""
    flat, defaults = flatten(config), flatten(paper())
    if wrong := misnamed(flat):
        raise UserError("; ".join(wrong))
    method_of(config)
    check_rules(flat, RULES, defaults, "--config.")


def check_rules(
    values: Mapping[str, Any], rules: Mapping[str, Rule], examples: Mapping[str, Any], flag: str
) -> None:
    """Checks that each setting has a value that its rule allows.

    Args:
        values: the flattened settings.
        rules: the rule of each setting.
        examples: valid values of the settings.
        flag: the flag that sets a setting, without the setting's name.

    Raises:
        UserError: names the first setting that has an invalid value, and a valid one.
    """
    for key, rule in rules.items():
        if not rule.fits(values[key]):
            value = tuple(values[key]) if isinstance(values[key], list) else values[key]
            name = f"{flag.removeprefix('--').removeprefix('config.')}{key}"
            remedy = _remedy(f"{flag}{key}", examples[key])
            raise UserError(f"{name} is {value!r}; expected {rule.expected}; {remedy}")


def _remedy(flag: str, example: Any) -> str:
    """Returns what to do about a setting that has an invalid value."""
    if example in (None, ""):
        return f"set {flag} to such a value, or leave it out"
    shown = ",".join(map(str, example)) if isinstance(example, list) else example
    return f"for example, set {flag}={shown}"


# The settings of `config.model` that only model.size=custom uses.
CUSTOM_ONLY = ("width", "depth", "heads", "stage_depths", "stage_heads", "block")


def check_used(
    config: ml_collections.ConfigDict,
    given: Iterable[str],
    made: ml_collections.ConfigDict | None = None,
) -> None:
    """Checks that the settings on the command line have an effect.

    Args:
        config: the config of the run.
        given: the dotted names of the settings on the command line.
        made: the config with which the run began, if it is resumed. A setting that has the same
            value there is accepted, so that the command can be repeated.

    Raises:
        UserError: names the first setting that has no effect, and the reason.
    """
    check_values(config)
    reasons, flat = without_use(config), flatten(config)
    kept = flatten(made or {})
    for name in given:
        if name in reasons and (name not in kept or kept[name] != flat[name]):
            raise UserError(f"--config.{name} would have no effect: {reasons[name]}")


def without_use(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the settings that have no effect because of others, and the reason for each."""
    flat, model = flatten(config), config.model
    reasons = {}
    for name in config.data:
        if reason := named.without_use(config.data.source, name):
            reasons[f"data.{name}"] = reason
    if model.size != "custom":
        for name in CUSTOM_ONLY:
            reasons[f"model.{name}"] = (
                f"it is for model.size=custom, but model.size is {model.size}"
            )
    for name in FAMILIES[model.family].unused:
        reasons[f"model.{name}"] = f"model.family={model.family} does not use it"
    for key in flat:
        steps = f"{key.removesuffix('epochs')}steps"
        if key.endswith("epochs") and flat[steps] is not None:
            reasons[key] = f"{steps} is {flat[steps]}, which takes precedence"
    for name in METHODS.keys() - {config.method}:
        for key in flatten(config[name], f"{name}."):
            reasons[key] = f"method is {config.method}"
    if config.head.layers < 2:
        for name in ("hidden", "batch_norm", "batch_norm_views"):
            reasons[f"head.{name}"] = f"head.layers is {config.head.layers}, so that none is hidden"
    elif not config.head.batch_norm:
        reasons["head.batch_norm_views"] = "head.batch_norm is false"
    reasons |= optim.without_use(config) | method_of(config).without_use(config)
    if not config.augment.local_crops:
        for name in ("local_size", "local_scale"):
            reasons[f"augment.{name}"] = "augment.local_crops is 0"
    return reasons


def check_length(config: ml_collections.ConfigDict) -> None:
    """Checks that a run has at least one step."""
    if config.steps is None and not config.epochs:
        raise UserError(
            f"the run would have no steps: steps is none and epochs is {config.epochs}; set "
            "--config.steps or --config.epochs to more than 0 (steps takes precedence)"
        )


def check_trace(profile_steps: tuple[int, int], steps: int) -> None:
    """Checks that the steps to trace, the first and the last, are in a run of `steps`."""
    first, last = profile_steps
    if last > steps:
        raise UserError(
            f"profile_steps is {first},{last}, but the run has {steps} steps and the trace would "
            f"not be complete; choose steps from 1 to {steps}"
        )


def check_sizes(config: ml_collections.ConfigDict) -> None:
    """Checks that images consist of whole tokens, and that the network can have its size."""
    size, family = size_of(config.model), FAMILIES[config.model.family]
    side = token_side(config.model)
    has_patch = "patch" not in family.unused
    unit = f"model.patch {side}" if has_patch else f"the {side} pixels of a token"
    sizes = ["augment.global_size", "eval.crop"]
    if config.augment.local_crops:
        sizes.append("augment.local_size")
    for key in sizes:
        pixels = flatten(config)[key]
        if not family.patches:
            if pixels < side and key == "augment.global_size":
                raise UserError(
                    f"{key} is {pixels}; model.family={config.model.family} needs {side} pixels or "
                    "more"
                )
        elif pixels % side:
            below, above = pixels // side * side, (pixels // side + 1) * side
            raise UserError(
                f"{key} {pixels} is not a multiple of {unit}; "
                f"choose {f'{below} or ' if below else ''}{above}"
                f"{', or another patch' if has_patch else ''}"
            )
    if config.eval.resize < config.eval.crop:
        raise UserError(
            f"eval.resize {config.eval.resize} is smaller than eval.crop {config.eval.crop}; "
            "the crop is taken from the resized image"
        )
    family.check_size(size)


def check_family(config: ml_collections.ConfigDict) -> None:
    """Checks that a config requests nothing that the networks of its family cannot do."""
    model, family = config.model, FAMILIES[config.model.family]
    if model.attention == "cudnn" and not family.cudnn:
        raise UserError(
            f"model.attention is cudnn, which model.family={model.family} does not support; "
            "choose auto"
        )
    if model.pool != "cls" and "pool" in family.unused:
        raise UserError(
            f"model.pool is {model.pool}, but model.family={model.family} always averages its "
            "tokens, so model.pool must be cls there; set it to cls in the config file, or choose "
            "model.family=vit"
        )
    if not family.patches:
        check_cls_only(config)


def cls_only_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the settings of a run without patches and drop path, such as that of a ResNet."""
    return {**method_of(config).cls_only, "model.drop_path": 0.0}


def check_cls_only(config: ml_collections.ConfigDict) -> None:
    """Checks that the settings which a ResNet would ignore are switched off."""
    flat, expected = flatten(config), cls_only_settings(config)
    others = {key: value for key, value in expected.items() if flat[key] != value}
    if others:
        raise UserError(
            f"model.family={config.model.family} learns from [CLS] only: it has no patches to mask "
            f"and no drop path, but {', '.join(f'{key} is {flat[key]}' for key in others)}; set "
            + " ".join(f"--config.{key}={value}" for key, value in others.items())
        )
