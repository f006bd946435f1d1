"""Draws the masks that hide patches from the student."""

import math
from typing import Any

import numpy as np

TRIES = 10  # attempts per block, before the mask is left as it is
LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)


def view_mask(grid: tuple[int, int], rng: np.random.Generator, mask_config: Any) -> np.ndarray:
    """Draws the mask of one view: empty with probability `none`, else of a ratio ~ U(*ratio).

    Args:
        grid: the number of patches (height, width).
        rng: the generator of all draws.
        mask_config: has `kind` (one of KINDS), `ratio` (low, high) and `none`.

    Returns:
        bool [high, wide], True where masked.
    """
    low, high = mask_config.ratio
    if rng.random() < mask_config.none:
        return np.zeros(grid, bool)
    ratio = low + (high - low) * rng.random()
    return KINDS[mask_config.kind](grid, rng, ratio)


def most_masked(grid: tuple[int, int], mask_config: Any) -> int:
    """Returns the most patches that `view_mask` masks in a view, at least 1 so no shape is 0."""
    return max(1, int(max(mask_config.ratio) * grid[0] * grid[1] + 1e-6))


def first_step(mask_config: Any, epoch: float) -> int:
    """Returns the first step with masks, given the number of steps per epoch in `epoch`."""
    steps = mask_config.start_steps
    return round(mask_config.start_epochs * epoch) if steps is None else steps


def random_mask(grid: tuple[int, int], rng: np.random.Generator, ratio: float) -> np.ndarray:
    """Masks exactly int(ratio * high * wide) positions; bool [high, wide]."""
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[rng.permutation(mask.size)[: int(ratio * mask.size)]] = True
    return mask.reshape(grid)


def block_mask(grid: tuple[int, int], rng: np.random.Generator, ratio: float) -> np.ndarray:
    """Masks rectangles until ratio * high * wide patches are covered (BEiT, as iBOT draws it).

    A block has an area ~ U((min(high, wide) // 3)^2, remaining) and a log-uniform aspect ratio in
    [0.3, 1 / 0.3], where `remaining` is the number of patches still to mask. It must be smaller
    than the grid in both directions, and is kept if it masks at least one new patch and at most
    `remaining`. After ten failed attempts the mask stays as it is, so that on average a little
    less than `ratio` is masked: 0.292 for a ratio of 0.3 on a 14 x 14 grid, 0.284 on 7 x 7, and
    0.25 on 4 x 4 and on 2 x 2. Blocks that fit a long strip are rare, so half of the 30 x 2 grids
    stay unmasked; a grid that is one patch high or wide always does, because no block is smaller.

    Args:
        grid: the number of patches (height, width).
        rng: the generator of all draws.
        ratio: the share of patches to mask.

    Returns:
        bool [high, wide], True where masked.
    """
    high, wide = grid
    mask = np.zeros(grid, bool)
    smallest = float((min(grid) // 3) ** 2)
    left = ratio * high * wide
    low, span = LOG_ASPECT[0], LOG_ASPECT[1] - LOG_ASPECT[0]
    draw = rng.random
    while left >= 1:  # a block masks at least one patch: below that, none can be kept
        for _ in range(TRIES):
            area = smallest + (left - smallest) * draw()
            aspect = math.exp(low + span * draw())
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= high or w >= wide:
                continue
            top, side = int((high - h + 1) * draw()), int((wide - w + 1) * draw())
            block = mask[top : top + h, side : side + w]
            new = h * w - np.count_nonzero(block)
            if 0 < new <= left:
                block[:] = True
                left -= new
                break
        else:
            break
    return mask


def inverse_block_mask(grid: tuple[int, int], rng: np.random.Generator, ratio: float) -> np.ndarray:
    """Masks exactly int(ratio * high * wide) positions: all but one block (CAPI's code).

    The block has a log-uniform aspect ratio in [0.3, 1 / 0.3], as far as it fits the grid, and lies
    anywhere on it; what reaches beyond a border continues at the opposite one. Its last positions
    are masked as well where the block is larger than what must stay visible.

    Args:
        grid: the number of patches (height, width).
        rng: the generator of all draws.
        ratio: the share of patches to mask.

    Returns:
        bool [high, wide], True where masked.
    """
    high, wide = grid
    visible = high * wide - int(ratio * high * wide)
    mask = np.ones(grid, bool)
    if visible == 0:
        return mask
    fits = math.log(visible / wide**2), math.log(high**2 / visible)
    h = math.sqrt(visible * math.exp(rng.uniform(*np.clip(LOG_ASPECT, *fits))))
    h = min(high, math.ceil(h - 1e-6))
    w = math.ceil(visible / h)
    positions = np.arange(visible)
    mask[positions // w, positions % w] = False
    return np.roll(mask, (rng.integers(high), rng.integers(wide)), (0, 1))


KINDS = {"block": block_mask, "random": random_mask, "inverse_block": inverse_block_mask}
