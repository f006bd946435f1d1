"""A picture of search results: one row per query, the query first, then its nearest images."""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from sop_jax.evaluation.fonts import Font, font_for

TILE = 128  # the side of the square that a thumbnail fits, in pixels
MARGIN = 8
LINE = 13  # the height of a line of text
FONT_SIZE = 11
LABELS = 3  # lines of text below a thumbnail: at most two of the name, and the cosine
QUERY_GAP = 12  # more space between the query and its neighbours

BACKGROUND, INK, FAINT = "white", "#222222", "#777777"
FRAME = "#c0392b"  # around queries


class Tile(NamedTuple):
    """A thumbnail and what is written below it.

    Attributes:
        image: uint8 [h, w, 3]; None for an image that cannot be read.
        name: the name of the image.
        note: a short text, such as the cosine.
    """

    image: np.ndarray | None
    name: str
    note: str


def contact_sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Returns the rows as one picture; the first tile of each row has a frame."""
    font = font_for((tile.name for row in rows for tile in row), FONT_SIZE)
    columns = max(len(row) for row in rows)
    step, height = TILE + MARGIN, TILE + LABELS * LINE + 2 * MARGIN
    size = (MARGIN + columns * step + QUERY_GAP, MARGIN + len(rows) * height)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for y, row in zip(range(MARGIN, size[1], height), rows, strict=False):
        for column, tile in enumerate(row):
            x = MARGIN + column * step + (QUERY_GAP if column else 0)
            _paste(sheet, draw, tile, (x, y))
            if column == 0:
                box = (x - 3, y - 3, x + TILE + 2, y + TILE + 2)
                draw.rectangle(box, outline=FRAME, width=2)
            lines = [*shorten(tile.name, font, TILE, LABELS - 1), tile.note]
            for number, text in enumerate(lines):
                ink = FAINT if number == len(lines) - 1 else INK
                draw.text((x, y + TILE + 4 + number * LINE), text, ink, font)
    return sheet


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, at: tuple[int, int]) -> None:
    """Puts the thumbnail in the middle of its square."""
    x, y = at
    if tile.image is None:
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=FAINT)
        return
    picture = Image.fromarray(tile.image)
    shrink = TILE / max(picture.size)
    small = picture.resize(
        [max(1, round(side * shrink)) for side in picture.size], Image.Resampling.LANCZOS
    )
    sheet.paste(small, (x + (TILE - small.width) // 2, y + (TILE - small.height) // 2))


def shorten(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Returns a text in lines that fit a width in pixels; its middle is left out if necessary.

    The beginning of a path is its class, and the end is the file, so that both remain readable.
    """

    def without(left_out: int) -> list[str]:
        kept = len(text) - left_out
        begin, end = kept // 3, kept - kept // 3
        short = text if not left_out else f"{text[:begin]}…{text[-end:]}"
        return _wrapped(short, font, width)

    fewest = bisect.bisect_left(range(len(text)), -lines, key=lambda n: -len(without(n)))
    return without(fewest)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Returns a text in lines of at most `width` pixels, and of at least one character."""
    found: list[str] = []
    while text:
        lengths = range(1, len(text) + 1)
        fits = bisect.bisect_right(
            lengths, width, key=lambda n: math.ceil(font.getlength(text[:n]))
        )
        found.append(text[: max(1, fits)])
        text = text[max(1, fits) :]
    return found
