"""Self-organizing prototypes: anchors, their supports and the votes of both (section 2.2.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.parallel.search import nearest, take

POOLS = ("non_anchors", "all")
VOTES = ("similarity", "smoothed", "pure_similarity", "one_hot")


class SOPs(NamedTuple):
    """K prototypes, each an anchor (first) and its k supports, nearest first; S = 1 + k.

    K comes last, so that what is computed for every SOP is contiguous.

    Attributes:
        embeddings: D of the paper, unit rows.
        votes: what each support gives its own SOP; the rest of its one vote is spread evenly over
            the other SOPs. These are the entries of Y on the SOP's own column.
    """

    embeddings: Float[Array, "S K d"]
    votes: Float[Array, "S K"]


def draw_anchors(key: Key[Array, ""], size: int, anchors: int) -> Int[Array, " K"]:
    """Places in the memory, drawn uniformly without replacement."""
    return jax.random.choice(key, size, (anchors,), replace=False)


def find_supports(
    rows: Float[Array, "N d"],
    anchors: Int[Array, " K"],
    supports: int,
    mesh: Mesh,
    *,
    pool: str = "non_anchors",
    live: Bool[Array, " N"] | None = None,
    precision: str = "float32",
) -> Int[Array, "S K"]:
    """Each anchor and its nearest rows by cosine.

    Args:
        rows: the memory, split over the devices.
        anchors: rows that are anchors.
        supports: k, besides the anchor.
        mesh: the devices.
        pool: `non_anchors` looks among rows that are no anchor of this draw (the released code),
            `all` among all rows but the anchor itself (the paper's text and pseudo-code).
        live: rows that are in the memory; all by default.
        precision: of the scores, see `search.PRECISIONS`.
    """
    if supports == 0:
        return anchors[None]
    live = jnp.ones(len(rows), bool) if live is None else live
    own = anchors if pool == "all" else None
    allowed = live if pool == "all" else live.at[anchors].set(False)
    queries = take(rows, anchors, mesh)
    _, found = nearest(queries, rows, supports, mesh, allowed=allowed, own=own, precision=precision)
    return jnp.concatenate([anchors[None], found.T])


def cast_votes(
    embeddings: Float[Array, "S K d"], votes: str, smoothing: float
) -> Float[Array, "S K"]:
    """The vote of each support for its own SOP.

    Args:
        embeddings: anchors first.
        votes: `one_hot` 1 · `smoothed` 1 - s (the paper's pseudo-code) · `similarity` 1 - s for
            the anchor and the cosine to it, clipped to [0, 1], for the others (the released code)
            · `pure_similarity` the same with 1 for the anchor (the paper's text).
        smoothing: s.
    """
    if votes == "one_hot":
        return jnp.ones(embeddings.shape[:2])
    if votes == "smoothed":
        return jnp.full(embeddings.shape[:2], 1 - smoothing)
    cosine = jnp.einsum(
        "kd,skd->sk", embeddings[0], embeddings[1:], precision=jax.lax.Precision.HIGHEST
    )
    own = 1.0 if votes == "pure_similarity" else 1 - smoothing
    anchor = jnp.full((1, embeddings.shape[1]), own)
    return jnp.concatenate([anchor, jnp.clip(cosine, 0, 1)])


def build_sops(
    rows: Float[Array, "N d"], found: Int[Array, "S K"], votes: str, smoothing: float, mesh: Mesh
) -> SOPs:
    """The SOPs of anchors and supports given as rows of the memory, on every device."""
    embeddings = take(rows, found, mesh)
    return SOPs(embeddings, cast_votes(embeddings, votes, smoothing))
