"""How well masks agree: the region measure J and the boundary measure F of DAVIS.

Both are those of davis2017-evaluation (https://github.com/davisvideochallenge), to the last digit,
with one exception: that code keeps the bounds of the bins of the decay in eight bits, which is
wrong for clips of more than 256 frames.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float64, UInt8

TOLERANCE = 0.008  # of boundaries, in lengths of the diagonal
RECALLED = 0.5  # the recall is the share of frames above this
BINS = 4  # the decay compares the first and the last of them


class Statistics(NamedTuple):
    """What is reported of a measure over the frames of a clip.

    Attributes:
        mean: the mean.
        recall: the share of the frames above 0.5.
        decay: the mean of the first quarter minus the mean of the last.
    """

    mean: float
    recall: float
    decay: float


def region(found: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Returns J, the intersection of two masks divided by their union; 1 if both are empty."""
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def boundary(found: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Returns F, the harmonic mean of the precision and the recall of the boundary of a mask.

    A pixel of a boundary is right if the other boundary is at most ceil(.008 x diagonal) pixels
    away. Two masks without a boundary agree, as do neither precision nor recall where only one has
    one.
    """
    edges, true_edges = outline(found), outline(truth)
    n, true_n = np.count_nonzero(edges), np.count_nonzero(true_edges)
    if not (n and true_n):
        return float(n == true_n)
    reach = disk(math.ceil(TOLERANCE * math.hypot(*found.shape)))
    near, near_truth = cv2.dilate(edges, reach), cv2.dilate(true_edges, reach)
    precision = np.count_nonzero(edges & near_truth) / n
    recall = np.count_nonzero(true_edges & near) / true_n
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def outline(mask: Bool[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """Returns 1 where a pixel differs from the one on its right, below, or below on the right."""
    next_ = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = next_[:-1, 1:], next_[1:, :-1], next_[1:, 1:]
    return ((mask ^ right) | (mask ^ below) | (mask ^ diagonal)).astype(np.uint8)


def disk(radius: int) -> UInt8[np.ndarray, "side side"]:
    """Returns 1 within `radius` of the centre of a square."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x**2 + y**2 <= radius**2).astype(np.uint8)


def measure(
    found: UInt8[np.ndarray, "H W"], truth: UInt8[np.ndarray, "H W"], objects: int
) -> Float64[np.ndarray, "2 objects"]:
    """Returns J and F of the objects 1 to `objects` in a frame.

    Numbers above `objects` count as background, and so does void (255), as in the official
    evaluation with the first mask given.
    """
    pairs = [(found == number, truth == number) for number in range(1, objects + 1)]
    return np.array([[score(*pair) for pair in pairs] for score in (region, boundary)])


def statistics(values: Float64[np.ndarray, " T"]) -> Statistics:
    """Returns the statistics of a measure without its first frame, which is given, and its last.

    All are NaN for fewer than three frames.
    """
    inner = values[1:-1]
    if not len(inner):
        return Statistics(math.nan, math.nan, math.nan)
    bounds = np.round(np.linspace(1, len(inner), BINS + 1) + 1e-10).astype(int) - 1
    first, last = inner[: bounds[1] + 1], inner[bounds[-2] :]
    return Statistics(
        float(inner.mean()), float((inner > RECALLED).mean()), float(first.mean() - last.mean())
    )
