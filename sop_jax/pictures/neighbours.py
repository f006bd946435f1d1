"""The nearest images of images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sop_jax.evaluation.retrieval import unit


class Neighbours(NamedTuple):
    """The nearest images of each query, nearest first.

    Attributes:
        places: their rows in the gallery.
        cosines: their cosines to the query.
    """

    places: Int[np.ndarray, "n k"]
    cosines: Float[np.ndarray, "n k"]


def neighbours(
    queries: Float[np.ndarray, "n D"],
    gallery: Float[np.ndarray, "N D"],
    k: int,
    own: Sequence[Sequence[int]] = (),
) -> Neighbours:
    """Returns the k nearest images by cosine; all of them if there are fewer.

    Args:
        queries: features of any norm.
        gallery: features of the images that are searched.
        k: the number of neighbours.
        own: for each query the rows of the gallery that are itself, which are left out; () if
            none is.
    """
    first, second = (unit(rows.astype(np.float32)) for rows in (queries, gallery))
    cosines = first @ second.T
    for row, places in enumerate(own):
        cosines[row, list(places)] = -np.inf
    k = min(k, len(gallery) - max(map(len, own), default=0))
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return Neighbours(nearest, np.take_along_axis(cosines, nearest, axis=1))
