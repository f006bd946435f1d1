"""Accuracy of a classifier: over images, per class, and for frequent and rare classes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

HEAD, TAIL = 100, 20  # head classes have more train images, tail classes fewer


NEVER = np.iinfo(np.int32).max  # the rank of a class that is not predicted at any rank


def rank_of(logits: Float[Array, "*B C"], labels: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """Returns the number of classes before the true one; the first of equal ones comes first.

    That is NEVER where the true class has no score, or one that is not a number.
    """
    classes = logits.shape[-1]
    truth = jnp.clip(labels, 0, classes - 1)[..., None]
    own = jnp.take_along_axis(logits, truth, axis=-1)
    ahead = ~(logits <= own) | ((logits == own) & (jnp.arange(classes) < truth))
    known = (labels >= 0) & (labels < classes) & ~jnp.isnan(own[..., 0])
    return jnp.where(known, jnp.sum(ahead, axis=-1), NEVER)


def count_right(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], valid: Bool[Array, " B"]
) -> Int[Array, "3 C"]:
    """Returns the number of images of each class, and how many are right by top-1 and by top-5.

    Counts of several batches can be added.

    Args:
        logits: the scores of the C classes.
        labels: the true classes; those of invalid rows are not used.
        valid: the rows that count.
    """
    classes = logits.shape[1]
    places = jnp.where(valid & (labels >= 0), labels, classes)  # the last place is cut off
    ranks = rank_of(logits, labels)
    counted = jnp.stack([ranks >= 0, ranks < 1, ranks < 5]).astype(jnp.int32)
    return jnp.zeros((3, classes + 1), jnp.int32).at[:, places].add(counted)[:, :classes]


def summary(
    counts: Integer[np.ndarray, "3 C"], train: Integer[np.ndarray, " C"] | None = None
) -> dict[str, float | None]:
    """Returns the accuracies that counts of `count_right` mean.

    Args:
        counts: for all images together.
        train: the number of train images of each class, for the accuracy of frequent and rare ones.

    Returns:
        `top1`, `top5` and `mean_per_class`, the mean over the classes that have images, in [0, 1],
        and the standard errors `top1_error` and `mean_per_class_error`, for images drawn
        independently, in the second case from each class. `head`, `middle` and `tail` are the means
        over the classes with more than 100, with 20 to 100 and with fewer than 20 train images;
        they are None unless there are classes of at least two of these kinds. All are None if there
        are no images, and `top5` if there are five classes or fewer.
    """
    images, right, right5 = np.asarray(counts, np.float64)
    total, there = images.sum(), images > 0
    names = ("top1", "top1_error", "top5", "mean_per_class", "mean_per_class_error")
    result: dict[str, float | None] = dict.fromkeys((*names, "head", "middle", "tail"))
    if not total:
        return result
    top1 = right.sum() / total
    result |= {"top1": float(top1), "top1_error": float((top1 * (1 - top1) / total) ** 0.5)}
    if len(images) > 5:
        result["top5"] = float(right5.sum() / total)
    shares = right[there] / images[there]
    result["mean_per_class"] = float(shares.mean())
    variance = shares * (1 - shares) / images[there]
    result["mean_per_class_error"] = float(variance.sum() ** 0.5 / len(shares))
    if train is None:
        return result
    kinds = {
        "head": train > HEAD,
        "middle": (train >= TAIL) & (train <= HEAD),
        "tail": train < TAIL,
    }
    if sum(bool(kind.any()) for kind in kinds.values()) > 1:
        result |= {
            name: float((right[kind & there] / images[kind & there]).mean())
            for name, kind in kinds.items()
            if (kind & there).any()
        }
    return result
