"""The memories E_C and E_P: first-in-first-out stores of teacher embeddings (section 2.2.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.models.head import unit


class Memory(NamedTuple):
    """A ring of slots in each of L lanes; holds the N newest rows, N at most L T.

    A batch enters by one slot, image i in lane i. Lanes are sharded as the images of a batch are,
    so that a push sends nothing, and their number is the same on any number of devices. Where L
    does not divide N, the first lanes of the oldest slot hold rows that are too old; see `live`.

    Attributes:
        rows: unit embeddings, float32.
        image: the data set's index of the image that a row came from; -1 for the random start.
        next: the slot to overwrite next, which is the oldest.
        filled: how many rows came from images, at most L T.
    """

    rows: Float[Array, "L T d"]
    image: Int[Array, "L T"]
    next: Int[Array, ""]
    filled: Int[Array, ""]


def init_memory(key: Key[Array, ""], size: int, dim: int, lanes: int) -> Memory:
    """Random unit rows, at least `size` of them."""
    slots = -(-size // lanes)
    return Memory(
        rows=unit(jax.random.normal(key, (lanes, slots, dim))),
        image=jnp.full((lanes, slots), -1, jnp.int32),
        next=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def push(memory: Memory, rows: Float[Array, "B d"], index: Int[Array, " B"]) -> Memory:
    """The memory with its B oldest rows replaced.

    B is a multiple of the lanes, and each of them takes B / L consecutive rows: with one row a
    lane, or with one lane, the last given row becomes the newest.
    """
    lanes, slots, dim = memory.rows.shape
    batch = len(rows)
    if batch % lanes or batch > lanes * slots:
        raise ValueError(
            f"{batch} rows do not fit {lanes} lanes of {slots} slots: expected a multiple of "
            f"{lanes}, at most {lanes * slots}"
        )
    new = batch // lanes
    taken = (memory.next + jnp.arange(new)) % slots
    return Memory(
        rows=memory.rows.at[:, taken].set(rows.reshape(lanes, new, dim), unique_indices=True),
        image=memory.image.at[:, taken].set(index.reshape(lanes, new), unique_indices=True),
        next=(memory.next + new) % slots,
        filled=jnp.minimum(memory.filled + batch, lanes * slots),
    )


def flat_rows(memory: Memory) -> Float[Array, "LT d"]:
    """All rows, lane by lane; their indices are those that `by_age` gives and `live` marks."""
    return memory.rows.reshape(-1, memory.rows.shape[-1])


def by_age(memory: Memory, size: int, places: Int[Array, "*K"]) -> Int[Array, "*K"]:
    """Flat indices of rows given by their place among the `size` newest, 0 for the oldest."""
    lanes, slots = memory.image.shape
    places = places + lanes * slots - size
    return places % lanes * slots + (memory.next + places // lanes) % slots


def live(memory: Memory, size: int) -> Bool[Array, " LT"]:
    """Which of the flat rows are among the `size` newest."""
    lanes, slots = memory.image.shape
    age = (jnp.arange(slots) - memory.next) % slots  # slots since the oldest
    place = age * lanes + jnp.arange(lanes)[:, None]
    return (place >= lanes * slots - size).reshape(-1)
