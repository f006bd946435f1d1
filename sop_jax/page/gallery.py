"""Pictures as parts of a page: grids of images with words below, and maps of points."""

import base64
import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from sop_jax.data.folders import printable
from sop_jax.evaluation.scatter import UNLABELLED, colours
from sop_jax.page import markup

SIDE = 144  # the longest side of a picture in the file, in pixels; the page shows 96
SMALL = 64  # pixels; smaller pictures are enlarged without smoothing
QUALITY = 82  # of JPEG

TILE = 48  # the side of the thumbnails of a map, in pixels; the page shows 96
ACROSS = 32  # thumbnails in a row
MAP, MARGIN, RADIUS = 640, 16, 5  # the side of a map, its margin and its points, in pixels
LISTED = 20  # the most classes that are explained


class Cell(NamedTuple):
    """A picture in a grid.

    Attributes:
        image: uint8 [h, w, 3]; None for an image that cannot be shown.
        text: what is written below it, in one or more lines.
        alt: what it is, for those who cannot see it.
    """

    image: UInt8[np.ndarray, "h w 3"] | None
    text: str
    alt: str


def picture(image: UInt8[np.ndarray, "h w 3"], alt: str) -> str:
    """Returns an image as an element of the page."""
    small = max(image.shape[:2]) <= SMALL
    content = io.BytesIO()
    drawn = Image.fromarray(image)
    if small:
        drawn.save(content, "PNG", optimize=True)
    else:
        drawn.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        drawn.save(content, "JPEG", quality=QUALITY)
    data = base64.b64encode(content.getvalue()).decode()
    kind, own = ("png", ' class="pixels"') if small else ("jpeg", "")
    return f'<img{own} alt="{markup.escape(alt)}" src="data:image/{kind};base64,{data}">'


def grid(columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> str:
    """Returns rows of pictures as a figure; the first of each row is framed.

    Args:
        columns: the names of the columns.
        rows: the pictures; rows can have fewer than there are columns.
        caption: what they show.
    """
    head = "".join(f'<th scope="col">{markup.escape(name)}</th>' for name in columns)
    lines = []
    for row in rows:
        cells = [f"<td>{_cell(cell)}</td>" for cell in row]
        cells[0] = cells[0].replace("<td>", '<td class="first">', 1)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    label = markup.escape(caption.split(".")[0])
    content = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">'
        f'<table class="gallery"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></div>"
    )
    return markup.figure(content, caption)


def _cell(cell: Cell) -> str:
    if cell.image is None:
        shown = f'<span class="sample" role="img" aria-label="{markup.escape(cell.alt)}"></span>'
    else:
        shown = picture(cell.image, cell.alt)
    text = "\n".join(map(markup.escape, cell.text.split("\n")))
    return f'{shown}<span class="name">{text}</span>'


class Points(NamedTuple):
    """A map of images.

    Attributes:
        name: its id on the page.
        at: the positions, in any unit.
        images: the images.
        names: their names.
        labels: their classes, from 0; -1 for none.
        classes: the names of the classes, by label.
    """

    name: str
    at: Float[np.ndarray, "n 2"]
    images: UInt8[np.ndarray, "n S S 3"]
    names: Sequence[str]
    labels: Int[np.ndarray, " n"]
    classes: Sequence[str]


def feature_map(points: Points, caption: str) -> str:
    """Returns a map as a figure, whose thumbnails appear below the pointer or at arrow keys.

    `MAP_SCRIPT` has to be part of the page.
    """
    low, high = points.at.min(axis=0), points.at.max(axis=0)
    scale = (MAP - 2 * MARGIN) / max(float((high - low).max()), 1e-12)
    height = float((high - low)[1]) * scale + 2 * MARGIN
    middle = np.array([MAP / 2, height / 2])
    placed = (points.at - (low + high) / 2) * scale * np.array([1, -1]) + middle
    palette = colours(len(points.classes))
    inks = [palette[label] if label >= 0 else UNLABELLED for label in points.labels]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{ink}"/>'
        for (x, y), ink in zip(placed, inks, strict=True)
    )
    present = [int(label) for label in np.unique(points.labels) if label >= 0]
    key = [_explained(palette[label], points.classes[label]) for label in present[:LISTED]]
    key += [f"<li>and {len(present) - LISTED} more classes</li>"] * (len(present) > LISTED)
    texts = [
        name + (f", {points.classes[label]}" if label >= 0 else "")
        for name, label in zip(points.names, points.labels, strict=True)
    ]
    content = {
        "texts": [printable(text) for text in texts],
        "sprite": _sprite(points.images),
        "across": ACROSS,
        "tile": TILE,
    }
    data = json.dumps(content).replace("<", "\\u003c")  # a name must not end the script
    rows = [
        [name, points.classes[label] if label >= 0 else None, f"{x:.0f}", f"{height - y:.0f}"]
        for name, label, (x, y) in zip(points.names, points.labels, placed, strict=True)
    ]
    table = markup.table(["image", "class", "x", "y"], rows, "Images of the map")
    label = f"Map of {len(points.names)} images; arrow keys move from point to point"
    drawn = (
        f'<div class="map" id="{points.name}" tabindex="0" role="group" aria-label="{label}">'
        f'<svg viewBox="0 0 {MAP} {height:.0f}" aria-hidden="true">{dots}</svg>'
        '<div class="tip" hidden></div><p class="unseen" aria-live="polite"></p>'
        f'<script type="application/json">{data}</script></div>'
    )
    legend = f'<ul class="key" aria-label="Classes">{"".join(key)}</ul>' if key else ""
    more = markup.details("Numbers: positions of the images", table)
    return markup.figure(drawn + legend, caption) + more


def _explained(colour: str, name: str) -> str:
    return f'<li><i style="background:{colour}"></i>{markup.escape(name)}</li>'


def _sprite(images: UInt8[np.ndarray, "n S S 3"]) -> str:
    """Returns all thumbnails as one image, row by row, as the address of its data."""
    rows = -(-len(images) // ACROSS)
    sheet = Image.new("RGB", (TILE * min(ACROSS, len(images)), TILE * rows))
    for place, image in enumerate(images):
        small = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(small, (TILE * (place % ACROSS), TILE * (place // ACROSS)))
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


MAP_SCRIPT = """
for (const map of document.querySelectorAll(".map")) {
  const data = JSON.parse(map.querySelector("script").textContent);
  const dots = [...map.querySelectorAll("circle")];
  const at = dots.map((dot) => [+dot.getAttribute("cx"), +dot.getAttribute("cy")]);
  const svg = map.querySelector("svg"), tip = map.querySelector(".tip");
  const voice = map.querySelector("p"), picture = document.createElement("i");
  const words = document.createElement("span"), shown = 2 * data.tile;
  let here = -1;
  tip.append(picture, words);
  picture.style.width = picture.style.height = shown + "px";
  picture.style.backgroundImage = "url(" + data.sprite + ")";
  picture.style.backgroundSize =
    Math.min(data.across, dots.length) * shown + "px auto";

  function show(found, aloud) {
    if (here >= 0) dots[here].classList.remove("here");
    here = found;
    tip.hidden = found < 0;
    if (found < 0) return;
    dots[found].classList.add("here");
    svg.append(dots[found]);  // above the others
    words.textContent = data.texts[found];
    if (aloud) voice.textContent = data.texts[found];
    const left = found % data.across, top = Math.floor(found / data.across);
    picture.style.backgroundPosition = -left * shown + "px " + -top * shown + "px";
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    const x = at[found][0] * scale, y = at[found][1] * scale;
    tip.style.left = Math.max(0, Math.min(x + 12, map.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = Math.max(0, y - tip.offsetHeight - 12 < 0 ? y + 12
      : y - tip.offsetHeight - 12) + "px";
  }

  function nearest(test, cost) {
    let best = -1, least = Infinity;
    at.forEach((point, number) => {
      if (number !== here && test(point) && cost(point) < least) {
        least = cost(point);
        best = number;
      }
    });
    return best;
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    const far = ([a, b]) => (a - x) ** 2 + (b - y) ** 2;
    if (here >= 0 && far(at[here]) < 36) return;
    show(nearest((point) => far(point) < 225, far), false);
  });
  svg.addEventListener("pointerleave", () => show(-1, false));
  map.addEventListener("blur", () => show(-1, false));
  map.addEventListener("keydown", (event) => {
    const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (event.key === "Escape") return show(-1, false);
    if (!(event.key in way)) return;
    event.preventDefault();
    if (here < 0) {
      const {width, height} = svg.viewBox.baseVal;
      const far = ([a, b]) => (a - width / 2) ** 2 + (b - height / 2) ** 2;
      return show(nearest(() => true, far), true);
    }
    const [dx, dy] = way[event.key], [x, y] = at[here];
    const along = ([a, b]) => (a - x) * dx + (b - y) * dy;
    const aside = ([a, b]) => Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
    const found = nearest((point) => along(point) > 0 && along(point) >= aside(point),
      (point) => along(point) + aside(point));
    if (found >= 0) show(found, true);
  });
}
"""
