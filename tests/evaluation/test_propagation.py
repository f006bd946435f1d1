"""Propagated masks are those of the definition, for any sizes of frames and neighbourhoods."""

import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.evaluation import features as features_lib
from sop_jax.evaluation import propagation
from sop_jax.evaluation.propagation import Contexts


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def defined(
    contexts: np.ndarray,
    masks: np.ndarray,
    features: np.ndarray,
    radius: int,
    top_k: int,
    temperature: float,
) -> np.ndarray:
    """Computes the masks of a frame token by token."""
    _, h, w, _ = contexts.shape
    found = np.zeros((h, w, masks.shape[-1]))
    for y in range(h):
        for x in range(w):
            rows = slice(max(0, y - radius), y + radius + 1)
            columns = slice(max(0, x - radius), x + radius + 1)
            cosines = (contexts[:, rows, columns] @ features[y, x]).reshape(-1)
            kth = np.sort(cosines)[::-1][:top_k][-1]
            weights = np.where(cosines >= kth, np.exp(cosines / temperature), 0)
            found[y, x] = weights @ masks[:, rows, columns].reshape(len(weights), -1)
            found[y, x] /= weights.sum()
    return found


@pytest.mark.parametrize(
    "n, h, w, radius, top_k",
    [
        (8, 7, 9, 2, 5),  # columns that do not fill the last block
        (3, 34, 5, 1, 5),  # two blocks of rows, and a frame that is higher than wide
        (2, 3, 4, 12, 5),  # neighbourhoods that are larger than the frame
        (1, 4, 4, 0, 5),  # fewer neighbours than top_k
        (2, 5, 6, 3, 1),
    ],
)
def test_masks_are_those_of_the_definition(n: int, h: int, w: int, radius: int, top_k: int) -> None:
    rng = np.random.default_rng(n)
    contexts, features = (unit(rng.normal(size=shape)) for shape in [(n, h, w, 6), (h, w, 6)])
    masks = rng.random((n, h, w, 3))
    empty = 2  # rows that are not filled have no effect
    arrays = [
        jnp.asarray(np.concatenate([x, np.full((empty, *x.shape[1:]), 1e3)]), jnp.float32)
        for x in (contexts, masks)
    ]
    found = propagation.propagate(
        Contexts(*arrays, jnp.int32(n)),
        jnp.asarray(3 * features, jnp.float32),  # their length has no effect
        radius,
        top_k,
        0.1,
    )
    expected = defined(contexts, masks, features, radius, top_k, 0.1)
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5)


def test_neighbours_that_tie_with_the_last_one_are_kept() -> None:
    features = jnp.ones((1, 4, 2))
    masks = jnp.arange(4.0).reshape(1, 1, 4, 1)
    contexts = Contexts(features_lib.unit(features)[None], masks, jnp.int32(1))
    found = propagation.propagate(contexts, features, 3, 2, 0.1)
    np.testing.assert_allclose(np.asarray(found), np.full((1, 4, 1), 1.5), rtol=1e-6)


def test_equal_values_are_counted_apart() -> None:
    columns = np.array([[1, 5, 5, 2, 5], [3, 1, 3, 2, 0], [7, -np.inf, -np.inf, 7, 1]], np.float32)
    for k in range(1, 6):
        largest, kth = propagation.largest_and_kth(jnp.asarray(columns.T), k)
        np.testing.assert_array_equal(largest, columns.max(1))
        np.testing.assert_array_equal(kth, np.sort(columns, 1)[:, -k])


def test_a_low_temperature_does_not_overflow() -> None:
    features = features_lib.unit(
        jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4)).astype(np.float32))
    )
    masks = jnp.arange(9.0).reshape(1, 3, 3, 1)
    contexts = Contexts(features[None], masks, jnp.int32(1))
    found = propagation.propagate(contexts, features, 2, 5, 1e-4)  # e^10000 without the maximum
    np.testing.assert_allclose(np.asarray(found), np.asarray(masks[0]))


def test_contexts_are_the_first_frame_and_the_last_ones() -> None:
    frames = [jnp.full((1, 1, 1), float(i)) for i in range(6)]
    contexts = propagation.start(jnp.ones((1, 1, 2)), frames[0], 3)
    kept = []
    for frame in frames[1:]:
        contexts = propagation.remember(contexts, jnp.ones((1, 1, 2)), frame)
        kept.append(sorted(np.asarray(contexts.masks).ravel()[: int(contexts.seen)].tolist()))
    assert kept == [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5]]


def test_each_object_is_scaled_before_the_largest_wins() -> None:
    soft = np.zeros((1, 3, 3), np.float32)
    soft[..., 0] = [0.9, 0.8, 0.7]
    soft[..., 1] = [0.0, 0.1, 0.2]  # the largest share of object 1, though never the largest one
    found = np.asarray(propagation.decide(jnp.asarray(soft), 1))
    assert found.tolist() == [[0, 0, 1]]  # equal shares go to the smaller number
    assert propagation.decide(jnp.asarray(soft), 4).shape == (4, 12)


def test_masks_become_hard() -> None:
    soft = jnp.asarray([[[0.2, 0.5, 0.3], [0.6, 0.0, 0.4]]])
    assert propagation.harden(soft).tolist() == [[[0, 1, 0], [1, 0, 0]]]
    objects = np.array([[0, 2]], np.uint8)
    assert propagation.one_hot(objects).tolist() == [[[1, 0, 0], [0, 0, 1]]]
