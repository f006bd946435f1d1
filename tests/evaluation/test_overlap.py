"""The region and boundary measures of masks in cases that can be computed by hand."""

import math

import numpy as np
import pytest

from sop_jax.evaluation import overlap


def square(top: int, left: int, side: int, shape: tuple[int, int] = (40, 40)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_the_region_is_intersection_over_union() -> None:
    one, other = square(0, 0, 10), square(5, 0, 10)
    assert overlap.region(one, other) == 50 / 150
    assert overlap.region(one, square(20, 20, 5)) == 0
    assert overlap.region(one & False, one & False) == 1


def test_a_boundary_within_the_tolerance_is_right() -> None:
    assert math.ceil(overlap.TOLERANCE * math.hypot(40, 40)) == 1  # pixel
    one = square(10, 10, 10)
    assert overlap.boundary(one, one) == 1
    assert overlap.boundary(square(11, 10, 10), one) == 1
    assert 0 < overlap.boundary(square(13, 10, 10), one) < 1
    assert overlap.boundary(square(25, 25, 10), one) == 0


def test_masks_without_a_boundary() -> None:
    one, none = square(10, 10, 10), np.zeros((40, 40), bool)
    assert overlap.boundary(none, none) == overlap.boundary(~none, none) == 1
    assert overlap.boundary(one, none) == overlap.boundary(none, one) == 0


def test_void_and_other_numbers_are_background() -> None:
    truth = np.where(square(0, 0, 10), 1, 0).astype(np.uint8)
    truth[20:, 20:] = 255
    found = np.where(truth == 255, 3, truth).astype(np.uint8)
    assert overlap.measure(found, truth, 2).tolist() == [[1, 1], [1, 1]]  # object 2 is in neither
    found[20:, 20:] = 1
    assert overlap.measure(found, truth, 1)[0] == [100 / 500]


def test_statistics_leave_out_the_first_and_the_last_frame() -> None:
    values = np.array([9.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 9.0])
    mean, recall, decay = overlap.statistics(values)
    assert mean == pytest.approx(0.55)
    assert recall == 4 / 8  # 0.5 is not above 0.5
    assert decay == pytest.approx((0.9 + 0.8 + 0.7) / 3 - (0.4 + 0.3 + 0.2) / 3)


def test_the_decay_of_long_clips() -> None:
    """The official code is wrong beyond 256 frames, because its bins are in eight bits."""
    values = np.concatenate([[0], np.ones(500), np.zeros(300), [0]])
    assert overlap.statistics(values).decay == 1


def test_clips_of_two_frames_have_no_statistics() -> None:
    assert all(math.isnan(value) for value in overlap.statistics(np.ones(2)))
