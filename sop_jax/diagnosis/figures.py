"""Figures of partial collapse: PNG files, and a page that needs no other file.

They show what Figures 1 and 4 of the partial-collapse paper and Figure 3 of the decoupling page
show, and the sizes of the latent classes of its Figures 5 to 7. They need matplotlib, which is not
installed with the package: `pip install -e .[plot]`.
"""

import html
import importlib.util
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from sop_jax.diagnosis.diagnosis import Result
from sop_jax.diagnosis.uniqueness import PAPER, Cover, lengths_of, unit
from sop_jax.errors import UserError
from sop_jax.evaluation import tsne
from sop_jax.paths import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST, LEAST = 5000, 10  # representatives in a map

WIDTH, HEIGHT = 4.8, 3.2  # of a panel, in inches: text keeps its size on a phone
LEGEND_LINE = 0.19  # inches
LISTED = 10  # the most names in a legend; of more results, which are in order, some are left out
DPI = 200

# Okabe and Ito's colours, which colour-blind people can tell apart; markers differ as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
MARKERS = "osD^vPX*"
# On the page, these two become those of the reader's light or dark theme.
INK, GRID = "#24292f", "#d0d7de"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.constrained_layout.h_pad": 0.06,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names can contain dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}


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


class Picture(NamedTuple):
    """A figure, and what people read about it on the page.

    Attributes:
        name: of its file, without the ending.
        figure: of matplotlib.
        caption: what it shows, and how to read it.
        alt: what can be seen, for those who cannot see it.
    """

    name: str
    figure: "Figure"
    caption: str
    alt: str


def check_plots() -> None:
    """Raises UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "figures need matplotlib, which is not installed. Expected the extra `plot` of the "
            "package. Run: pip install -e .[plot]"
        )


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
    knn, maps = knn or {}, maps or {}
    with_data = {name: one for name, one in results.items() if one["images"] is not None}
    files, parts = [], []
    with matplotlib.rc_context(STYLE):
        pictures = [_unique(results)]
        if with_data:
            pictures += [_shares(with_data, list(results)), _classes(with_data, list(results))]
        if knn:
            pictures.append(_knn(knn, list(results)))
        if maps:
            pictures.append(_maps(maps))
        for picture in pictures:
            files.append(f"{picture.name}.png")
            (folder / files[-1]).write_bytes(_png(picture.figure))
            parts.append(
                f"<figure>{_svg(picture)}<figcaption>{html.escape(picture.caption)}</figcaption>"
                "</figure>"
            )
    table = _table(results, knn)
    page = PAGE.replace("{{table}}", table).replace("{{figures}}", "\n".join(parts))
    write_whole(folder / "diagnosis.html", page)
    return [*files, "diagnosis.html"]


# Figures


def _unique(results: Mapping[str, Result]) -> Picture:
    """Draws the share of unique prototypes against the distance."""
    figure, (axis,) = _panels(1, len(results))
    for place, (name, result) in enumerate(results.items()):
        entries = sorted(result["eps"], key=lambda entry: entry["eps"])
        style = _style(place, len(results))
        label = f"{name}: {_at_paper(result)['unique']:,} of {result['prototypes']:,}"
        x, y = [e["eps"] for e in entries], [100 * e["share"] for e in entries]
        axis.plot(x, y, label=label, clip_on=False, **style)
    axis.set(ylim=(0, 100), ylabel="unique prototypes, %", xlabel="distance ε = 1 − cos")
    _log(axis, "x", subs=(1.0, 5.0))
    axis.axvline(PAPER, color=INK, linewidth=0.8, linestyle=":")
    _legend(figure, axis)
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
    return Picture("unique", figure, caption, alt)


def _shares(results: Mapping[str, Result], order: Sequence[str]) -> Picture:
    """Draws the average share of the data of a unique prototype against its redundancy factor."""
    figure, axes = _panels(2, len(results))
    titles = ("each image to its nearest prototype", "images divided softly")
    for axis, key, title in zip(axes, ("share_mean", "share_mean_soft"), titles, strict=True):
        for name, result in results.items():
            entry = _at_paper(result)
            style = _style(order.index(name), len(order)) | {"linestyle": "none"}
            points = zip(entry["factors"], entry[key], strict=True)
            shown = [(factor, 100 * share) for factor, share in points if share > 0]
            axis.plot(*zip(*shown, strict=True), label=name, alpha=0.85, **style)
            equal = 100 / entry["unique"]
            axis.axhline(equal, color=style["color"], linewidth=0.9, linestyle=":")
        axis.set(title=title, ylabel="data per prototype, %")
        _log(axis, "x")
        _log(axis, "y")
    axes[-1].set(xlabel="redundancy factor: prototypes that are alike")
    _legend(figure, axes[0])
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
    return Picture("share", figure, caption, alt)


def _alt_of_shares(name: str, entry: Mapping[str, Any]) -> str:
    low, high = 100 * entry["share_mean"][0], 100 * entry["share_mean"][-1]
    return (
        f"{name}: {low:.3g} % at a factor of {entry['factors'][0]}, {high:.3g} % at one of "
        f"{entry['factors'][-1]}"
    )


def _classes(results: Mapping[str, Result], order: Sequence[str]) -> Picture:
    """Draws the numbers of images of latent classes, sorted."""
    figure, (axis,) = _panels(1, len(results))
    for name, result in results.items():
        style = _style(order.index(name), len(order)) | {"marker": ""}
        used = len(result["images_per_class"])
        label = f"{name}: {used:,} of {result['prototypes']:,} have images"
        for images, dashes, shown in (
            (result["images_per_class"], "-", label),
            (_at_paper(result)["images_per_class"], "--", None),
        ):
            ranks = range(1, len(images) + 1)
            axis.plot(ranks, images, label=shown, **style | {"linestyle": dashes})
    axis.set(xlabel="latent class, the largest first", ylabel="images")
    _log(axis, "x")
    _log(axis, "y")
    _legend(figure, axis)
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
    return Picture("classes", figure, caption, alt)


def _knn(knn: Mapping[str, float], order: Sequence[str]) -> Picture:
    """Draws k-NN accuracies."""
    figure, (axis,) = _panels(1, 0, height=0.8 + 0.3 * len(knn))
    for row, (name, accuracy) in enumerate(knn.items()):
        style = _style(order.index(name), len(order)) | {"linestyle": "none", "markersize": 7}
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
    return Picture("knn", figure, caption + "at 0.", f"k-NN accuracy: {shown}")


def _maps(maps: Mapping[str, Map]) -> Picture:
    """Draws maps of unique prototypes, one below the other, with the same colours."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    figure, axes = _panels(len(maps), 0, height=4.2)
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
        _log(bar.ax, "y", subs=(1.0, 2.0, 5.0) if largest < 50 else (1.0,))
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
    return Picture("tsne", figure, caption, alt)


# What figures have in common


def _panels(count: int, entries: int, height: float = HEIGHT) -> "tuple[Figure, Sequence[Axes]]":
    """Returns a figure of panels, one below the other, with room for a legend below."""
    from matplotlib.figure import Figure

    room = LEGEND_LINE * min(entries, LISTED + 1)
    figure = Figure((WIDTH, count * height + room), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _style(place: int, count: int) -> dict[str, Any]:
    """Returns the colour and marker of a result: of many, colours follow their order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= len(COLOURS):
        colour = COLOURS[place]
    else:
        colour = to_hex(colormaps["viridis"](0.05 + 0.8 * place / (count - 1)))
    return {"color": colour, "marker": MARKERS[place % len(MARKERS)]}


def _legend(figure: "Figure", axis: "Axes") -> None:
    """Adds the names of the results below the panels."""
    handles, labels = axis.get_legend_handles_labels()
    step = math.ceil(len(labels) / LISTED)
    chosen = sorted({*range(0, len(labels), step), len(labels) - 1})
    figure.legend(
        [handles[place] for place in chosen],
        [labels[place] for place in chosen],
        loc="outside lower left",
        fontsize=9,
        borderpad=0.2,
        labelspacing=0.3,
    )


def _log(axes: "Axes", which: str, subs: Sequence[float] = (1.0,)) -> None:
    """Makes the x or y axis logarithmic, with plain numbers at these multiples of powers of 10.

    An axis between two of these is widened, so that it has a number.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    if not any(low <= tick <= high for tick in axis.get_majorticklocs()):
        axes.set(**{f"{which}lim": (low / 10**0.5, high * 10**0.5)})


def _at_paper(result: Result) -> Mapping[str, Any]:
    """Returns the entry of the distance that is nearest to the paper's."""
    return min(result["eps"], key=lambda entry: abs(math.log(entry["eps"] / PAPER)))


def _distances(results: Mapping[str, Result]) -> str:
    """Returns the distances that figures of a single one show, such as `ε = 0.025`."""
    chosen = {name: f"{_at_paper(result)['eps']:g}" for name, result in results.items()}
    if len(set(chosen.values())) == 1:
        return f"ε = {next(iter(chosen.values()))}"
    return "ε = " + ", ".join(f"{distance} ({name})" for name, distance in chosen.items())


# Files


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def _svg(picture: Picture) -> str:
    """Returns a figure as an element of the page, whose text is text and whose ids are its own."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": picture.name}):
        picture.figure.savefig(
            content, format="svg", dpi=DPI, transparent=True, metadata={"Date": None}
        )
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    found = re.search(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>(.*)</svg>', text, flags=re.S)
    assert found, "matplotlib wrote no SVG"
    inside = found[2].replace("xlink:href", "href")
    for before in ('id="', 'href="#', "url(#"):
        inside = inside.replace(before, f"{before}{picture.name}-")
    inside = inside.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    alt = html.escape(picture.alt)
    return f'<svg {found[1]} role="img" aria-label="{alt}"><title>{alt}</title>{inside}</svg>'


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


def _table(results: Mapping[str, Result], knn: Mapping[str, float]) -> str:
    """Returns the numbers of each result as an HTML table."""
    columns = [*COLUMNS, *["k-NN, %"] * bool(knn)]
    lines = ["<tr><th></th>" + "".join(f"<th>{name}</th>" for name in columns) + "</tr>"]
    for name, result in results.items():
        values = [value(result) for value in COLUMNS.values()]
        if knn:
            values.append(100 * knn[name] if name in knn else None)
        cells = "".join(f"<td>{_cell(value)}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Partial collapse of prototypes</title>
<style>
:root { color-scheme: light dark;
  --ink: #24292f; --grid: #d0d7de; --paper: #fff; --faint: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --grid: #363c44; --paper: #14181d; --faint: #9aa4af; }
}
body { margin: 0 auto; padding: 16px; max-width: 1120px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 20px; font-weight: 600; margin: 0 0 12px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--grid);
  font-weight: 400; white-space: nowrap; }
tr:first-child th { color: var(--faint); white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; }
main { columns: 2 420px; column-gap: 40px; margin-top: 24px; }
figure { margin: 0 0 28px; break-inside: avoid; }
figure svg { width: 100%; max-width: 560px; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { color: var(--faint); font-size: 14px; max-width: 560px; }
</style>
</head>
<body>
<h1>Partial collapse of prototypes</h1>
<div class="scroll">{{table}}</div>
<main>
{{figures}}
</main>
</body>
</html>
"""
