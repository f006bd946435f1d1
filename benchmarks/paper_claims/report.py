"""The claims with their numbers and verdicts, as tables and as docs/claims.md with figures."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rows import COMPUTES

from paper_claims import costs, runs
from paper_claims.claims import (
    ANCHORS,
    BASE,
    CARP,
    CLAIMS,
    CLS_SUPPORTS,
    DECOUPLED,
    DINO,
    IBOT,
    KD,
    KP,
    MIM_SUPPORTS,
    PROTOTYPES,
    Claim,
    subjects,
)
from paper_claims.costs import Cost, Size
from paper_claims.judgement import (
    SEEDS,
    UNJUDGED,
    Samples,
    all_of,
    interval,
    seeds_needed,
    standard_error,
)
from paper_claims.runs import Run
from paper_claims.statements import (
    KNN,
    PAPER,
    RATIO,
    Metric,
    Statement,
    Subject,
    Test,
    label,
    unique,
)
from sop_jax.diagnosis.figures import check_plots

FIGURES = {
    "claims_knn.png": "Differences of k-NN accuracy: claims predict them positive, or 0 if equal",
    "claims_sweeps.png": "k-NN accuracy over supports, anchors and prototypes",
    "claims_unique.png": "Unique prototypes over eps and over training, and k-NN",
}


class Measured:
    """What was measured, by run and number.

    Args:
        rows: all rows. Only those of the version `rows.COMPUTES` count.
        steps: the steps of the runs.
        device: the kind of device whose costs are meant; by default those of all.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], steps: int, device: str | None = None
    ) -> None:
        self.rows, self.steps, self.device = rows, steps, device
        self._found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            elsewhere = device is not None and row.get("device", device) != device
            if row["version"] == COMPUTES and not elsewhere:
                self._found.setdefault(row["settings"], []).append(row)
        self._digests: dict[Subject | Size, str] = {}

    def on(self, device: str) -> "Measured":
        """Returns the same with the costs on one kind of device only."""
        return Measured(self.rows, self.steps, device)

    def of(self, measured: Subject | Size) -> list[dict[str, Any]]:
        """Returns the rows of a run, of a ratio of costs or of the size of a paper's run."""
        if measured not in self._digests:
            self._digests[measured] = (
                runs.digest(measured, self.steps)
                if isinstance(measured, Run)
                else costs.digest(measured)
            )
        return self._found.get(self._digests[measured], [])

    def of_all(self, measured: Iterable[Subject | Size]) -> list[dict[str, Any]]:
        """Returns the rows of several, each row once."""
        return [row for one in dict.fromkeys(measured) for row in self.of(one)]

    def __call__(self, subject: Subject, metric: Metric) -> Samples:
        """Returns the values by seed, or by round for costs; see `statements.Get`."""
        if isinstance(subject, Cost):
            rows = self.of(subject)
            return dict(enumerate(rows[-1]["ratios"])) if rows else {}  # of the newest row
        found = {row["seed"]: metric.value(row) for row in self.of(subject)}
        return {seed: value for seed, value in sorted(found.items()) if value is not None}


# Tables


def number(value: float, metric: Metric, signed: bool = False) -> str:
    """Returns a value as its metric is shown."""
    scaled = metric.scale * value
    digits = 1 if metric.scale == 100 else 3
    return f"{scaled:+.{digits}f}" if signed else f"{scaled:.{digits}f}"


def spread(samples: Samples, metric: Metric, signed: bool) -> str:
    """Returns a mean with its standard error and 95 % interval, as far as there are seeds."""
    values = list(samples.values())
    if not values:
        return "-"
    text = number(statistics.mean(values), metric, signed)
    error = standard_error(values)
    if error is None:
        return text
    low, high = interval(values)
    ends = f"{number(low, metric, signed)} to {number(high, metric, signed)}"
    return f"{text} ± {number(error, metric)} ({ends})"


def words_of(test: Test) -> str:
    """Returns a verdict, and for those that are not judged the number of seeds."""
    count = len(test.samples)
    if not count:
        return "not run"
    if test.verdict == UNJUDGED:
        return f"{count} seed{'s' * (count > 1)}, not judged"
    return test.verdict


def count_of(test: Test) -> str:
    """Returns the number of seeds, or of rounds for costs."""
    count = len(test.samples)
    return f"{count} round{'s' * (count > 1)}" if test.metric is RATIO and count else str(count)


def tests_of(statement: Statement, measured: Measured) -> list[tuple[str, Test]]:
    """Returns the comparisons of a statement, those of costs for each device that has rows.

    Returns:
        Pairs of the kind of the device, empty where it does not matter, and a comparison.
    """
    costs_of = [one for one in statement.needed if isinstance(one, Cost)]
    devices = dict.fromkeys(row["device"] for row in measured.of_all(costs_of))
    if not devices:
        return [("", test) for test in statement.tests(measured)]
    return [(one, test) for one in devices for test in statement.tests(measured.on(one))]


def verdict_of(claim: Claim, measured: Measured) -> str:
    """Returns the verdict on a claim: that of all its statements."""
    tests = [test for statement in claim.statements for _, test in tests_of(statement, measured)]
    verdict = all_of(test.verdict for test in tests)
    if verdict != UNJUDGED:
        return verdict
    fewest = min((len(test.samples) for test in tests if test.verdict == UNJUDGED), default=0)
    if not fewest:
        return "not run" if not any(test.samples for test in tests) else "run in part, not judged"
    return f"{fewest} seed{'s' * (fewest > 1)}, not judged"


def is_difference(test: Test) -> bool:
    """Returns whether a test shows a difference, and not a value that is compared with a limit."""
    return " - " in test.words


def rows_of(statement: Statement, measured: Measured) -> list[str]:
    """Returns the rows of the table of a claim: one per comparison."""
    lines, words = [], statement.words
    if lacking := [one for one in statement.further if not measured.of(one)]:
        count = len(statement.needed) + len(statement.further)
        words += f" ({count - len(lacking)} of {count} values)"
    for device, test in tests_of(statement, measured):
        metric = test.metric
        place = f", on {device}" if device else ""
        lines.append(
            f"| {words} | {metric.words}: {test.words}{place} | "
            f"{spread(test.samples, metric, is_difference(test))} | {count_of(test)} | "
            f"{words_of(test)} |"
        )
    return lines


def table(claims: Sequence[Claim], measured: Measured) -> str:
    """Returns the claims with their comparisons and verdicts, for a terminal."""
    lines = []
    for claim in claims:
        lines += ["", f"{claim.name}: {claim.title} ({claim.source})"]
        lines += [line for statement in claim.statements for line in rows_of(statement, measured)]
        lines.append(f"-> {verdict_of(claim, measured)}")
    return "\n".join(lines)


def left_out(claim: Claim, measured: Measured) -> str:
    """Returns what a claim needs that was not measured with SEEDS seeds; empty if nothing."""
    lacking = {}
    for subject in subjects(claim, quick=False):
        wanted = 1 if isinstance(subject, Cost) else SEEDS
        if count := wanted - min(wanted, len(measured.of(subject))):
            lacking[subject] = count
    if not lacking:
        return ""
    names = "; ".join(label(subject) for subject in lacking)
    total = sum(lacking.values())
    return f"Missing: {total} run{'s' * (total > 1)}, of {names}."


def means(claim: Claim, measured: Measured) -> list[str]:
    """Returns a table of the runs of a claim: the mean and the standard error of each number."""
    metrics = list(dict.fromkeys(m for statement in claim.statements for m in statement.metrics))
    there = [one for one in subjects(claim, quick=False) if measured.of(one)]
    metrics = [m for m in metrics if m is not RATIO]
    there = [one for one in there if isinstance(one, Run)]
    if not there or not metrics:
        return []
    lines = [
        "| run | seeds | " + " | ".join(metric.words for metric in metrics) + " |",
        "|---" * (2 + len(metrics)) + "|",
    ]
    for one in there:
        cells = []
        for metric in metrics:
            values = list(measured(one, metric).values())
            error = standard_error(values)
            text = number(statistics.mean(values), metric) if values else "-"
            cells.append(text if error is None else f"{text} ± {number(error, metric)}")
        lines.append(f"| {label(one)} | {len(measured.of(one))} | " + " | ".join(cells) + " |")
    return lines


def more_seeds(claim: Claim, measured: Measured) -> str:
    """Returns how many seeds would decide what is undecided, if the numbers stay as they are."""
    found = []
    for statement in claim.statements:
        for _, test in tests_of(statement, measured):
            needed = seeds_needed(test.samples)
            if test.verdict == "undecided" and is_difference(test) and needed:
                found.append(f"{needed} for {test.words}")
    if not found:
        return ""
    return (
        f"With the present means and spreads, two standard errors would take so many seeds: "
        f"{'; '.join(found)}."
    )


# The document


def write(measured: Measured, folder: Path) -> None:
    """Writes claims.md and its figures, which need matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(measured, folder)
    folder.joinpath("claims.md").write_text(document(measured, drawn))


def document(measured: Measured, figures: Sequence[str]) -> str:
    """Returns the text of docs/claims.md."""
    wanted = [one for claim in CLAIMS for one in subjects(claim, quick=False)]
    sizes = [claim.size for claim in CLAIMS if claim.size]
    trained = measured.of_all(one for one in wanted if isinstance(one, Run))
    others = len(measured.rows) - len(measured.of_all([*wanted, *sizes]))
    hours = sum(row["command_s"] for row in trained) / 3600
    speeds = [row["images_per_s"] for row in trained if row["images_per_s"]]
    lines = [
        "# The papers' claims on the digits",
        "",
        "Written by `python benchmarks/claims.py --report` from the rows of `docs/claims.jsonl`;",
        "`python benchmarks/claims.py --quick`, `--only=CLAIM` and `--seeds=N` add rows.",
        "",
        f"sop_jax {COMPUTES}: {len(trained)} runs of {measured.steps} steps, "
        f"{hours:.1f} hours"
        + (f" at a median of {statistics.median(speeds):.0f} images/s" if speeds else "")
        + (f"; rows of other versions or settings, left out: {others}." if others else "."),
        "",
        "All runs have the network, the crops and the number of steps of one recipe for",
        "scikit-learn's digits (1437 images to train, 360 to test) and differ in what the claim",
        "names. A difference is between runs with the same seed: they have the same images in the",
        "same order and networks that start equal. It is given as mean ± standard error over",
        "seeds, with its 95 % interval. A claim *holds* if the differences of all its statements",
        "are larger than two standard errors, *does not hold* if one of them is as much in the",
        "other direction, and is *undecided* otherwise. That two things are equal holds if the",
        "interval is inside a margin that was chosen before the runs (1 point of accuracy, 5 % of",
        "time and memory); a sweep is flat if that holds for all pairs. A sweep has a peak if the",
        "best of the values near the claimed one is better than both ends, and no other value is",
        f"better than it. Fewer than {SEEDS} seeds are not judged. Costs are ratios of two steps:",
        "of time in several rounds, and of memory, which has no spread, in one. The standard error",
        "says how far other seeds would move the difference; that all are classified by the same",
        "360 images is not in it. If a statement names the best of several values, it is chosen by",
        "the same seeds that then judge it, which favours *holds*. *At least as good as* is tested",
        "as better, so that two equal methods remain undecided.",
        "",
        "| claim | source | verdict |",
        "|---|---|---|",
    ]
    for claim in CLAIMS:
        lines.append(
            f"| [{claim.title}](#{claim.name}) | {claim.source} | {verdict_of(claim, measured)} |"
        )
    for name in figures:
        lines += ["", f"![{FIGURES[name]}]({name})"]
    for claim in CLAIMS:
        lines += ["", f"## {claim.name}", "", f"{claim.title} ({claim.source})."]
        lines += [f"The paper: {claim.paper}.", ""]
        lines += ["| statement | compared | mean | seeds | verdict |", "|---|---|---|---|---|"]
        lines += [line for statement in claim.statements for line in rows_of(statement, measured)]
        if table_of_runs := means(claim, measured):
            lines += ["", *table_of_runs]
        notes = [claim.limits, size_words(claim.size, measured)]
        notes += [more_seeds(claim, measured), left_out(claim, measured)]
        for note in notes:
            lines += ["", note] if note else []
    return "\n".join(lines) + "\n"


def size_words(size: Size | None, measured: Measured) -> str:
    """Returns what the paper's run would take, as far as it was estimated."""
    if size is None or not (rows := measured.of(size)):
        return ""
    return (
        f"The paper's size is {size.words}: {rows[-1]['h100_days']:.1f} days on one H100 at 40 % "
        "of its peak, for each run and seed."
    )


# Figures


def draw(measured: Measured, folder: Path) -> list[str]:
    """Draws the figures that have data, and returns their names."""
    check_plots()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    for name, figure in (
        ("claims_knn.png", differences(measured)),
        ("claims_sweeps.png", sweeps(measured)),
        ("claims_unique.png", uniqueness(measured)),
    ):
        if figure is not None:
            figure.savefig(folder / name, dpi=100)
            plt.close(figure)
            drawn.append(name)
    return drawn


def differences(measured: Measured) -> Any:
    """Returns a figure of the differences of k-NN by claim, with their 95 % intervals."""
    import matplotlib.pyplot as plt

    found = [
        (textwrap.fill(f"{claim.name}: {test.words}", 90), test)
        for claim in CLAIMS
        for statement in claim.statements
        for test in statement.tests(measured)
        if test.metric is KNN and is_difference(test) and test.samples
    ]
    if not found:
        return None
    lines = sum(name.count("\n") + 1.6 for name, _ in found)
    size = (11, 1.5 + 0.19 * lines)
    figure, axis = plt.subplots(figsize=size, constrained_layout=True)
    colors = {"holds": "tab:green", "does not hold": "tab:red", "undecided": "tab:gray"}
    for i, (_, test) in enumerate(found):
        values = [100 * value for value in test.samples.values()]
        color = colors.get(test.verdict, "tab:blue")
        axis.plot(values, [i] * len(values), "o", color=color, alpha=0.4, markersize=4)
        if test.verdict != UNJUDGED:  # the interval of two seeds is as wide as the figure
            axis.plot([100 * end for end in interval(list(test.samples.values()))], [i, i], color)
        axis.plot([statistics.mean(values)], [i], "D", color=color, markersize=6)
    axis.set_yticks(range(len(found)), [name for name, _ in found], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(
        "difference of k-NN accuracy, points:\nseeds, mean, and 95 % interval if judged"
    )
    axis.grid(axis="x", alpha=0.3)
    for name, color in {**colors, "not judged": "tab:blue"}.items():
        axis.plot([], [], "D", color=color, label=name)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


SWEEPS: tuple[tuple[str, tuple[Run, ...], tuple[int, ...]], ...] = (
    ("supports of [CLS]", CLS_SUPPORTS, (1, 2, 4, 8, 16)),
    ("embeddings per SOP of patches", MIM_SUPPORTS, (1, 2, 4, 8, 16)),
    ("anchors of SOP", ANCHORS, (32, 64, 128, 256, 512)),
    ("prototypes of iBOT", PROTOTYPES, (128, 256, 512, 1024, 2048)),
)


def sweeps(measured: Measured) -> Any:
    """Returns a figure of k-NN over the values of sweeps, of those with two values or more."""
    import matplotlib.pyplot as plt

    found = []
    for name, sweep, values in SWEEPS:
        points = [
            (value, [100 * x for x in measured(one, KNN).values()])
            for value, one in zip(values, sweep, strict=True)
            if measured(one, KNN)
        ]
        if len(points) > 1:
            found.append((name, points))
    if not found:
        return None
    figure, axes = plt.subplots(
        1, len(found), figsize=(3.6 * len(found), 3.4), sharey=True, constrained_layout=True
    )
    for axis, (name, points) in zip([axes] if len(found) == 1 else axes, found, strict=True):
        axis.plot([x for x, _ in points], [statistics.mean(ys) for _, ys in points], "-D")
        for x, ys in points:
            axis.plot([x] * len(ys), ys, "o", color="tab:blue", alpha=0.4, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    figure.supylabel("k-NN, %")
    return figure


UNIQUE: tuple[Run, ...] = (DINO, IBOT, CARP, BASE, KD[0.1], KP[0.1], DECOUPLED)


def uniqueness(measured: Measured) -> Any:
    """Returns a figure of unique prototypes over eps and over epochs, and of k-NN at the end."""
    import matplotlib.pyplot as plt

    there = [one for one in UNIQUE if measured.of(one)]
    if not there:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    for i, one in enumerate(there):
        color = f"C{i}"
        rows = measured.of(one)
        eps = [float(text) for text in rows[0]["unique"]]
        shares = [list(measured(one, unique(x)).values()) for x in eps]
        at_end = [(x, 100 * statistics.mean(ys)) for x, ys in zip(eps, shares, strict=True) if ys]
        if not at_end:
            continue
        axes[0].plot(*zip(*at_end, strict=True), "-o", color=color, markersize=3, label=label(one))
        curve: dict[float, list[float]] = {}
        for row in rows:
            for step, share in row["unique"][str(PAPER)]:
                curve.setdefault(step / row["epoch"], []).append(100 * share)
        over = [(epoch, statistics.mean(ys)) for epoch, ys in sorted(curve.items())]
        axes[1].plot(*zip(*over, strict=True), "-o", color=color, markersize=3)
        knn = [100 * x for x in measured(one, KNN).values()]
        axes[2].plot([i] * len(knn), knn, "o", color=color, alpha=0.4, markersize=4)
        axes[2].plot([i], [statistics.mean(knn)], "D", color=color)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("eps")
    axes[0].set_ylabel("unique prototypes at the end, %")
    axes[1].set_xlabel("epoch")
    axes[1].set_ylabel(f"unique prototypes at eps {PAPER}, %")
    axes[2].set_ylabel("k-NN, %")
    axes[2].set_xticks([])
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return figure
