"""Charts as elements of a page."""

import re
import xml.etree.ElementTree as ET

import matplotlib

from sop_jax.page import charts

NAME = 'run id="a" href="#b" url(#c) #24292f #d0d7de </svg> <b id="d">'


def test_names_stay_as_they_are_and_the_rest_is_adapted() -> None:
    with matplotlib.rc_context(charts.STYLE):
        figure, (axis,) = charts.panels(1, 1)
        axis.plot([1, 2], [1, 2], label=NAME, marker="o")
        charts.legend(figure, axis)
        text = charts.svg(charts.Chart("loss", figure, "A caption.", "A line."))
    drawn = ET.fromstring(text)
    assert NAME in ["".join(element.itertext()) for element in drawn.iter("text")]
    ids = {element.get("id") for element in drawn.iter()} - {None}
    assert ids and all(name.startswith("loss-") for name in ids if name)
    tags = "".join(re.findall(r"<[^>]*>", text))
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', tags)
    assert used and {one or other for one, other in used} <= ids
    assert "var(--ink)" in tags and "var(--grid)" in tags and charts.INK not in tags
