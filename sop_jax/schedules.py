"""Durations, and schedules: values that change with the step, for optimizer and objectives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

Schedule = Callable[[Any], Float[Array, ""]]  # maps a step, counted from 0, to a value


class Length(NamedTuple):
    """The length of a run.

    Attributes:
        steps: the number of steps of the run.
        epoch: the number of steps per epoch, which need not be whole.
    """

    steps: int
    epoch: float


def run_length(config: ml_collections.ConfigDict, images: int) -> Length:
    """Returns the length of a run on a training set of the given number of images."""
    epoch = images / config.batch_size
    return Length(max(1, duration(config, "", epoch)), epoch)


def duration(config: ml_collections.ConfigDict, name: str, steps_per_epoch: float) -> int:
    """Returns a duration in steps: `config.<name>steps`, or, if that is None, from epochs.

    Args:
        config: a section of a config that has `<name>steps` and `<name>epochs`.
        name: the prefix of both settings, such as "warmup_".
        steps_per_epoch: the number of steps per epoch.
    """
    steps = config[f"{name}steps"]
    return steps if steps is not None else round(config[f"{name}epochs"] * steps_per_epoch)


def cosine(ends: tuple[float, float], steps: int) -> Schedule:
    """Returns half a cosine from one end at step 0 to the other at `steps`, then constant."""
    start, end = ends
    return lambda step: (
        end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * jnp.clip(step / max(steps, 1), 0, 1)))
    )


def ramp(ends: tuple[float, float], steps: int) -> Schedule:
    """Returns a line from one end at step 0 to the other at `steps` - 1, then constant."""
    start, end = ends if steps > 0 else (ends[1], ends[1])
    return lambda step: start + (end - start) * jnp.clip(step / max(steps - 1, 1), 0, 1)


def by_epoch(schedule: Schedule, epoch: float) -> Schedule:
    """Returns a schedule of steps that takes the values of a schedule of epochs.

    Args:
        schedule: maps an epoch, counted from 0, to a value.
        epoch: the number of steps per epoch.
    """
    # Half a step later, so that a quotient which is rounded down does not stay in the epoch before.
    return lambda step: schedule(jnp.floor((jnp.float32(step) + 0.5) / epoch))


def later(schedule: Schedule, late: int) -> Schedule:
    """Returns a schedule whose step 0 is step `late` of another."""
    return lambda step: schedule(step + late)


def constant(value: float) -> Schedule:
    """Returns a schedule with the same float32 value at every step."""
    return lambda step: jnp.float32(value)


def learning_rate(peak: float, end: float, warmup: int, steps: int) -> Schedule:
    """Returns a line from 0 to `peak` over `warmup` steps, then half a cosine to `end`."""
    rise, fall = ramp((0.0, peak), warmup), cosine((peak, end), steps - warmup)
    return lambda step: jnp.where(step < warmup, rise(step), fall(step - warmup))


def linear_decay(peak: float, warmup: int, steps: int, ratio: float = 1e-6) -> Schedule:
    """Returns a line from `peak` at step 0 to 0 at `steps`, with a linear warm-up.

    During the warm-up the line is multiplied by a factor that grows from `ratio` at step 0 to 1 at
    `warmup`. This is mmcv's "poly" policy of power 1.
    """

    def value(step: Any) -> Float[Array, ""]:
        line = peak * (1 - jnp.minimum(step, steps) / max(steps, 1))
        return line * (ratio + (1 - ratio) * jnp.minimum(step / max(warmup, 1), 1))

    return value
