"""Windows that slide over an image, and the image that their logits are merged to."""

import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.evaluation.sliding import Window, counts, merge, windows


@pytest.mark.parametrize("height, width", [(5, 9), (8, 8), (8, 21), (17, 23), (30, 8), (3, 40)])
def test_windows_cover_every_pixel_and_are_inside(height, width):
    found = windows(height, width, crop=8, stride=5)
    assert counts(found, (height, width)).min() >= 1
    for top, left, h, w in found:
        assert (h, w) == (min(height, 8), min(width, 8))
        assert 0 <= top <= height - h and 0 <= left <= width - w


def test_the_last_windows_are_pushed_back_inside():
    assert windows(8, 15, crop=8, stride=5) == [
        *(Window(0, 0, 8, 8), Window(0, 5, 8, 8), Window(0, 7, 8, 8))
    ]


def test_windows_of_an_image_merge_to_the_image():
    """Windows that agree where they overlap must give back what they were cut from."""
    image = np.random.default_rng(0).normal(size=(11, 17, 3)).astype(np.float32)
    found = tuple(windows(11, 17, crop=6, stride=4))
    parts = jnp.stack([image[t : t + h, x : x + w] for t, x, h, w in found])
    merged = merge(parts, found, (11, 17), (11, 17))
    np.testing.assert_allclose(merged, image, atol=1e-6)
