"""What claims state: comparisons of runs or costs that can be tested with numbers."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from paper_claims import runs
from paper_claims.costs import Cost
from paper_claims.judgement import (
    FAILS,
    HOLDS,
    SHOWN,
    UNJUDGED,
    Samples,
    is_not_worse,
    is_positive,
    is_within,
    paired,
)
from paper_claims.runs import Run

Subject = Run | Cost

# k-NN accuracy is a whole number of the 360 test images, 0.28 points each.
KNN_MARGIN = 0.01  # one point: within it, accuracies count as equal
COST_MARGIN = 0.05  # within it, times and memories count as equal
KEPT = 0.9  # the share of prototypes that are unique if nearly all are
COLLAPSED = 0.95  # entropy of the targets, relative to ln K, from which a run has collapsed
FLAT = 0.1  # M does not grow with K if it grows by less than K to this power
PAPER = 0.025  # the eps of the paper's tables
EARLY_EPOCHS = 10.0  # "the first epochs"


class Metric(NamedTuple):
    """A number of a row.

    Attributes:
        words: its name for people.
        value: returns it, or None if the row does not have it.
        scale: what it is multiplied with to be shown.
    """

    words: str
    value: Callable[[dict[str, Any]], float | None]
    scale: float = 1.0


def unique(eps: float, epochs: float | None = None) -> Metric:
    """Returns the share of unique prototypes, at the end or in the last count of some epochs."""

    def value(row: dict[str, Any]) -> float | None:
        points = (row["unique"] or {}).get(str(eps), [])
        if epochs is not None:
            points = [point for point in points if point[0] <= epochs * row["epoch"]]
        return points[-1][1] if points else None

    when = "" if epochs is None else f" after at most {epochs:g} epochs"
    return Metric(f"unique prototypes at eps {eps:g}{when}, %", value, 100)


def log_unique(eps: float) -> Metric:
    """Returns the logarithm of the number of unique prototypes at the end."""
    share = unique(eps)

    def value(row: dict[str, Any]) -> float | None:
        found = share.value(row)
        return None if found is None else math.log(found * row["prototypes"])

    return Metric(f"ln M at eps {eps:g}", value)


def _of(part: str, name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: (row[part] or {}).get(name)


def _collapse(row: dict[str, Any]) -> float | None:
    signs = row["signs"]
    entropy = signs.get("entropy")
    return None if entropy is None else entropy / signs["log_k"]


KNN = Metric("k-NN, %", lambda row: row["knn"][-1][1], 100)
LOGISTIC = Metric("logistic regression, %", _of("logistic", "top1"), 100)
HEAD = Metric("its accuracy on the head class, %", _of("logistic", "head"), 100)
MIDDLE = Metric("its accuracy on middle classes, %", _of("logistic", "middle"), 100)
TAIL = Metric("its accuracy on tail classes, %", _of("logistic", "tail"), 100)
TRANSFER = Metric("logistic regression on other classes, %", lambda row: row["transfer"], 100)
FEWSHOT = {
    shots: Metric(f"{shots} image{'s' * (shots > 1)} per class, %", _of("fewshot", str(shots)), 100)
    for shots in (1, 2, 5)
}
ENTROPY = Metric("entropy of the targets / ln K", _collapse)
RATIO = Metric("ratio", lambda row: None)  # of costs


class Get(Protocol):
    """Gives what was measured."""

    def __call__(self, subject: Subject, metric: Metric) -> Samples:
        """Returns the values by seed, or by round for costs; empty if there are none."""


class Test(NamedTuple):
    """A comparison.

    Attributes:
        words: what is compared.
        metric: in which number.
        samples: the difference by seed, or what is compared with a limit.
        verdict: the judgement.
    """

    words: str
    metric: Metric
    samples: Samples
    verdict: str


class Statement(NamedTuple):
    """A part of a claim.

    Attributes:
        words: what is stated, in the words of this project.
        needed: what is compared; for a sweep its two ends and what it is compared with.
        further: the other values of a sweep, which enter if they were measured.
        tests: returns the comparisons.
        metrics: the numbers that are shown.
        quick: whether what it needs is a part of the quick set.
    """

    words: str
    needed: tuple[Subject, ...]
    further: tuple[Subject, ...]
    tests: Callable[[Get], list[Test]]
    metrics: tuple[Metric, ...]
    quick: bool = True


def label(subject: Subject) -> str:
    """Returns a readable name."""
    return subject.words if isinstance(subject, Cost) else runs.label(subject)


Choice = Subject | Sequence[Run]  # of several runs, the one with the best mean


def _choices(choice: Choice) -> tuple[Subject, ...]:
    return (choice,) if isinstance(choice, Run | Cost) else tuple(choice)


def _best(choice: Choice, metric: Metric, get: Get) -> tuple[str, Samples]:
    """Returns the run of the best mean; all runs of a choice must have been measured."""
    found = [(label(subject), get(subject, metric)) for subject in _choices(choice)]
    if not all(samples for _, samples in found):
        return " or ".join(name for name, _ in found), {}
    common = set.intersection(*(set(samples) for _, samples in found))
    return max(found, key=lambda pair: statistics.mean([pair[1][seed] for seed in common] or [0.0]))


def _difference(a: Choice, b: Choice, metric: Metric, get: Get) -> tuple[str, Samples]:
    (first, plus), (second, minus) = (_best(choice, metric, get) for choice in (a, b))
    return f"{first} - {second}", paired((1, plus), (-1, minus))


def more(
    words: str,
    a: Choice,
    b: Choice,
    metric: Metric = KNN,
    *,
    shown: Sequence[Metric] = (),
    quick: bool = True,
) -> Statement:
    """States that a is better than b; of several runs, that the best is.

    Args:
        words: what is stated.
        a: a run, or several.
        b: a run, or several.
        metric: the number.
        shown: more numbers to show.
        quick: see `Statement`.
    """

    def tests(get: Get) -> list[Test]:
        name, samples = _difference(a, b, metric, get)
        return [Test(name, metric, samples, is_positive(samples))]

    needed = (*_choices(a), *_choices(b))
    return Statement(words, needed, (), tests, (metric, *shown), quick)


def not_worse(
    words: str,
    a: Choice,
    b: Choice,
    metric: Metric = KNN,
    margin: float = KNN_MARGIN,
    *,
    quick: bool = True,
) -> Statement:
    """States that a is not worse than b by more than a margin; of several runs, the best."""

    def tests(get: Get) -> list[Test]:
        name, samples = _difference(a, b, metric, get)
        return [Test(name, metric, samples, is_not_worse(samples, margin))]

    return Statement(words, (*_choices(a), *_choices(b)), (), tests, (metric,), quick)


def less_change(
    words: str, a: tuple[Run, Run], b: tuple[Run, Run], metric: Metric = KNN, *, quick: bool = True
) -> Statement:
    """States that the first of a is less below the second than the first of b below its second."""

    def tests(get: Get) -> list[Test]:
        found = [get(subject, metric) for subject in (*a, *b)]
        samples = paired(*zip((1, -1, -1, 1), found, strict=True))
        name = f"({label(a[0])} - {label(a[1])}) - ({label(b[0])} - {label(b[1])})"
        return [Test(name, metric, samples, is_positive(samples))]

    return Statement(words, (*a, *b), (), tests, (metric,), quick)


def flat(
    words: str,
    sweep: Sequence[Run],
    reference: Run,
    metric: Metric = KNN,
    margin: float = KNN_MARGIN,
    *,
    quick: bool = True,
) -> Statement:
    """States that no two values of a sweep differ by more than a margin."""
    ends = (sweep[0], sweep[-1])

    def tests(get: Get) -> list[Test]:
        there = [one for one in sweep if one in (*ends, reference) or get(one, metric)]
        found = []
        for i, second in enumerate(there):
            for first in there[i + 1 :]:
                name, samples = _difference(first, second, metric, get)
                found.append(Test(name, metric, samples, is_within(samples, margin)))
        return found

    needed = tuple(dict.fromkeys((*ends, reference)))
    further = tuple(one for one in sweep if one not in needed)
    return Statement(words, needed, further, tests, (metric,), quick)


def peak(
    words: str,
    sweep: Sequence[Run],
    near: Sequence[Run],
    reference: Run,
    metric: Metric = KNN,
    *,
    quick: bool = True,
) -> Statement:
    """States that a sweep rises to its best value and falls after it.

    The best of the values near the claimed peak must be better than both ends, and no other value
    may be better than it.

    Args:
        words: what is stated.
        sweep: the values in their order.
        near: those near the claimed peak, one of which must have been measured.
        reference: that of them which is always measured.
        metric: the number.
        quick: see `Statement`.
    """
    ends = (sweep[0], sweep[-1])

    def tests(get: Get) -> list[Test]:
        best = [one for one in near if one == reference or get(one, metric)]
        found = []
        for end in ends:
            name, samples = _difference(best, end, metric, get)
            found.append(Test(name, metric, samples, is_positive(samples)))
        for other in sweep:
            if other in (*ends, *near) or not get(other, metric):
                continue
            name, samples = _difference(best, other, metric, get)
            found.append(Test(name, metric, samples, _not_less(samples)))
        return found

    needed = tuple(dict.fromkeys((*ends, reference)))
    further = tuple(one for one in sweep if one not in needed)
    return Statement(words, needed, further, tests, (metric,), quick)


def _not_less(samples: Samples) -> str:
    """Returns the verdict on a difference that must not be negative; undecided ones are not."""
    verdict = is_positive(samples)
    return verdict if verdict in (FAILS, UNJUDGED) else HOLDS


def above(
    words: str, run: Run, metrics: Sequence[Metric], limit: float, *, quick: bool = True
) -> Statement:
    """States that all of some numbers of a run are above a limit."""
    return _limit(words, run, metrics, limit, 1, quick)


def below(
    words: str, run: Run, metrics: Sequence[Metric], limit: float, *, quick: bool = True
) -> Statement:
    """States that all of some numbers of a run are below a limit."""
    return _limit(words, run, metrics, limit, -1, quick)


def _limit(
    words: str, run: Run, metrics: Sequence[Metric], limit: float, sign: int, quick: bool
) -> Statement:
    def tests(get: Get) -> list[Test]:
        found = []
        for metric in metrics:
            samples = get(run, metric)
            margins = {seed: sign * (value - limit) for seed, value in samples.items()}
            found.append(Test(label(run), metric, samples, is_positive(margins)))
        return found

    return Statement(words, (run,), (), tests, tuple(metrics), quick)


def slow_growth(
    words: str, small: Run, large: Run, ratio: float, eps: float = PAPER, *, quick: bool = True
) -> Statement:
    """States that M grows by less than K to the power FLAT, where K grows by a ratio."""
    metric = log_unique(eps)
    shown = Metric(f"power of K with which M grows at eps {eps:g}", metric.value)

    def tests(get: Get) -> list[Test]:
        scale = 1 / math.log(ratio)
        samples = paired((scale, get(large, metric)), (-scale, get(small, metric)))
        left = {seed: FLAT - value for seed, value in samples.items()}
        return [Test(f"{label(small)}, {label(large)}", shown, samples, is_positive(left))]

    return Statement(words, (small, large), (), tests, (unique(eps),), quick)


def cost_within(words: str, cost: Cost, margin: float = COST_MARGIN) -> Statement:
    """States that a ratio of costs is 1 up to a margin."""

    def tests(get: Get) -> list[Test]:
        ratios = get(cost, RATIO)
        beyond = {seed: value - 1 for seed, value in ratios.items()}
        verdict = is_within(beyond, margin, exact=cost.quantity != "time")
        return [Test(cost.words, RATIO, ratios, verdict)]

    return Statement(words, (cost,), (), tests, (RATIO,))


def cost_shown(words: str, cost: Cost) -> Statement:
    """Shows a ratio of costs beside a claim, without a judgement."""

    def tests(get: Get) -> list[Test]:
        return [Test(cost.words, RATIO, get(cost, RATIO), SHOWN)]

    return Statement(words, (cost,), (), tests, (RATIO,))


def cost_above(words: str, cost: Cost, margin: float = COST_MARGIN) -> Statement:
    """States that a ratio of costs is larger than 1 by more than a margin."""

    def tests(get: Get) -> list[Test]:
        ratios = get(cost, RATIO)
        beyond = {seed: value - 1 - margin for seed, value in ratios.items()}
        verdict = is_positive(beyond, exact=cost.quantity != "time")
        return [Test(cost.words, RATIO, ratios, verdict)]

    return Statement(words, (cost,), (), tests, (RATIO,))
