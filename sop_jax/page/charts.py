"""Charts: their style, their scales, and how they become part of a page.

They are drawn by matplotlib, which is not installed with the package: `pip install -e '.[plot]'`.
"""

import importlib.util
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sop_jax.errors import UserError
from sop_jax.page import markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


class Chart(NamedTuple):
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
            "package. Run: pip install -e '.[plot]'"
        )


def panels(count: int, entries: int, height: float = HEIGHT) -> "tuple[Figure, Sequence[Axes]]":
    """Returns a figure of panels, one below the other, with room for a legend below."""
    from matplotlib.figure import Figure

    room = LEGEND_LINE * min(entries, LISTED + 1)
    figure = Figure((WIDTH, count * height + room), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def style_of(place: int, count: int) -> dict[str, Any]:
    """Returns the colour and marker of a result: of many, colours follow their order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= len(COLOURS):
        colour = COLOURS[place]
    else:
        colour = to_hex(colormaps["viridis"](0.05 + 0.8 * place / (count - 1)))
    return {"color": colour, "marker": MARKERS[place % len(MARKERS)]}


def legend(figure: "Figure", axis: "Axes") -> None:
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


def log_scale(axes: "Axes", which: str, subs: Sequence[float] = (1.0,)) -> None:
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


def png(figure: "Figure") -> bytes:
    """Returns a figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def svg(chart: Chart) -> str:
    """Returns a figure as an element of the page, whose text is text and whose ids are its own."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": chart.name}):
        chart.figure.savefig(
            content, format="svg", dpi=DPI, transparent=True, metadata={"Date": None}
        )
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    found = re.search(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>(.*)</svg>', text, flags=re.S)
    assert found, "matplotlib wrote no SVG"

    def adapt(tag: re.Match[str]) -> str:
        own = tag[0].replace("xlink:href", "href")
        for before in ('id="', 'href="#', "url(#"):
            own = own.replace(before, f"{before}{chart.name}-")
        return own.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")

    inside = re.sub(r"<[^>]*>", adapt, found[2])  # tags only: a name stays as it is
    alt = markup.escape(chart.alt)
    return f'<svg {found[1]} role="img" aria-label="{alt}"><title>{alt}</title>{inside}</svg>'


def figure(chart: Chart, more: str = "") -> str:
    """Returns a chart with its caption as a part of a page; `more` is HTML below the caption."""
    caption = f"{markup.escape(chart.caption)}{more}"
    return f"<figure>{svg(chart)}<figcaption>{caption}</figcaption></figure>"
