"""The curves of runs, drawn together, each with its numbers in a table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sop_jax.page import charts, markup
from sop_jax.page.charts import Chart
from sop_jax.page.runs import Shown, number, series

POINTS = 300  # the most points of a curve; of longer ones, neighbours are averaged
MARKED = 30  # the most points of a curve that has markers
LISTED = 20  # the most rows of a table
AXIS = 1.8  # the height of a panel, in inches
OUTLIERS = 3.0  # how many times wider than nearly all values an axis is before it is cut


class Curve(NamedTuple):
    """One value of each logged step or evaluation.

    Attributes:
        key: its name in the rows.
        label: of its axis.
        scale: what the values are multiplied by.
        log: whether the axis is logarithmic.
        limits: of the axis; None for those of the values.
        bound: the key of a value that bounds it, drawn as a dotted line.
        above: another key by which `bound` is divided.
        steady: whether the chart leaves it out while it does not change, as schedules may not.
    """

    key: str
    label: str
    scale: float = 1.0
    log: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    bound: str | None = None
    above: str | None = None
    steady: bool = False


class Group(NamedTuple):
    """Curves that belong together, one below the other.

    Attributes:
        name: of the chart.
        title: what it shows.
        caption: how to read it.
        curves: those that any run may have.
    """

    name: str
    title: str
    caption: str
    curves: Sequence[Curve]


def _share(key: str, label: str) -> Curve:
    """Returns the curve of a share in [0, 1], in percent."""
    return Curve(key, label, 100.0, limits=(0.0, None))


GROUPS = (
    # In an order in which two columns are of about the same height.
    Group(
        "knn",
        "k-NN accuracy",
        "Accuracy of the teacher's features by weighted k-nearest neighbours, at each evaluation. "
        "The axis may not begin at 0.",
        (Curve("knn_top1", "k-NN top-1, %", 100.0),),
    ),
    Group(
        "loss",
        "Loss",
        "The loss and its terms, in nats. Targets change with the teacher, so that a loss that "
        "rises is not a bad sign by itself; one that stays at ln K is.",
        (
            Curve("loss", "loss"),
            Curve("cls", "views (cls)", bound="log_k"),
            Curve("mim", "masked patches (mim)"),
            Curve("prediction", "prediction"),
            Curve("clustering", "clustering"),
            Curve("prior", "prior"),
            Curve("koleo_prototypes", "KoLeo, prototypes"),
            Curve("koleo_data", "KoLeo, data"),
        ),
    ),
    Group(
        "assignments",
        "Assignments",
        "How the teacher assigns images to prototypes. The dotted line is ln K. The entropy of an "
        "image should stay clearly below it, and that of the mean of a batch near it.",
        (
            Curve("entropy", "entropy, nats", limits=(0.0, None), bound="log_k"),
            Curve(
                "entropy_of_mean", "entropy of the mean, nats", limits=(0.0, None), bound="log_k"
            ),
            _share("winning_sops", "SOPs that win, %"),
            _share("winning_prototypes", "prototypes that win, %"),
        ),
    ),
    Group(
        "unique",
        "Unique prototypes",
        "The share of prototypes that are farther than ε = 0.025 from each other, at each "
        "evaluation. Partial collapse lets it fall.",
        (Curve("prototypes_share", "unique prototypes, %", 100.0, limits=(0.0, 105.0)),),
    ),
    Group(
        "speed",
        "Speed",
        "Images per second, without evaluations and checkpoints, and the share of the time that "
        "devices wait for images.",
        (
            Curve("images_per_s", "images per second", limits=(0.0, None)),
            _share("idle_share", "waiting, %"),
        ),
    ),
    Group(
        "embeddings",
        "Embeddings",
        "Directions of the embedding grow only where the agreement of views is above the dotted "
        "line, the teacher's temperature divided by the student's. A spread near 0 means that all "
        "embeddings are at one point.",
        (
            Curve(
                "agreement",
                "agreement of views",
                bound="teacher_temperature",
                above="student_temperature",
            ),
            Curve("embedding_std", "spread of embeddings", limits=(0.0, None)),
            Curve("effective_rank", "effective rank", limits=(0.0, None)),
            Curve("support_cosine", "cosine of supports"),
            Curve("memory_filled", "memory filled, %", 100.0, limits=(0.0, 105.0), steady=True),
        ),
    ),
    Group(
        "optimization",
        "Optimization",
        "The norm of the gradient before clipping, and the schedules that change.",
        (
            Curve("grad_norm", "gradient norm", log=True),
            Curve("lr", "learning rate", limits=(0.0, None)),
            Curve("weight_decay", "weight decay", limits=(0.0, None), steady=True),
            Curve("momentum", "teacher's momentum", steady=True),
            Curve("teacher_temperature", "teacher's temperature", limits=(0.0, None), steady=True),
        ),
    ),
)

# What is logged but drawn in no chart of its own, because it says the same in other words.
UNDRAWN = ("step", "log_k", "student_temperature", "corrupt", "wall_s")


def curves(runs: Sequence[Shown]) -> list[tuple[Chart, str]]:
    """Returns a chart of each group of which a run has values, and the table of its numbers.

    To be called in `matplotlib.rc_context(charts.STYLE)`.
    """
    found = []
    for group in (*GROUPS, *_others(runs)):
        present = [curve for curve in group.curves if _is_drawn(curve, runs)]
        if present:
            found.append((_chart(group, present, runs), _tables(group, present, runs)))
    return found


def _is_drawn(curve: Curve, runs: Sequence[Shown]) -> bool:
    values = [{value for _, value in series(run, curve.key)} for run in runs]
    return any(len(own) > curve.steady for own in values)


def _others(runs: Sequence[Shown]) -> list[Group]:
    """Returns the main values of further evaluations, such as those of logistic regression."""
    known = {curve.key for group in GROUPS for curve in group.curves} | set(UNDRAWN)
    names = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    mains = [name for name in names if name.endswith("_top1") and name not in known]
    caption = "Accuracies of further evaluations on the way."
    drawn = [Curve(name, f"{name.removesuffix('_top1')} top-1, %", 100.0) for name in mains]
    return [Group("others", "Further evaluations", caption, drawn)] if drawn else []


def _chart(group: Group, present: Sequence[Curve], runs: Sequence[Shown]) -> Chart:
    named = len(runs) if len(runs) > 1 else 0
    figure, axes = charts.panels(len(present), named, height=AXIS)
    cut = []
    for axis, curve in zip(axes, present, strict=True):
        for place, run in enumerate(runs):
            style = charts.style_of(place, len(runs))
            points = series(run, curve.key)
            _draw(axis, points, curve.scale, run.name, style)
            bound = _bounds(run, curve) if curve.bound else []
            if bound:
                x, y = zip(*bound, strict=True)
                axis.plot(x, y, color=style["color"], linewidth=1.0, linestyle=":")
        axis.set(title=curve.label)
        if curve.log:
            charts.log_scale(axis, "y", subs=(1.0, 2.0, 5.0))
        elif _limit(axis, curve, runs):
            cut.append(curve.label)
    steps = [axis.get_xlim() for axis in axes]
    for axis in axes:
        axis.set(xlim=(min(low for low, _ in steps), max(high for _, high in steps)))
    axes[-1].set(xlabel="step")
    if named:
        charts.legend(figure, axes[0])
    caption = f"{group.title}. {group.caption}"
    if cut:
        caption += f" Values far outside the others are cut off: {', '.join(cut)}."
    longest = max(len(series(run, curve.key)) for run in runs for curve in present)
    if longest > POINTS:
        caption += (
            f" Lines are means of neighbouring steps, at most {POINTS} of them, and shades are "
            "from the least to the greatest."
        )
    alt = f"{group.title}. " + "; ".join(
        text for curve in present for run in runs if (text := _alt(curve, run, len(runs)))
    )
    return Chart(f"curve-{group.name}", figure, caption, alt)


def _draw(
    axis: Any, points: Sequence[tuple[int, float]], scale: float, name: str, style: dict[str, Any]
) -> None:
    if not points:
        axis.plot([], [], label=name, **style | {"marker": ""})
        return
    x, y = np.array([p[0] for p in points]), scale * np.array([p[1] for p in points], float)
    bins = np.array_split(np.arange(len(x)), min(POINTS, len(x)))
    means = [y[part].mean() for part in bins]
    marker = style["marker"] if len(x) <= MARKED else ""
    at = [x[part].mean() for part in bins]
    axis.plot(at, means, label=name, **style | {"marker": marker, "markersize": 3.5})
    if len(x) > POINTS:
        low, high = ([pick(y[part]) for part in bins] for pick in (np.min, np.max))
        axis.fill_between(at, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _bounds(run: Shown, curve: Curve) -> list[tuple[int, float]]:
    assert curve.bound is not None
    found = []
    for row in run.rows:
        value = number(row.get(curve.bound))
        divisor = number(row.get(curve.above)) if curve.above else 1.0
        if value is not None and divisor and curve.key in row:
            found.append((row["step"], curve.scale * value / divisor))
    return found


def _limit(axis: Any, curve: Curve, runs: Sequence[Shown]) -> bool:
    """Sets the limits of an axis; returns whether they cut off some values."""
    low, high = curve.limits
    if high is not None:
        axis.set(ylim=curve.limits)
        return False
    values = curve.scale * np.array([y for run in runs for _, y in series(run, curve.key)], float)
    least, most = float(values.min()), float(values.max())
    bottom, usual = np.percentile(values, [0, 99]).tolist()
    if len(values) > 50 and most - least > OUTLIERS * (usual - bottom) > 0:
        room = 0.05 * (usual - bottom)
        axis.set(ylim=(bottom - room if low is None else low, usual + room))
        return True
    if low is not None:
        axis.set(ylim=(low, low + max(1.05 * (axis.dataLim.ymax - low), 1e-9)))
    return False


def _alt(curve: Curve, run: Shown, runs: int) -> str:
    points = series(run, curve.key)
    if not points:
        return ""
    (first, start), (step, end) = points[0], points[-1]
    name = f"{run.name}, {curve.label}" if runs > 1 else curve.label
    if len(points) == 1:
        return f"{name}: {_short(curve.scale * end)} at step {step}"
    values = [curve.scale * value for _, value in points]
    return (
        f"{name}: from {_short(curve.scale * start)} at step {first} to "
        f"{_short(curve.scale * end)} at step {step}, between {_short(min(values))} and "
        f"{_short(max(values))}"
    )


def _short(value: float) -> str:
    return f"{value:.4g}"


def _tables(group: Group, present: Sequence[Curve], runs: Sequence[Shown]) -> str:
    """Returns the numbers of a chart, of at most LISTED steps of each run."""
    tables = []
    for run in runs:
        rows = [row for row in run.rows if any(_has(row, curve) for curve in present)]
        taken = np.unique(np.linspace(0, len(rows) - 1, LISTED).round().astype(int))
        cells = [[row["step"], *(_value(row, curve) for curve in present)] for row in rows]
        some = f", {len(taken)} of {len(rows)} steps" if len(taken) < len(rows) else ""
        own = f" of {run.name}" if len(runs) > 1 else ""
        caption = f"{group.title}{own}{some}"
        if rows:
            columns = ["step", *(curve.label for curve in present)]
            tables.append(markup.table(columns, [cells[place] for place in taken], caption))
    return markup.details(f"Numbers: {group.title}", "".join(tables))


def _has(row: Any, curve: Curve) -> bool:
    return number(row.get(curve.key)) is not None


def _value(row: Any, curve: Curve) -> float | None:
    value = number(row.get(curve.key))
    return None if value is None else curve.scale * value
