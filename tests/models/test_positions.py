"""Resizing of positional embeddings, compared with its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.positions import RULES, cubic, resize_matrix, resize_positions


def table(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("rule", RULES)
def test_its_own_grid_is_left_as_it_is(rule: str) -> None:
    positions = table(3, 4, 2)
    np.testing.assert_array_equal(resize_positions(positions, (3, 4), rule), positions)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "new_size"), [(14, 6), (6, 14), (5, 1), (1, 4), (14, 15)])
def test_equal_positions_stay_equal(size: int, new_size: int, rule: str) -> None:
    matrix = resize_matrix(size, new_size, rule)
    assert matrix.shape == (new_size, size)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


def sample(values: np.ndarray, place: float) -> float:
    """PyTorch's bicubic interpolation at one position: four taps, with repeated borders."""
    below = int(np.floor(place))
    t = place - below
    far = [-0.75 * (x**3 - 5 * x**2 + 8 * x - 4) for x in (t + 1, 2 - t)]
    near = [1.25 * x**3 - 2.25 * x**2 + 1 for x in (t, 1 - t)]
    taps = values[np.clip(np.arange(below - 1, below + 3), 0, len(values) - 1)]
    return float(np.dot(taps, [far[0], near[0], near[1], far[1]]))


@pytest.mark.parametrize(("size", "new_size"), [(14, 6), (6, 14)])
@pytest.mark.parametrize(("rule", "more"), [("ibot", 0.1), ("size", 0.0)])
def test_samples_at_a_scale_of_the_size_or_a_tenth_more(
    size: int, new_size: int, rule: str, more: float
) -> None:
    values = np.random.default_rng(0).normal(size=size)
    places = [(i + 0.5) * size / (new_size + more) - 0.5 for i in range(new_size)]
    expected = [sample(values, place) for place in places]
    np.testing.assert_allclose(resize_matrix(size, new_size, rule) @ values, expected, atol=1e-9)


def test_antialiasing_averages_over_what_a_sample_stands_for() -> None:
    """Half as many samples: a kernel with taps at odd quarters, twice as wide, of sum one."""
    middle = resize_matrix(16, 8, "antialiased")[4]
    kernel = cubic(np.arange(-7, 8, 2) / 4, a=-0.5)
    np.testing.assert_allclose(middle[5:13], kernel / kernel.sum(), atol=1e-12)
    assert not middle[:5].any() and not middle[13:].any()
    # At the border, the remaining taps of the kernel are normalized.
    first = resize_matrix(16, 8, "antialiased")[0]
    np.testing.assert_allclose(first[:5], kernel[3:] / kernel[3:].sum(), atol=1e-12)


@pytest.mark.parametrize("size", [(3, 4), (7, 16), (1, 9), (6, 6)])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("size", {"antialias": False}),
        ("antialiased", {"antialias": True}),
    ],
)
def test_rules_are_pytorchs(size: tuple[int, int], rule: str, options: dict[str, bool]) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch to compare with")
    positions = table(6, 9, 3)
    image = torch.tensor(np.asarray(positions)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(
        image, size=size, mode="bicubic", align_corners=False, **options
    )
    found = resize_positions(positions, size, rule)
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0), atol=1e-5)


def test_borders_repeat() -> None:
    edge = np.array([1.0, 0, 0, 0, 0, 0])
    assert resize_matrix(6, 12, "ibot")[0] @ edge > 1  # the outer taps also fall on the border


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
