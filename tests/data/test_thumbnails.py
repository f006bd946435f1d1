"""Sizes of images whose proportions are kept, and where their pixels come from."""

import numpy as np
import pytest
from PIL import Image

from sop_jax.data.thumbnails import cut, scaled, thumbnail


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (64, 64), (20, 10)])
def test_a_thumbnail_is_never_enlarged_and_keeps_its_proportions(shape):
    image = noise(*shape)
    small = thumbnail(image, 64)
    assert max(small.shape[:2]) == min(64, max(shape))
    assert small.shape[0] / small.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.1)
    if max(shape) <= 64:
        np.testing.assert_array_equal(small, image)


def test_pixels_do_not_depend_on_those_that_are_cut_off():
    """Coordinates follow the scale, so that an image can be cut before or after it is scaled."""
    image = noise(50, 41)
    for scale in (1.0, 1 / 2**0.5, 0.5):
        whole, part = scaled(image, scale), scaled(image[:40, :30], scale)
        assert whole.shape == (int(50 * scale), int(41 * scale), 3)
        np.testing.assert_array_equal(part, whole[: part.shape[0], : part.shape[1]])


def test_half_the_size_is_the_mean_of_four_pixels():
    image = noise(6, 8)
    means = image.reshape(3, 2, 4, 2, 3).astype(np.float32).mean(axis=(1, 3))
    np.testing.assert_allclose(scaled(image, 0.5), means, atol=1e-4)


def test_agrees_with_a_second_implementation_where_the_sizes_are_exact():
    image = noise(40, 80)
    ours = scaled(image, 0.5)
    grey = Image.fromarray(image[..., 0]).resize((40, 20), Image.Resampling.BOX)
    assert np.abs(ours[..., 0] - np.asarray(grey)).max() <= 1


def test_cut():
    assert cut(noise(17, 31), 8).shape == (16, 24, 3)
    assert cut(noise(7, 31), 8).size == 0
