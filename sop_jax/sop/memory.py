"""The memories E_C and E_P: first-in-first-out stores of teacher embeddings (section 2.2.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sop_jax.models.head import unit


class Memory(NamedTuple):
    """A ring of the N newest rows.

    Attributes:
        rows: unit embeddings, float32.
        image: the data set's index of the image that a row came from; -1 for the random start.
        next: the row to overwrite next, which is the oldest.
        filled: how many rows came from images.
    """

    rows: Float[Array, "N d"]
    image: Int[Array, " N"]
    next: Int[Array, ""]
    filled: Int[Array, ""]


def init_memory(key: Key[Array, ""], size: int, dim: int) -> Memory:
    """Random unit rows."""
    return Memory(
        rows=unit(jax.random.normal(key, (size, dim))),
        image=jnp.full((size,), -1, jnp.int32),
        next=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def push(memory: Memory, rows: Float[Array, "B d"], index: Int[Array, " B"]) -> Memory:
    """The memory with its B oldest rows replaced, B at most N, the last given row the newest."""
    size, batch = len(memory.rows), len(rows)
    if batch > size:
        raise ValueError(f"{batch} rows do not fit a memory of {size}")
    slots = (memory.next + jnp.arange(batch)) % size
    return Memory(
        rows=memory.rows.at[slots].set(rows, unique_indices=True),
        image=memory.image.at[slots].set(index, unique_indices=True),
        next=(memory.next + batch) % size,
        filled=jnp.minimum(memory.filled + batch, size),
    )
