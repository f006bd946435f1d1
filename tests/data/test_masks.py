"""Masks: how much of any grid they cover, and their shapes."""

from types import SimpleNamespace

import numpy as np
import pytest

from sop_jax.data.masks import block_mask, inverse_block_mask, most_masked, view_mask


def config(
    kind: str = "block", ratio: tuple[float, float] = (0.3, 0.3), none: float = 0.0
) -> SimpleNamespace:
    return SimpleNamespace(kind=kind, ratio=ratio, none=none)


def draws(grid: tuple[int, int], c: SimpleNamespace, count: int = 4000) -> np.ndarray:
    """Returns masks, bool [count, high, wide]."""
    rng = np.random.default_rng(0)
    return np.stack([view_mask(grid, rng, c) for _ in range(count)])


@pytest.mark.parametrize(
    "side, ratio, none, mean, tolerance",
    [
        (14, (0.3, 0.3), 0.0, 0.292, 0.002),
        (7, (0.3, 0.3), 0.0, 0.284, 0.002),
        (14, (0.1, 0.5), 0.0, 0.294, 0.008),
        (14, (0.1, 0.5), 0.5, 0.145, 0.011),
        (7, (0.1, 0.5), 0.5, 0.143, 0.011),
    ],
)
def test_block_masks_cover_as_much_as_ibots(side, ratio, none, mean, tolerance):
    masks = draws((side, side), config(ratio=ratio, none=none))
    assert masks.dtype == bool and masks.shape[1:] == (side, side)
    covered = masks.mean((1, 2))
    assert abs(covered.mean() - mean) < tolerance
    assert covered.max() <= ratio[1]
    assert abs((covered == 0).mean() - none) < 0.03


def test_random_masks_cover_exactly():
    for ratio, count in ((0.7, 137), (0.3, 58)):
        masks = draws((14, 14), config("random", (ratio, ratio)), 200)
        assert (masks.sum((1, 2)) == count).all()
        assert masks.any(0).all()  # every patch is masked at some time
    rectangular = draws((3, 5), config("random", (0.5, 0.5)), 50)
    assert (rectangular.sum((1, 2)) == 7).all()


@pytest.mark.parametrize("grid", [(16, 16), (4, 4), (1, 8), (30, 2), (2, 30), (1, 1)])
def test_inverse_block_masks_leave_one_block_anywhere(grid):
    rng, patches = np.random.default_rng(0), grid[0] * grid[1]
    for ratio in (0.0, 0.3, 0.65, 1.0):
        masks = np.stack([inverse_block_mask(grid, rng, ratio) for _ in range(300)])
        assert (masks.sum((1, 2)) == int(ratio * patches)).all()
        if 0 < int(ratio * patches) < patches:
            assert masks.any(0).all() and (~masks).any(0).all()


def test_the_block_that_an_inverse_mask_leaves_is_a_rectangle_on_a_torus():
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(300):
        visible = ~inverse_block_mask((16, 16), rng, 0.65)
        rows, columns = visible.any(1).sum(), visible.any(0).sum()
        assert 0 <= rows * columns - visible.sum() < columns  # the last row may be shorter
        assert (np.diff(np.r_[visible.any(1), visible.any(1)[0]].astype(int)) == 1).sum() <= 1
        shapes.add((rows, columns))
    assert len(shapes) > 5
    heights = [rows for rows, _ in shapes]
    assert min(heights) < 7 and max(heights) > 14


def test_ratio_is_drawn_for_every_view():
    covered = draws((14, 14), config("random", (0.1, 0.5)), 2000).mean((1, 2))
    deciles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(covered, deciles), 0.1 + 0.4 * deciles, atol=0.015)


def test_block_masks_are_made_of_blocks():
    """Masked patches form blocks: they have far more masked neighbours than in random masks."""

    def together(masks: np.ndarray) -> float:
        return (masks[:, :, 1:] & masks[:, :, :-1]).mean() / masks.mean()

    blocks = together(draws((14, 14), config(), 500))
    assert blocks > 0.65 > 0.35 > together(draws((14, 14), config("random"), 500))


@pytest.mark.parametrize("grid", [(2, 2), (2, 4), (4, 4), (4, 6), (14, 10)])
def test_small_and_oblong_grids_end_and_mask_something(grid):
    rng = np.random.default_rng(0)
    for ratio in (0.3, 0.5, 0.7):
        masks = np.stack([block_mask(grid, rng, ratio) for _ in range(500)])
        assert masks.mean((1, 2)).max() <= ratio
        assert masks.any((1, 2)).mean() > 0.95  # ten tries can all fail


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (5, 1)])
def test_grids_one_patch_wide_stay_unmasked(grid):
    assert not draws(grid, config(ratio=(0.5, 0.5)), 20).any()


def test_nothing_to_mask():
    assert not draws((4, 4), config(ratio=(0.0, 0.0)), 20).any()
    assert not draws((14, 14), config(none=1.0), 20).any()
    assert not draws((2, 2), config("random", (0.2, 0.2)), 20).any()


def test_same_generator_same_mask():
    for kind in ("block", "random"):
        first, second = draws((14, 14), config(kind), 5), draws((14, 14), config(kind), 5)
        np.testing.assert_array_equal(first, second)
        assert len({mask.tobytes() for mask in first}) == 5


@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (4, 4), (2, 2), (10, 10), (16, 16)])
@pytest.mark.parametrize("ratio", [(0.3, 0.3), (0.1, 0.5), (0.7, 0.7), (0.0, 0.0)])
def test_no_mask_is_larger_than_the_largest(
    kind: str, grid: tuple[int, int], ratio: tuple[float, float]
) -> None:
    c = config(kind, ratio)
    counts = draws(grid, c, 200).sum((1, 2))
    most = most_masked(grid, c)
    assert counts.max() <= most <= max(1, ratio[1] * grid[0] * grid[1] + 1e-5)
    if kind == "random" and ratio[0] == ratio[1] > 0:
        assert counts.max() == most or most == 1
