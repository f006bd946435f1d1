"""The accuracy of a classifier on ImageNet-9, whose classes are groups of ImageNet's."""

import numpy as np
from jaxtyping import Float, Integer


def predict(
    logits: Float[np.ndarray, "n C"], to_nine: Integer[np.ndarray, " C"] | None
) -> Integer[np.ndarray, " n"]:
    """Returns the ImageNet-9 class that each row of logits stands for, or -1 for none of the nine.

    The best of all C classes is found first, as in the official code, so that an image can be
    classified as none of the nine.

    Args:
        logits: the scores of the C classes.
        to_nine: the ImageNet-9 class of each class, or -1; None if the classes are the nine.
    """
    best = logits.argmax(axis=1)
    return best if to_nine is None else np.asarray(to_nine)[best]
