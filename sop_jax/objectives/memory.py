"""First-in-first-out stores of teacher embeddings: E_C and E_P of SOP (section 2.2.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.models.head import unit


class Memory(NamedTuple):
    """A first-in-first-out store of N rows, as a ring of T slots in each of L lanes, N <= L T.

    Each batch overwrites the oldest slot, with image i in lane i. Lanes are sharded as the images
    of a batch are, so that a push needs no communication, and their number does not depend on the
    number of devices. Where L does not divide N, the first lanes of the oldest slot hold rows that
    are too old; `live` tells them apart.

    Attributes:
        rows: unit embeddings in float32.
        image: the index in the data set of the image of each row; -1 for the initial random rows.
        next: the slot to overwrite next, which is the oldest.
        filled: the number of rows that came from images, at most L T.
    """

    rows: Float[Array, "L T d"]
    image: Int[Array, "L T"]
    next: Int[Array, ""]
    filled: Int[Array, ""]


def init_memory(key: Key[Array, ""], size: int, dim: int, lanes: int) -> Memory:
    """Returns a memory of random unit rows.

    Args:
        key: draws the rows.
        size: N, the rows to hold; rounded up to a multiple of `lanes` in the memory's shape.
        dim: d, the numbers in a row.
        lanes: L, usually the images of a batch.
    """
    slots = -(-size // lanes)
    return Memory(
        rows=unit(jax.random.normal(key, (lanes, slots, dim))),
        image=jnp.full((lanes, slots), -1, jnp.int32),
        next=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def push(memory: Memory, rows: Float[Array, "B d"], index: Int[Array, " B"]) -> Memory:
    """Returns the memory with its B oldest rows replaced.

    Each lane takes B / L consecutive rows. With one row per lane, or with only one lane, the last
    of `rows` becomes the newest.

    Args:
        memory: the memory to add to.
        rows: the new rows.
        index: the index in the data set of the image of each row.

    Raises:
        ValueError: B is not a multiple of L, or exceeds L T.
    """
    lanes, slots, dim = memory.rows.shape
    batch = len(rows)
    if batch % lanes or batch > lanes * slots:
        raise ValueError(
            f"{batch} rows do not fit a memory with {lanes} lanes of {slots} slots: expected a "
            f"multiple of {lanes}, at most {lanes * slots}"
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
    """Returns all rows, lane by lane, in the order to which `by_age` and `live` refer."""
    return memory.rows.reshape(-1, memory.rows.shape[-1])


def by_age(memory: Memory, size: int, positions: Int[Array, "*K"]) -> Int[Array, "*K"]:
    """Returns the indices in `flat_rows` of rows given by age.

    Args:
        memory: the memory.
        size: N, the newest rows among which positions are counted.
        positions: among these rows, 0 for the oldest and `size` - 1 for the newest.
    """
    lanes, slots = memory.image.shape
    positions = positions + lanes * slots - size
    return positions % lanes * slots + (memory.next + positions // lanes) % slots


def live(memory: Memory, size: int) -> Bool[Array, " LT"]:
    """Returns which of `flat_rows` are among the `size` newest."""
    lanes, slots = memory.image.shape
    age = (jnp.arange(slots) - memory.next) % slots  # slots since the oldest
    place = age * lanes + jnp.arange(lanes)[:, None]
    return (place >= lanes * slots - size).reshape(-1)


def newest_first(
    memory: Memory, size: int
) -> tuple[Float[Array, "{size} d"], Int[Array, " {size}"]]:
    """Returns the `size` newest rows, beginning with the newest, and the image of each."""
    order = by_age(memory, size, jnp.arange(size)[::-1])
    return flat_rows(memory)[order], memory.image.reshape(-1)[order]
