"""Durations and schedules: what changes with the step, for the optimizer and for objectives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

Schedule = Callable[[Any], Float[Array, ""]]


class Length(NamedTuple):
    """How long a run is: its steps, and the steps per epoch."""

    steps: int
    epoch: float


def run_length(config: ml_collections.ConfigDict, images: int) -> Length:
    """The length of the run of a config on a training set of so many images."""
    epoch = images / config.batch_size
    return Length(max(1, duration(config, "", epoch)), epoch)


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


def constant(value: float) -> Schedule:
    """The same float32 at every step."""
    return lambda step: jnp.float32(value)


def learning_rate(peak: float, end: float, warmup: int, steps: int) -> Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then a cosine to `end`."""
    rise, fall = ramp((0.0, peak), warmup), cosine((peak, end), steps - warmup)
    return lambda step: jnp.where(step < warmup, rise(step), fall(step - warmup))
