"""Scores of semantic segmentation from areas in pixels: mIoU, mAcc and aAcc, as in mmsegmentation.

Areas of images are summed before the scores are computed, so that images and processes can be
added in any order.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Integer

from sop_jax.data.ade20k import IGNORED


def areas(
    prediction: Integer[np.ndarray, "h w"], label: Integer[np.ndarray, "h w"], classes: int
) -> Int64[np.ndarray, "4 classes"]:
    """Returns the areas of each class in pixels, among the pixels that are not ignored.

    Args:
        prediction: the predicted classes.
        label: the classes, or IGNORED.
        classes: the number of classes.

    Returns:
        The area of the intersection of prediction and label, of their union, of the prediction, and
        of the label.
    """
    counted = label != IGNORED
    prediction, label = prediction[counted], label[counted]
    both, predicted, labelled = (
        np.bincount(x, minlength=classes)
        for x in (prediction[prediction == label], prediction, label)
    )
    return np.stack([both, predicted + labelled - both, predicted, labelled])


def scores(total: Int64[np.ndarray, "4 classes"]) -> dict[str, Any]:
    """Returns the scores of summed areas as shares; None where nothing is labelled.

    Returns:
        `aAcc`, the share of pixels that are classified correctly; `mAcc`, the mean of this share
        over the classes that occur in the labels; `mIoU`, the mean intersection over union, over
        the classes that occur in the labels or in the predictions.
    """
    both, union, _, labelled = total
    return {
        "aAcc": float(both.sum() / labelled.sum()) if labelled.any() else None,
        "mAcc": _mean(ratios(both, labelled)),
        "mIoU": _mean(ratios(both, union)),
    }


def ratios(
    part: Int64[np.ndarray, " classes"], whole: Int64[np.ndarray, " classes"]
) -> Float[np.ndarray, " classes"]:
    """Returns the share of each class; NaN for classes that do not occur."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(shares: Float[np.ndarray, " classes"]) -> float | None:
    seen = shares[~np.isnan(shares)]
    return float(seen.mean()) if len(seen) else None
