"""Durations, schedules and the optimizer (iBOT's recipe)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float

Schedule = Callable[[Any], Float[Array, ""]]


def duration(config: ml_collections.ConfigDict, name: str, steps_per_epoch: float) -> int:
    """Steps of `config.<name>steps`, or of `config.<name>epochs` where the former is not set."""
    steps = config[f"{name}steps"]
    return steps if steps is not None else round(config[f"{name}epochs"] * steps_per_epoch)


def cosine(ends: tuple[float, float], steps: int) -> Schedule:
    """Half a cosine from the first end at step 0 towards the second at step `steps`."""
    start, end = ends
    return lambda step: (
        end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * jnp.clip(step / max(steps, 1), 0, 1)))
    )


def ramp(ends: tuple[float, float], steps: int) -> Schedule:
    """Linear from the first end at step 0 to the second at step `steps - 1`, then constant."""
    start, end = ends if steps > 0 else (ends[1], ends[1])
    return lambda step: start + (end - start) * jnp.clip(step / max(steps - 1, 1), 0, 1)


def learning_rate(peak: float, end: float, warmup: int, steps: int) -> Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then a cosine to `end`."""
    rise, fall = ramp((0.0, peak), warmup), cosine((peak, end), steps - warmup)
    return lambda step: jnp.where(step < warmup, rise(step), fall(step - warmup))


def schedules(config: ml_collections.ConfigDict, steps: int, epoch: float) -> dict[str, Schedule]:
    """Everything that changes with the step.

    Args:
        config: of the whole run.
        steps: of the run.
        epoch: steps an epoch.
    """
    optim, sop = config.optim, config.sop
    warmup = min(duration(optim, "warmup_", epoch), steps)
    heating = min(duration(sop, "temperature_warmup_", epoch), steps)
    peak = optim.lr * config.batch_size / 256
    return {
        "lr": learning_rate(peak, optim.min_lr, warmup, steps),
        "weight_decay": cosine(optim.weight_decay, steps),
        "momentum": cosine(optim.momentum, steps),
        "teacher_temperature": ramp(sop.teacher_temperature, heating),
        "student_temperature": lambda step: jnp.float32(sop.student_temperature),
    }


def cut_short(config: ml_collections.ConfigDict, steps: int, epoch: float) -> list[str]:
    """What the settings put beyond the end of the run, for a person, a sentence each.

    Args:
        config: of the whole run.
        steps: of the run.
        epoch: steps an epoch.
    """
    found = []
    for section, name, happens in (
        ("optim", "warmup", "the learning rate rises to its peak"),
        ("sop", "temperature_warmup", "the teacher's temperature goes to its end"),
    ):
        asked = duration(config[section], f"{name}_", epoch)
        if asked > steps:
            found.append(
                f"warning: {section}.{name} is {asked} steps, and the run has {steps}: {happens} "
                f"within these, {asked / steps:.3g} times as steeply. "
                f"--config.{section}.{name}_steps=N sets fewer"
            )
    start = duration(config.mask, "start_", epoch)
    if start >= steps and config.sop.patch.tasks:
        found.append(
            f"warning: masks start at step {start}, and the run has {steps} steps: nothing is ever "
            "masked. --config.mask.start_steps=N starts them earlier"
        )
    return found


def decays(params: Any) -> Any:
    """True for what weight decay applies to: not biases, the scales of norms, running statistics.

    The last have no gradient either, so that AdamW leaves them as they are.

    By name, since the layers are stacked and their biases therefore not 1-D. [CLS], mask token and
    positions decay too, as in iBOT, where they have leading axes of length one.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale", "mean", "var"), params
    )


def clip_each_tensor(limit: float) -> optax.GradientTransformation:
    """Scales each gradient tensor to a norm of at most `limit`, as iBOT's `clip_gradients`.

    A stack of layers counts as a tensor for each layer.
    """

    def clip(path: tuple, gradient: Array) -> Array:
        stacked = any(getattr(key, "key", None) == "blocks" for key in path)
        axes = tuple(range(1 if stacked else 0, gradient.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=axes, keepdims=True))
        return gradient * jnp.minimum(1.0, limit / (norm + 1e-6))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


CLIPS = {"tensor": clip_each_tensor, "global": optax.clip_by_global_norm}


def optimizer(
    config: ml_collections.ConfigDict, schedules: dict[str, Schedule]
) -> optax.GradientTransformation:
    """AdamW behind gradient clipping; `config` is the run's `optim`."""
    clip = CLIPS[config.clip_kind](config.clip) if config.clip else optax.identity()
    adamw = optax.adamw(schedules["lr"], weight_decay=schedules["weight_decay"], mask=decays)
    return optax.chain(clip, adamw)


def run_length(config: ml_collections.ConfigDict, images: int) -> tuple[int, float]:
    """Steps of the run, and steps an epoch of `images` images."""
    epoch = images / config.batch_size
    return max(1, duration(config, "", epoch)), epoch
