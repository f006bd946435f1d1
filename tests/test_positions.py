"""The resize of positional embeddings, by its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.positions import cubic, resize_matrix, resize_positions


def table(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def test_its_own_grid_is_left_as_it_is() -> None:
    positions = table(3, 4, 2)
    np.testing.assert_array_equal(resize_positions(positions, (3, 4), "ibot"), positions)


@pytest.mark.parametrize(("size", "new_size"), [(14, 6), (6, 14), (5, 1), (1, 4), (14, 15)])
def test_equal_positions_stay_equal(size: int, new_size: int) -> None:
    matrix = resize_matrix(size, new_size, "ibot")
    assert matrix.shape == (new_size, size)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


def sample(values: np.ndarray, place: float) -> float:
    """PyTorch's bicubic at one place: four taps, borders repeated."""
    below = int(np.floor(place))
    t = place - below
    far = [-0.75 * (x**3 - 5 * x**2 + 8 * x - 4) for x in (t + 1, 2 - t)]
    near = [1.25 * x**3 - 2.25 * x**2 + 1 for x in (t, 1 - t)]
    taps = values[np.clip(np.arange(below - 1, below + 3), 0, len(values) - 1)]
    return float(np.dot(taps, [far[0], near[0], near[1], far[1]]))


@pytest.mark.parametrize(("size", "new_size"), [(14, 6), (6, 14)])
def test_samples_at_a_scale_with_a_tenth_more(size: int, new_size: int) -> None:
    values = np.random.default_rng(0).normal(size=size)
    places = [(i + 0.5) * size / (new_size + 0.1) - 0.5 for i in range(new_size)]
    expected = [sample(values, place) for place in places]
    np.testing.assert_allclose(resize_matrix(size, new_size, "ibot") @ values, expected, atol=1e-9)


def test_borders_repeat() -> None:
    edge = np.array([1.0, 0, 0, 0, 0, 0])
    assert resize_matrix(6, 12, "ibot")[0] @ edge > 1  # the outer taps fall on the border as well


def test_kernel_interpolates_and_sums_to_one() -> None:
    np.testing.assert_allclose(cubic(np.array([0.0, 1.0, -1.0, 2.0, 3.0])), [1, 0, 0, 0, 0])
    np.testing.assert_allclose(cubic(np.array([0.5, 1.5])), [0.59375, -0.09375])


def test_rows_and_columns_are_resized_each_by_its_own_scale() -> None:
    positions = table(4, 5, 3)
    resized = resize_positions(positions, (2, 9), "ibot")
    expected = np.einsum(
        "ih,jw,hwd->ijd",
        resize_matrix(4, 2, "ibot"),
        resize_matrix(5, 9, "ibot"),
        np.asarray(positions, float),
    )
    assert resized.dtype == jnp.float32
    np.testing.assert_allclose(resized, expected, atol=1e-5)
