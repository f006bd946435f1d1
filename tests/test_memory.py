"""The memory is the newest rows by age, whatever was pushed in which portions."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.sop.memory import Memory, init_memory, push

SIZE, DIM = 7, 3


def by_age(memory: Memory) -> tuple[np.ndarray, np.ndarray]:
    """Rows and indices, oldest first."""
    shift = -int(memory.next)
    return np.roll(memory.rows, shift, axis=0), np.roll(memory.image, shift)


@pytest.mark.parametrize("seed", range(3))
def test_is_a_queue_for_pushes_of_any_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    memory = init_memory(jax.random.key(seed), SIZE, DIM)
    queue = collections.deque(zip(memory.rows, memory.image, strict=True), maxlen=SIZE)
    pushed = 0
    for batch in [SIZE, *rng.integers(1, SIZE + 1, 20)]:
        rows = rng.normal(size=(batch, DIM)).astype(np.float32)
        index = rng.integers(0, 1000, batch).astype(np.int32)
        memory = push(memory, jnp.asarray(rows), jnp.asarray(index))
        queue.extend(zip(rows, index, strict=True))
        pushed += batch
        found_rows, found_index = by_age(memory)
        np.testing.assert_array_equal(found_rows, np.stack([row for row, _ in queue]))
        np.testing.assert_array_equal(found_index, [int(i) for _, i in queue])
        assert memory.filled == min(pushed, SIZE)


def test_next_is_the_oldest_row_after_a_wrap_around() -> None:
    memory = init_memory(jax.random.key(0), SIZE, DIM)
    for start in (0, 5):
        rows = jnp.full((5, DIM), float(start))
        memory = push(memory, rows, start + jnp.arange(5, dtype=jnp.int32))
    assert memory.next == 3
    assert memory.image.tolist() == [7, 8, 9, 3, 4, 5, 6]


def test_filled_counts_rows_of_images_alone() -> None:
    memory = init_memory(jax.random.key(0), SIZE, DIM)
    assert memory.filled == 0
    assert set(memory.image.tolist()) == {-1}
    memory = push(memory, jnp.zeros((2, DIM)), jnp.arange(2, dtype=jnp.int32))
    assert memory.filled == 2
    assert (memory.image == -1).sum() == SIZE - 2


def test_refuses_more_rows_than_it_holds() -> None:
    memory = init_memory(jax.random.key(0), SIZE, DIM)
    with pytest.raises(ValueError, match="8 rows do not fit a memory of 7"):
        push(memory, jnp.zeros((SIZE + 1, DIM)), jnp.zeros(SIZE + 1, jnp.int32))


def test_starts_with_different_rows_of_unit_length_in_all_directions() -> None:
    rows = np.asarray(init_memory(jax.random.key(0), 500, 16).rows)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert np.abs(rows.mean(0)).max() < 0.05
    cosine = rows @ rows.T - np.eye(len(rows))
    assert cosine.max() < 0.95
