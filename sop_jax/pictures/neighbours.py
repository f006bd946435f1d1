"""The nearest images of images."""

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
    own: Int[np.ndarray, " n"] | None = None,
) -> Neighbours:
    """Returns the k nearest images by cosine; all of them if there are fewer.

    Args:
        queries: features of any norm.
        gallery: features of the images that are searched.
        k: the number of neighbours.
        own: the row of the gallery that each query is itself, which is left out.
    """
    first, second = (unit(rows.astype(np.float32)) for rows in (queries, gallery))
    cosines = first @ second.T
    if own is not None:
        cosines[np.arange(len(own)), own] = -np.inf
    k = min(k, len(gallery) - (own is not None))
    places = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return Neighbours(places, np.take_along_axis(cosines, places, axis=1))
