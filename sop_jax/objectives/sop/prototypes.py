"""Self-organizing prototypes: anchors, their supports, and the votes of both (section 2.2.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.parallel.search import nearest, take

POOLS = ("non_anchors", "all")
VOTES = ("similarity", "smoothed", "pure_similarity", "one_hot")


class SOPs(NamedTuple):
    """K prototypes, each an anchor followed by its k supports, nearest first; S = 1 + k.

    The axis of length K comes after that of length S, so that per-SOP results are contiguous.

    Attributes:
        embeddings: D in the paper; unit rows.
        votes: the share of its vote that each support gives to its own SOP, that is, the entry of
            Y in the SOP's own column. The rest of the vote is spread evenly over the other SOPs.
    """

    embeddings: Float[Array, "S K d"]
    votes: Float[Array, "S K"]


def draw_anchors(key: Key[Array, ""], size: int, anchors: int) -> Int[Array, " K"]:
    """Returns positions in a memory of `size` rows, drawn uniformly without replacement."""
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
    """Returns the indices of the anchors and, below each, of its nearest rows by cosine.

    Args:
        rows: the rows of the memory, split over the devices.
        anchors: the indices of the rows that are anchors.
        supports: k, the number of supports of each anchor.
        mesh: the devices.
        pool: `non_anchors` searches the rows that are not anchors of this draw (the released
            code); `all` searches all rows except the anchor itself (the paper's text and
            pseudo-code).
        live: which rows belong to the memory; all by default.
        precision: the precision of the scores, a key of `search.PRECISIONS`.
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
    """Returns the vote of each support for its own SOP, in [0, 1].

    Args:
        embeddings: unit embeddings, the anchors first.
        votes: one of VOTES. `one_hot`: 1 for all (Table 9). `smoothed`: 1 - s for all (the paper's
            pseudo-code, appendix A.1). `similarity`: 1 - s for the anchor, and for the others
            their cosine to it, clipped to [0, 1] (the released code). `pure_similarity`: the same
            with 1 for the anchor (the paper's text, section 2.2.1).
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
    """Returns the SOPs of the given anchors and supports, replicated on every device.

    Args:
        rows: the rows of the memory, split over the devices.
        found: the indices of the anchors and their supports, from `find_supports`.
        votes: see `cast_votes`.
        smoothing: see `cast_votes`.
        mesh: the devices.
    """
    embeddings = take(rows, found, mesh)
    return SOPs(embeddings, cast_votes(embeddings, votes, smoothing))
