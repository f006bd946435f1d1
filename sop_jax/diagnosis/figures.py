"""Figures of partial collapse: PNG files, and a page that needs no other file.

They show what Figures 1 and 4 of the partial-collapse paper and Figure 3 of the decoupling page
show, and the sizes of the latent classes of its Figures 5 to 7. They need matplotlib, which is not
installed with the package: `pip install -e '.[plot]'`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from sop_jax.diagnosis.diagnosis import Result
from sop_jax.diagnosis.uniqueness import PAPER, Cover, lengths_of, unit
from sop_jax.evaluation import tsne
from sop_jax.page import charts, markup
from sop_jax.page.charts import INK, Chart, check_plots
from sop_jax.paths import write_whole

MOST, LEAST = 5000, 10  # representatives in a map

TITLE = "Partial collapse of prototypes"


class Map(NamedTuple):
    """Unique prototypes in two dimensions, by t-SNE.

    Attributes:
        at: positions in any unit.
        redundancy: the redundancy factor of each.
        eps: the distance for which they are unique.
        unique: the number of all unique prototypes, of which these are some or all.
    """

    at: Float[np.ndarray, "n 2"]
    redundancy: Int[np.ndarray, " n"]
    eps: float
    unique: int


def map_of(prototypes: Float[np.ndarray, "K d"], cover: Cover, seed: int) -> Map | None:
    """Maps the unique prototypes by t-SNE, with the defaults of that evaluation.

    Args:
        prototypes: vectors of any length; only directions count.
        cover: their sets of redundant prototypes.
        seed: of the draw, and of t-SNE.

    Returns:
        The map of all representatives, or of MOST that are drawn; None if there are fewer than
        LEAST, of which t-SNE makes no map.
    """
    unique = len(cover.representatives)
    if unique < LEAST:
        return None
    drawn = np.sort(np.random.default_rng(seed).permutation(unique)[:MOST])
    rows = prototypes[cover.representatives[drawn]]
    settings = tsne.settings()
    settings.perplexity = min(settings.perplexity, (len(drawn) - 1) / 3)
    at, _ = tsne.embed(unit(rows, lengths_of(rows, "prototypes")), settings, seed)
    return Map(at, cover.redundancy[drawn], cover.eps, unique)


def draw(
    results: Mapping[str, Result],
    folder: epath.PathLike,
    knn: Mapping[str, float] | None = None,
    maps: Mapping[str, Map] | None = None,
) -> list[str]:
    """Draws results of `diagnosis.diagnose` together, and writes the figures.

    Args:
        results: by name, such as those of several runs, or of several epochs in order; at least
            one.
        folder: where the files are written; it is made if it does not exist.
        knn: the k-NN accuracy of some or all results by the same names, from 0 to 1.
        maps: maps of some results by the same names.

    Returns:
        The names of the files: `unique.png`, the share of unique prototypes against the distance;
        `share.png`, the average share of the data against redundancy, and `classes.png`, the sizes
        of latent classes, for results with features; `knn.png` and `tsne.png` where given; and
        `diagnosis.html`, a page with all of them and a table, in light and dark.

    Raises:
        UserError: matplotlib is not installed.
    """
    check_plots()
    import matplotlib

    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    knn, files = knn or {}, []
    with matplotlib.rc_context(charts.STYLE):
        drawn = charts_of(results, knn, maps)
        for chart in drawn:
            files.append(f"{chart.name}.png")
            (folder / files[-1]).write_bytes(charts.png(chart.figure))
        figures = "\n".join(map(charts.figure, drawn))
    body = (
        f"<main id=main><h1>{TITLE}</h1>\n{table(results, knn)}\n"
        f'<div class="charts">{figures}</div></main>'
    )
    write_whole(folder / "diagnosis.html", markup.page(TITLE, body))
    return [*files, "diagnosis.html"]


def charts_of(
    results: Mapping[str, Result],
    knn: Mapping[str, float] | None = None,
    maps: Mapping[str, Map] | None = None,
) -> list[Chart]:
    """Returns the charts of `draw`; to be called in `matplotlib.rc_context(charts.STYLE)`."""
    with_data = {name: one for name, one in results.items() if one["images"] is not None}
    drawn = [_unique(results)]
    if with_data:
        drawn += [_shares(with_data, list(results)), _classes(with_data, list(results))]
    if knn:
        drawn.append(_knn(knn, list(results)))
    if maps:
        drawn.append(_maps(maps))
    return drawn


# Figures


def _unique(results: Mapping[str, Result]) -> Chart:
    """Draws the share of unique prototypes against the distance."""
    figure, (axis,) = charts.panels(1, len(results))
    for place, (name, result) in enumerate(results.items()):
        entries = sorted(result["eps"], key=lambda entry: entry["eps"])
        style = charts.style_of(place, len(results))
        label = f"{name}: {_at_paper(result)['unique']:,} of {result['prototypes']:,}"
        x, y = [e["eps"] for e in entries], [100 * e["share"] for e in entries]
        axis.plot(x, y, label=label, clip_on=False, **style)
    axis.set(ylim=(0, 100), ylabel="unique prototypes, %", xlabel="distance ε = 1 − cos")
    charts.log_scale(axis, "x", subs=(1.0, 5.0))
    axis.axvline(PAPER, color=INK, linewidth=0.8, linestyle=":")
    charts.legend(figure, axis)
    caption = (
        "Prototypes that no earlier representative covers at a distance ε. A line that stays at "
        "100 % has no redundant prototypes, and one that falls early has collapsed. The dotted "
        f"line is the partial-collapse paper's ε = {PAPER:g}; the legend has the numbers of unique "
        f"prototypes at {_distances(results)}."
    )
    alt = "Share of unique prototypes against the distance. " + "; ".join(
        f"{name}: " + ", ".join(f"{100 * e['share']:.3g} % at {e['eps']:g}" for e in one["eps"])
        for name, one in results.items()
    )
    return Chart("unique", figure, caption, alt)


def _shares(results: Mapping[str, Result], order: Sequence[str]) -> Chart:
    """Draws the average share of the data of a unique prototype against its redundancy factor."""
    figure, axes = charts.panels(2, len(results))
    titles = ("each image to its nearest prototype", "images divided softly")
    for axis, key, title in zip(axes, ("share_mean", "share_mean_soft"), titles, strict=True):
        for name, result in results.items():
            entry = _at_paper(result)
            style = charts.style_of(order.index(name), len(order)) | {"linestyle": "none"}
            points = zip(entry["factors"], entry[key], strict=True)
            shown = [(factor, 100 * share) for factor, share in points if share > 0]
            axis.plot(*zip(*shown, strict=True), label=name, alpha=0.85, **style)
            equal = 100 / entry["unique"]
            axis.axhline(equal, color=style["color"], linewidth=0.9, linestyle=":")
        axis.set(title=title, ylabel="data per prototype, %")
        charts.log_scale(axis, "x")
        charts.log_scale(axis, "y")
    axes[-1].set(xlabel="redundancy factor: prototypes that are alike")
    charts.legend(figure, axes[0])
    caption = (
        "The data is reassigned to unique prototypes alone. Each point is the average share of the "
        "data of a unique prototype that stands for so many prototypes; dotted lines are the share "
        "that each would have if all had equal shares. Points that rise to the right mean that "
        "redundant prototypes serve dense regions of the data. Factors without any data are left "
        f"out. Here {_distances(results)}."
    )
    alt = "Average share of the data by redundancy factor. " + "; ".join(
        _alt_of_shares(name, _at_paper(result)) for name, result in results.items()
    )
    return Chart("share", figure, caption, alt)


def _alt_of_shares(name: str, entry: Mapping[str, Any]) -> str:
    low, high = 100 * entry["share_mean"][0], 100 * entry["share_mean"][-1]
    return (
        f"{name}: {low:.3g} % at a factor of {entry['factors'][0]}, {high:.3g} % at one of "
        f"{entry['factors'][-1]}"
    )


def _classes(results: Mapping[str, Result], order: Sequence[str]) -> Chart:
    """Draws the numbers of images of latent classes, sorted."""
    figure, (axis,) = charts.panels(1, len(results))
    for name, result in results.items():
        style = charts.style_of(order.index(name), len(order)) | {"marker": ""}
        used = len(result["images_per_class"])
        label = f"{name}: {used:,} of {result['prototypes']:,} have images"
        for images, dashes, shown in (
            (result["images_per_class"], "-", label),
            (_at_paper(result)["images_per_class"], "--", None),
        ):
            ranks = range(1, len(images) + 1)
            axis.plot(ranks, images, label=shown, **style | {"linestyle": dashes})
    axis.set(xlabel="latent class, the largest first", ylabel="images")
    charts.log_scale(axis, "x")
    charts.log_scale(axis, "y")
    charts.legend(figure, axis)
    caption = (
        "The latent class of an image is its nearest prototype: of all prototypes (solid), and of "
        f"unique ones alone (dashed), at {_distances(results)}. Where few "
        "prototypes are unique, the dashed line is higher and ends early: classes are coarse."
    )
    alt = "Images of each latent class, sorted. " + "; ".join(
        f"{name}: {one['images']:,} images in {len(one['images_per_class']):,} classes, of which "
        f"the largest has {one['images_per_class'][0]:,}"
        for name, one in results.items()
    )
    return Chart("classes", figure, caption, alt)


def _knn(knn: Mapping[str, float], order: Sequence[str]) -> Chart:
    """Draws k-NN accuracies."""
    figure, (axis,) = charts.panels(1, 0, height=0.8 + 0.3 * len(knn))
    for row, (name, accuracy) in enumerate(knn.items()):
        style = charts.style_of(order.index(name), len(order)) | {
            "linestyle": "none",
            "markersize": 7,
        }
        axis.plot([100 * accuracy], [row], clip_on=False, **style)
        axis.annotate(
            f"{100 * accuracy:.1f}",
            (100 * accuracy, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
        )
    axis.set(xlabel="k-NN top-1, %", ylim=(len(knn) - 0.5, -0.5))
    axis.set_yticks(range(len(knn)), list(knn))
    axis.margins(x=0.15)
    axis.grid(axis="y", visible=False)
    shown = ", ".join(f"{name} {100 * accuracy:.1f} %" for name, accuracy in knn.items())
    caption = "Accuracy of k-nearest neighbours with the features of each. The axis may not begin "
    return Chart("knn", figure, caption + "at 0.", f"k-NN accuracy: {shown}")


def _maps(maps: Mapping[str, Map]) -> Chart:
    """Draws maps of unique prototypes, one below the other, with the same colours."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    figure, axes = charts.panels(len(maps), 0, height=4.2)
    largest = max(2, *(int(one.redundancy.max()) for one in maps.values()))
    norm = LogNorm(1, largest)
    # Neither the darkest colours nor the brightest, which are hard to see on one of the themes.
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.2, 0.95, 256)))
    for axis, (name, one) in zip(axes, maps.items(), strict=True):
        order = np.argsort(one.redundancy, kind="stable")  # the redundant ones above the others
        x, y = one.at[order].T
        drawn = axis.scatter(
            x,
            y,
            c=one.redundancy[order],
            s=float(np.clip(6000 / len(order), 4, 24)),
            cmap=colours,
            norm=norm,
            linewidths=0.3,
            edgecolors="#808080",
            rasterized=True,
        )
        axis.set(title=f"{name}: M = {one.unique:,} at ε = {one.eps:g}", xticks=[], yticks=[])
        axis.set_aspect("equal", "datalim")
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(drawn, ax=axis, label="redundancy factor", shrink=0.8)
        bar.outline.set_visible(False)
        charts.log_scale(bar.ax, "y", subs=(1.0, 2.0, 5.0) if largest < 50 else (1.0,))
    caption = (
        "Unique prototypes by t-SNE, coloured by the number of prototypes that each stands for. "
        "With partial collapse, there are few points, and many of them are bright."
    )
    sampled = [one for one in maps.values() if len(one.at) < one.unique]
    if sampled:
        caption += f" Of more than {MOST:,} unique prototypes, so many are drawn at random."
    alt = "t-SNE maps of unique prototypes. " + "; ".join(
        f"{name}: {one.unique:,} unique, with redundancy up to {int(one.redundancy.max()):,}"
        for name, one in maps.items()
    )
    return Chart("tsne", figure, caption, alt)


def _at_paper(result: Result) -> Mapping[str, Any]:
    """Returns the entry of the distance that is nearest to the paper's."""
    return min(result["eps"], key=lambda entry: abs(math.log(entry["eps"] / PAPER)))


def _distances(results: Mapping[str, Result]) -> str:
    """Returns the distances that figures of a single one show, such as `ε = 0.025`."""
    chosen = {name: f"{_at_paper(result)['eps']:g}" for name, result in results.items()}
    if len(set(chosen.values())) == 1:
        return f"ε = {next(iter(chosen.values()))}"
    return "ε = " + ", ".join(f"{distance} ({name})" for name, distance in chosen.items())


# The page


COLUMNS: dict[str, Callable[[Result], Any]] = {
    "prototypes": lambda result: result["prototypes"],
    "ε": lambda result: f"{_at_paper(result)['eps']:g}",
    "unique": lambda result: _at_paper(result)["unique"],
    "unique, %": lambda result: 100 * _at_paper(result)["share"],
    "largest redundancy": lambda result: max(_at_paper(result)["factors"] or [None]),
    "without images": lambda result: result["dead"],
    "perplexity": lambda result: result["marginal_perplexity"],
    "effective rank": lambda result: result["effective_rank"],
    "uniformity": lambda result: result["uniformity"],
}


def table(results: Mapping[str, Result], knn: Mapping[str, float]) -> str:
    """Returns the numbers of each result as an HTML table."""
    columns = ["result", *COLUMNS, *["k-NN, %"] * bool(knn)]
    rows = []
    for name, result in results.items():
        values = [value(result) for value in COLUMNS.values()]
        if knn:
            values.append(100 * knn[name] if name in knn else None)
        rows.append([name, *values])
    return markup.table(columns, rows, "The numbers of each result")
