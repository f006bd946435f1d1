"""How many prototypes are different: Definition 4.1 of the partial-collapse paper, greedily.

The paper gives no algorithm, and a partition into sets of redundant prototypes depends on the order
in which they are visited. Here, as is usual, they are visited by index: a prototype that no earlier
representative covers becomes a representative, and covers all later prototypes near it that are not
covered yet. The sets for a larger distance need not contain those for a smaller one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

from sop_jax.errors import UserError

EPS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5)
PAPER = 0.025  # of Table 1 of the partial-collapse paper
LEAST = 1e-6  # cosines in float32 are known to about 1e-7

TILE = 1024  # prototypes that are visited at a time
COLUMNS = 4096  # representatives that they are compared with at a time


class Cover(NamedTuple):
    """The sets of redundant prototypes for one distance; M sets of K prototypes.

    Attributes:
        eps: the distance: prototypes of a set have 1 - cos < eps with their representative.
        representatives: their indices, ascending.
        redundancy: the number of prototypes in the set of each representative, itself included.
        of: for each prototype, the index of its representative.
    """

    eps: float
    representatives: Int[np.ndarray, " M"]
    redundancy: Int[np.ndarray, " M"]
    of: Int[np.ndarray, " K"]


def covers(prototypes: Float[np.ndarray, "K d"], eps: Sequence[float]) -> list[Cover]:
    """Finds the sets of redundant prototypes for several distances in one pass.

    A prototype joins the first representative, by index, with 1 - cos < eps. Cosines are float32
    products of unit vectors, so that a distance that differs from eps by less than about 1e-7 can
    count either way. Each prototype is multiplied only with earlier ones that are a representative
    for at least one eps, TILE x COLUMNS at a time: the time is proportional to K^2 if all differ,
    and the memory is that of two copies of the prototypes.

    Args:
        prototypes: vectors of any length.
        eps: distances, in any order.

    Returns:
        The sets for each eps, in the order of `eps`.

    Raises:
        UserError: see `check_eps` and `lengths_of`.
    """
    check_eps(eps)
    rows = unit(prototypes, lengths_of(prototypes, "prototypes"))
    count, limits = len(rows), [np.float32(1 - e) for e in eps]
    of = np.full((len(eps), count), -1, np.int64)

    # The representatives for at least one eps so far, by ascending index.
    kept, index, size = np.empty_like(rows), np.empty(count, np.int64), 0
    serves = np.zeros((len(eps), count), bool)  # for which eps
    buffer = np.empty(TILE * max(TILE, COLUMNS), np.float32)
    not_later = np.tri(TILE, dtype=bool)

    for start in range(0, count, TILE):
        tile = rows[start : start + TILE]
        own = of[:, start : start + TILE]
        for begin in range(0, size, COLUMNS):
            columns = slice(begin, min(begin + COLUMNS, size))
            cosines = _products(tile, kept[columns], buffer)
            largest = cosines.max(axis=1)
            for e, limit in enumerate(limits):
                near = np.flatnonzero((own[e] < 0) & (largest > limit))
                if len(near):
                    covers_row = (cosines[near] > limit) & serves[e, columns]
                    found = covers_row.any(axis=1)
                    own[e, near[found]] = index[begin + covers_row[found].argmax(axis=1)]

        cosines = _products(tile, tile, buffer)
        cosines[not_later[: len(tile), : len(tile)]] = -np.inf
        largest = cosines.max(axis=1)
        for e, limit in enumerate(limits):
            for place in np.flatnonzero((own[e] < 0) & (largest > limit)):
                if own[e, place] < 0:  # no representative in this tile has covered it meanwhile
                    own[e, (cosines[place] > limit) & (own[e] < 0)] = start + place
            open_still = own[e] < 0
            own[e, open_still] = start + np.flatnonzero(open_still)

        represents = own == np.arange(start, start + len(tile))
        new = np.flatnonzero(represents.any(axis=0))
        kept[size : size + len(new)] = tile[new]
        index[size : size + len(new)] = start + new
        serves[:, size : size + len(new)] = represents[:, new]
        size += len(new)

    return [_cover(e, members) for e, members in zip(eps, of, strict=True)]


def _products(
    rows: Float32[np.ndarray, "n d"],
    columns: Float32[np.ndarray, "m d"],
    buffer: Float32[np.ndarray, " size"],
) -> Float32[np.ndarray, "n m"]:
    """Returns the cosines of unit vectors, in the memory of `buffer`."""
    out = buffer[: len(rows) * len(columns)].reshape(len(rows), len(columns))
    return np.matmul(rows, columns.T, out=out)


def _cover(eps: float, of: Int[np.ndarray, " K"]) -> Cover:
    representatives, redundancy = np.unique(of, return_counts=True)
    return Cover(float(eps), representatives, redundancy, of)


def check_eps(eps: Sequence[float]) -> None:
    """Raises UserError if there are no distances, or some are out of range or occur twice."""
    expected = (
        f"Expected distances 1 - cos, at least {LEAST:g} and below 2, each once; the paper's is "
        f"{PAPER:g}"
    )
    if not len(eps):
        raise UserError(f"there is no eps to count unique prototypes for. {expected}. Give some")
    for e in eps:
        if not 0 < e < 2:
            raise UserError(f"eps is {e:g}, outside of (0, 2). {expected}. Choose another")
        if e < LEAST:
            raise UserError(
                f"eps is {e:g}, which cosines in float32 do not resolve. {expected}. Choose a "
                "larger one"
            )
    if len(set(eps)) < len(eps):
        listed = ", ".join(f"{e:g}" for e in eps)
        raise UserError(f"eps are {listed}, some of them twice. {expected}. Give each once")


def lengths_of(rows: Float[np.ndarray, "n d"], what: str) -> Float64[np.ndarray, " n"]:
    """Returns the length of each row, for `unit`.

    Args:
        rows: vectors, read TILE at a time.
        what: what they are, for messages.

    Raises:
        UserError: there are no rows; some are not finite; or some have length 0, and so no
            direction.
    """
    if not rows.size:
        raise UserError(
            f"there are no {what}: their array is {list(rows.shape)}. Expected at least one row of "
            "at least one number. Check where they come from"
        )
    lengths = np.empty(len(rows))
    for start in range(0, len(rows), TILE):
        tile = np.asarray(rows[start : start + TILE], np.float64)
        lengths[start : start + TILE] = np.sqrt(np.einsum("nd,nd->n", tile, tile))
    for wrong, problem, remedy in (
        (
            ~np.isfinite(lengths),
            "have values that are not finite",
            "Use weights from before training diverged",
        ),
        (lengths == 0, "have length 0, and so no direction", "Leave these rows out"),
    ):
        if wrong.any():
            raise UserError(
                f"{int(wrong.sum())} of {len(rows)} {what} {problem}; the first is row "
                f"{int(wrong.argmax())}. Expected finite vectors that are not 0. {remedy}"
            )
    return lengths


def unit(
    rows: Float[np.ndarray, "n d"], lengths: Float64[np.ndarray, " n"]
) -> Float32[np.ndarray, "n d"]:
    """Returns the rows divided by their lengths, rounded to float32 only at the end."""
    found = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), TILE):
        tile = np.asarray(rows[start : start + TILE], np.float64)
        found[start : start + TILE] = tile / lengths[start : start + TILE, None]
    return found
