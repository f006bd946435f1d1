"""How vectors spread over the sphere: uniformity, effective ranks, and their mean direction."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64
from scipy.special import entr

from sop_jax.diagnosis.uniqueness import lengths_of, unit

MOST = 16384  # rows of which all pairs are compared, which takes some seconds
TILE, COLUMNS = 1024, 4096  # pairs at a time
NOISE = 1e-12  # smaller eigenvalues of unit rows, for each row, are rounding errors


class Spread(NamedTuple):
    """How the directions of n vectors of d dimensions spread. None where it is undefined.

    Attributes:
        uniformity: log of the mean of exp(-2 |a - b|^2) over all pairs of different rows (Wang &
            Isola, 2020), from -8 to 0, where 0 is a single direction; None for a single row.
        uniformity_rows: the number of rows that it was computed from: all, or MOST of them at equal
            steps.
        effective_rank: the exponential of the entropy of the singular values divided by their sum
            (Roy & Vetterli, 2007), from 1 to d.
        effective_rank_centred: the same after the mean is subtracted; None if all rows are equal.
        effective_rank_covariance: the same of the eigenvalues of the covariance, which are squares
            of the singular values; None if all rows are equal.
        mean_direction_norm: the length of the mean direction, from 0 to 1, where 1 is a single
            direction.
    """

    uniformity: float | None
    uniformity_rows: int
    effective_rank: float
    effective_rank_centred: float | None
    effective_rank_covariance: float | None
    mean_direction_norm: float


def spread_of(rows: Float[np.ndarray, "n d"], what: str) -> Spread:
    """Returns how the directions of rows spread.

    Args:
        rows: vectors of any length, read in parts.
        what: what they are, for messages.

    Raises:
        UserError: see `uniqueness.lengths_of`.
    """
    lengths = lengths_of(rows, what)
    count, dim = rows.shape
    gram, total = np.zeros((dim, dim)), np.zeros(dim)
    for start in range(0, count, COLUMNS):
        part = slice(start, start + COLUMNS)
        tile = unit(rows[part], lengths[part]).astype(np.float64)
        gram += tile.T @ tile
        total += tile.sum(axis=0)
    mean = total / count
    squares = _eigenvalues(gram, count)
    centred = _eigenvalues(gram - count * np.outer(mean, mean), count)
    chosen = np.linspace(0, count - 1, min(count, MOST)).round().astype(np.int64)
    whole = _effective_rank(np.sqrt(squares))
    assert whole is not None  # unit rows have at least one direction
    return Spread(
        uniformity(unit(rows[chosen], lengths[chosen])),
        len(chosen),
        whole,
        _effective_rank(np.sqrt(centred)),
        _effective_rank(centred),
        float(np.linalg.norm(mean)),
    )


def uniformity(rows: Float32[np.ndarray, "n d"]) -> float | None:
    """Returns the logarithm of the mean of exp(-2 |a - b|^2) over pairs of unit rows."""
    count, total = len(rows), 0.0
    if count < 2:
        return None
    for start in range(0, count, TILE):
        tile = rows[start : start + TILE]
        within = _kernel(tile, tile)
        total += float(np.triu(within, 1).sum(dtype=np.float64))
        for begin in range(start + TILE, count, COLUMNS):
            total += float(_kernel(tile, rows[begin : begin + COLUMNS]).sum(dtype=np.float64))
    return float(np.log(2 * total / (count * (count - 1.0))))


def _kernel(
    rows: Float32[np.ndarray, "n d"], others: Float32[np.ndarray, "m d"]
) -> Float32[np.ndarray, "n m"]:
    """Returns exp(-2 |a - b|^2) for all pairs of unit vectors, where |a - b|^2 = 2 - 2 cos."""
    exponents = rows @ others.T
    exponents -= 1
    exponents *= 4
    return np.exp(exponents, out=exponents)


def _eigenvalues(gram: Float64[np.ndarray, "d d"], count: int) -> Float64[np.ndarray, " d"]:
    """Returns the eigenvalues of a sum of outer products of unit rows or deviations from a mean.

    Those that rounding makes are set to 0. They grow with the number of rows, whatever the sum is
    after the mean is subtracted.
    """
    found = np.linalg.eigvalsh(gram)
    return np.where(found > NOISE * count, found, 0.0)


def _effective_rank(values: Float64[np.ndarray, " d"]) -> float | None:
    """Returns the exponential of the entropy of values divided by their sum; None if all are 0."""
    total = values.sum()
    return float(np.exp(entr(values / total).sum())) if total > 0 else None
