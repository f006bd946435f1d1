"""The peak rates of a device, which the benchmarks compare with, and the time of a call."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def seconds(function: Callable[[], Any], warmup: int, times: int) -> list[float]:
    """Returns the seconds of each of `times` calls until its results are ready, after a warm-up."""
    taken = []
    for call in range(warmup + times):
        began = time.perf_counter()
        jax.block_until_ready(function())
        if call >= warmup:
            taken.append(time.perf_counter() - began)
    return taken


def matrix_rate(dtype: Any, precision: jax.lax.Precision = jax.lax.Precision.DEFAULT) -> float:
    """Returns the operations per second of large square matrix products on the first device."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    product = jax.jit(
        lambda a, b: jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
    )
    return 2 * side**3 / statistics.median(seconds(lambda: product(a, b), 3, 10))


def bandwidth() -> float:
    """Returns the bytes per second, read and written, of a large copy on the first device."""
    count = 2**26 if jax.default_backend() == "cpu" else 2**30
    x = jnp.arange(count, dtype=jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / statistics.median(seconds(lambda: copy(x), 3, 10))
