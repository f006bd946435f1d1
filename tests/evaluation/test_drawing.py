"""Contact sheets and maps of points: what is shown where, and that pages need no other file."""

import json
import re

import numpy as np
import pytest
from PIL import ImageFont

from sop_jax.evaluation import contact_sheet as sheets
from sop_jax.evaluation import fonts, scatter
from sop_jax.evaluation.contact_sheet import Tile, contact_sheet, shorten
from sop_jax.evaluation.fonts import font_for
from sop_jax.evaluation.scatter import Points, colours, draw_html, draw_png, placed


def plain(colour: tuple[int, int, int], height: int = 40, width: int = 80) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def test_a_row_shows_the_query_and_then_its_neighbours():
    rows = [
        [Tile(plain((200, 0, 0)), "q", ""), Tile(plain((0, 200, 0)), "a", "0.9")],
        [Tile(plain((0, 0, 200)), "r", "")],
    ]
    pixels = np.asarray(contact_sheet(rows))
    middle = sheets.MARGIN + sheets.TILE // 2
    below = middle + sheets.TILE + sheets.LABELS * sheets.LINE + 2 * sheets.MARGIN
    right = middle + sheets.TILE + sheets.MARGIN + sheets.QUERY_GAP
    assert pixels[middle, middle].tolist() == [200, 0, 0]
    assert pixels[middle, right].tolist() == [0, 200, 0]
    assert pixels[below, middle].tolist() == [0, 0, 200]
    assert pixels[below, right].tolist() == [255, 255, 255]


def test_the_query_only_has_a_frame():
    tiles = [Tile(plain((0, 0, 0)), name, "") for name in "ab"]
    framed = (np.asarray(contact_sheet([tiles])) == (192, 57, 43)).all(axis=-1)
    columns = np.flatnonzero(framed.any(axis=0))
    assert columns.min() < sheets.MARGIN and columns.max() < sheets.TILE + 2 * sheets.MARGIN


def test_an_image_that_cannot_be_read_has_an_empty_square():
    pixels = np.asarray(contact_sheet([[Tile(None, "broken.jpg", "")]]))
    middle = sheets.MARGIN + sheets.TILE // 2
    assert pixels[middle, middle].tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", ["été.jpg", "фото.jpg", "ελλάδα"])
def test_names_in_other_scripts_are_drawn(name: str) -> None:
    def drawn(text: str) -> bytes:
        return bytes(font_for([name], 11).getmask(text))

    letters = [letter for letter in name if not letter.isascii()]
    assert all(drawn(letter) != drawn("\uffff") for letter in letters)  # which no font has
    sheet = np.asarray(contact_sheet([[Tile(None, name, "")]]))
    boxes = np.asarray(contact_sheet([[Tile(None, "\uffff" * len(name), "")]]))
    assert (sheet != boxes).any()


def test_without_a_font_for_them_names_are_drawn_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fonts, "_wide", lambda: iter(["no such font.ttf"]))
    assert contact_sheet([[Tile(None, "фото.jpg", "")]]).width > sheets.TILE


@pytest.mark.parametrize("name", ["a.jpg", "n01440764/ILSVRC2012_val_00000293.JPEG", "x" * 300])
def test_names_fit_and_keep_their_ends(name):
    font = ImageFont.load_default(sheets.FONT_SIZE)
    lines = shorten(name, font, sheets.TILE, 2)
    assert len(lines) <= 2 and all(font.getlength(line) <= sheets.TILE for line in lines)
    text = "".join(lines)
    begin, _, end = text.partition("…")
    assert name.startswith(begin) and name.endswith(end)
    if len(name) > 100:
        assert "…" in text


def points(classes: int = 3) -> Points:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % classes
    labels[:5] = -1
    names = [f"val/</script>&{i}.jpg" for i in range(60)]
    return Points("A <map>", rng.normal(size=(60, 2)), names, labels, list("abcdefgh")[:classes])


def test_colours_of_classes_differ():
    for count in (1, 10, 100):
        found = colours(count)
        assert len(set(found)) == count
        assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in found)


def test_positions_keep_their_proportions_inside_the_map():
    at = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]])
    found = placed(at)
    assert found.min() >= scatter.MARGIN and found.max() <= scatter.SIDE - scatter.MARGIN
    width, height = found[1] - found[0], found[2] - found[0]
    assert width[0] == pytest.approx(-2 * height[1])  # y goes up
    assert np.isfinite(placed(np.zeros((3, 2)))).all()


def test_the_picture_shows_every_class_at_its_points():
    drawn = points()
    pixels = np.asarray(draw_png(drawn)).astype(int)
    for x, y in np.round(placed(drawn.at)).astype(int):
        assert pixels[y, x].min() < 230  # not the background
    legend = pixels[:, scatter.SIDE :].reshape(-1, 3)
    for colour in colours(3):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (legend == rgb).all(axis=1).any()


def test_many_classes_do_not_overflow_the_legend():
    count = 300
    drawn = Points(
        "many", np.eye(2)[np.arange(count) % 2], ["x"] * count, np.arange(count), ["c"] * count
    )
    assert draw_png(drawn).size == (scatter.SIDE + scatter.LEGEND, scatter.SIDE)


def test_the_page_contains_all_points_and_refers_to_nothing_else():
    drawn = points()
    page = draw_html(drawn)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2  # no name ends a script
    content = json.loads(scripts[0])
    assert content["names"] == drawn.names and content["labels"] == drawn.labels.tolist()
    assert content["classes"] == ["a", "b", "c"] and len(content["at"]) == 60
    assert not re.search(r"(src|href)=|https?:|url\(|@import", page)
    assert "<title>A &lt;map&gt;</title>" in page
