"""Anchors of self-organizing prototypes with their nearest supports and their votes."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from sop_jax.pictures.subject import Trained


class Supported(NamedTuple):
    """Some prototypes of one level; row 0 of each is the anchor, and its supports follow.

    Attributes:
        level: its name, such as `cls`.
        prototypes: the number of all prototypes of a task.
        images: the record of each row among the images trained on; -1 where it is from none.
        cosines: of each row to its anchor.
        votes: the share of the vote of each row that is for this prototype, in [0, 1].
    """

    level: str
    prototypes: int
    images: Int[np.ndarray, "n S"]
    cosines: Float[np.ndarray, "n S"]
    votes: Float[np.ndarray, "n S"]


def without_supports(trained: Trained) -> str | None:
    """Returns why there are no supports to show; None if there are some."""
    if trained.objective is None:
        return "the network was converted, without memories"
    if trained.objective.supports is None:
        return f"prototypes of method={trained.config.method} have no supports"
    return None


def supports(trained: Trained, count: int, seed: int = 0) -> list[Supported]:
    """Returns some prototypes of each level, as one step would draw them.

    Prototypes all of whose rows are from images come first. Those of the rest are the initial
    random rows of a memory that is not full yet.

    Args:
        trained: a checkpoint for which `without_supports` is None.
        count: the most prototypes of each level.
        seed: draws the anchors.
    """
    assert trained.objective is not None and trained.objective.supports is not None
    found = jax.jit(trained.objective.supports)(trained.carried, jax.random.key(seed))
    shown = []
    for level, one in found.items():
        rows = np.asarray(one.rows)
        images, votes = np.asarray(one.images).T, np.asarray(one.votes).T
        cosines = np.einsum("kd,skd->ks", rows[0], rows)
        # Every draw is random, so that the first ones are as good as any.
        order = np.argsort(-(images >= 0).mean(axis=1), kind="stable")[:count]
        shown.append(Supported(level, len(images), images[order], cosines[order], votes[order]))
    return shown
