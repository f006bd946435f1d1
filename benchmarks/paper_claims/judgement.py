"""Whether measured numbers support a statement, for any number of seeds.

A difference is judged by its mean over seeds and the standard error of this mean: it is positive or
negative if it is larger than two standard errors, and undecided otherwise. That two things are
equal holds only if the 95 % interval of their difference (by Student's t) is inside a margin, and
is refuted only if the interval is outside. Runs with the same seed are compared with each other.
Fewer than SEEDS seeds are not judged.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

import scipy.stats

SEEDS = 3
HOLDS, FAILS, UNDECIDED, UNJUDGED = "holds", "does not hold", "undecided", "not judged"
SHOWN = "only shown"  # a number beside a claim, which is no part of it

Samples = dict[int, float]  # values by seed


def paired(*terms: tuple[float, Samples]) -> Samples:
    """Returns a weighted sum for each seed that all of the samples have.

    Args:
        *terms: weights and samples.
    """
    seeds = set.intersection(*(set(samples) for _, samples in terms))
    return {seed: sum(weight * x[seed] for weight, x in terms) for seed in sorted(seeds)}


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean; None for fewer than two values."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of two or more values, by Student's t."""
    mean, error = statistics.mean(values), standard_error(values)
    assert error is not None
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def is_positive(samples: Samples, exact: bool = False) -> str:
    """Returns whether the mean of differences is positive.

    Args:
        samples: the differences by seed.
        exact: whether they have no spread, so that one value is enough.
    """
    values = list(samples.values())
    if exact and values:
        return HOLDS if values[0] > 0 else FAILS
    if len(values) < SEEDS:
        return UNJUDGED
    mean, error = statistics.mean(values), standard_error(values)
    assert error is not None
    if abs(mean) < 2 * error or mean == 0:
        return UNDECIDED
    return HOLDS if mean > 0 else FAILS


def is_within(samples: Samples, margin: float, exact: bool = False) -> str:
    """Returns whether the mean of differences is 0 up to a margin; arguments as `is_positive`."""
    values = list(samples.values())
    if exact and values:
        return HOLDS if abs(values[0]) < margin else FAILS
    if len(values) < SEEDS:
        return UNJUDGED
    low, high = interval(values)
    if -margin < low and high < margin:
        return HOLDS
    return FAILS if low > margin or high < -margin else UNDECIDED


def is_not_worse(samples: Samples, margin: float) -> str:
    """Returns whether the mean of differences is above -margin, by its 95 % interval."""
    values = list(samples.values())
    if len(values) < SEEDS:
        return UNJUDGED
    low, high = interval(values)
    if low > -margin:
        return HOLDS
    return FAILS if high < -margin else UNDECIDED


def all_of(verdicts: Iterable[str]) -> str:
    """Returns the verdict on a claim that consists of several statements.

    It does not hold if one of them does not, and holds if all do; what is only shown is left out.
    """
    found = [verdict for verdict in verdicts if verdict != SHOWN]
    if FAILS in found:
        return FAILS
    for verdict in (UNJUDGED, UNDECIDED):
        if verdict in found:
            return verdict
    return HOLDS if found else UNJUDGED


def seeds_needed(samples: Samples) -> int | None:
    """Returns the seeds with which a difference would be two standard errors, as far as is known.

    That is where the mean and the deviation stay as they are; None if there is no telling.
    """
    values = list(samples.values())
    if len(values) < 2 or not (mean := statistics.mean(values)):
        return None
    return max(SEEDS, math.ceil(round((2 * statistics.stdev(values) / mean) ** 2, 6)))
