"""A memory has the newest rows, whatever its layout; for its devices see test_sharding."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.objectives.memory import Memory, by_age, flat_rows, init_memory, live, push

DIM = 3

# Sizes that the lanes divide or not, one lane, and one slot.
LAYOUTS = [(7, 1), (8, 4), (7, 4), (9, 4), (5, 5), (6, 5), (9, 5), (1, 1), (40, 8)]


def numbered(start: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns rows that contain their own number, and the numbers."""
    index = start + jnp.arange(count, dtype=jnp.int32)
    return jnp.tile(index[:, None].astype(jnp.float32), (1, DIM)), index


def newest(memory: Memory, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and indices, the oldest first."""
    order = by_age(memory, size, jnp.arange(size))
    return np.asarray(flat_rows(memory)[order]), np.asarray(memory.image.reshape(-1)[order])


@pytest.mark.parametrize(("size", "lanes"), LAYOUTS)
def test_is_a_queue_in_every_layout(size: int, lanes: int) -> None:
    memory = init_memory(jax.random.key(0), size, DIM, lanes)
    assert memory.rows.shape == (lanes, -(-size // lanes), DIM)
    queue = collections.deque(zip(*newest(memory, size), strict=True), maxlen=size)
    assert all(image == -1 for _, image in queue)
    for step in range(12):
        rows, index = numbered(step * lanes, lanes)
        memory = push(memory, rows, index)
        queue.extend(zip(np.asarray(rows), np.asarray(index), strict=True))
        found_rows, found_index = newest(memory, size)
        np.testing.assert_array_equal(found_rows, np.stack([row for row, _ in queue]))
        np.testing.assert_array_equal(found_index, [image for _, image in queue])
        alive = np.asarray(live(memory, size))
        assert alive.sum() == size
        assert sorted(np.asarray(memory.image).ravel()[alive]) == sorted(found_index)
        assert memory.filled == min((step + 1) * lanes, memory.image.size)


@pytest.mark.parametrize("seed", range(3))
def test_one_lane_is_a_queue_for_pushes_of_any_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    memory = init_memory(jax.random.key(seed), 7, DIM, lanes=1)
    queue = collections.deque(newest(memory, 7)[1], maxlen=7)
    for batch in [7, *rng.integers(1, 8, 20)]:
        rows, index = numbered(int(rng.integers(1000)), int(batch))
        memory = push(memory, rows, index)
        queue.extend(index.tolist())
        assert newest(memory, 7)[1].tolist() == list(queue)


def test_lanes_take_several_rows_of_a_larger_batch_each() -> None:
    """With two lanes of four slots, after five pushes of four rows, the newest two are left."""
    memory = init_memory(jax.random.key(0), 8, DIM, lanes=2)
    for step in range(5):
        memory = push(memory, *numbered(4 * step, 4))
    assert memory.image.tolist() == [[16, 17, 12, 13], [18, 19, 14, 15]]
    assert sorted(newest(memory, 8)[1].tolist()) == list(range(12, 20))


def test_an_image_stays_in_the_lane_of_its_place_in_the_batch() -> None:
    memory = init_memory(jax.random.key(0), 9, DIM, lanes=3)
    for step in range(4):
        memory = push(memory, *numbered(3 * step, 3))
    np.testing.assert_array_equal(memory.image % 3, [[0] * 3, [1] * 3, [2] * 3])


@pytest.mark.parametrize("batch", [12, 6])
def test_refuses_rows_that_do_not_fit_its_lanes(batch: int) -> None:
    memory = init_memory(jax.random.key(0), 8, DIM, lanes=4)
    with pytest.raises(
        ValueError, match=f"{batch} rows do not fit a memory with 4 lanes of 2 slots.*at most 8"
    ):
        push(memory, *numbered(0, batch))


def test_starts_with_different_rows_of_unit_length_in_all_directions() -> None:
    rows = np.asarray(flat_rows(init_memory(jax.random.key(0), 500, 16, lanes=20)))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert np.abs(rows.mean(0)).max() < 0.05
    cosine = rows @ rows.T - np.eye(len(rows))
    assert cosine.max() < 0.95
