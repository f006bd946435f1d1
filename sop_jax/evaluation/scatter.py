"""Maps of points in two dimensions, coloured by class: as a PNG and as an interactive HTML file."""

import colorsys
import html
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

from sop_jax.evaluation.fonts import Font, font_for

SIDE = 1000  # of the map, in pixels
LEGEND = 240  # the width of the legend, in pixels
MARGIN = 30
RADIUS = 4.0  # of a point
FINER = 2  # the PNG is drawn so many times larger and reduced, for smooth edges
FONT_SIZE, LINE = 15, 24
LISTED = 38  # the most classes in the legend of the PNG
OPACITY = 0.75
UNLABELLED, INK = "#4e79a7", "#222222"


class Points(NamedTuple):
    """What is drawn.

    Attributes:
        title: one line about the map.
        at: positions in any unit.
        names: the name of each point.
        labels: the class of each point, from 0; -1 for none.
        classes: the names of the classes, by label.
    """

    title: str
    at: Float[np.ndarray, "n 2"]
    names: Sequence[str]
    labels: Int[np.ndarray, " n"]
    classes: Sequence[str]


def colours(count: int) -> list[str]:
    """Returns colours for classes, as different as their number allows; `#rrggbb` each."""
    found = []
    for number in range(count):
        # Neighbours in hue differ in lightness and saturation.
        lightness, saturation = ((0.45, 0.75), (0.62, 0.6), (0.33, 0.65))[number % 3]
        rgb = colorsys.hls_to_rgb(number / max(count, 1), lightness, saturation)
        found.append("#" + "".join(f"{round(255 * part):02x}" for part in rgb))
    return found


def placed(at: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Returns the positions in pixels of a map of SIDE x SIDE, with equal units on both axes."""
    low, high = at.min(axis=0), at.max(axis=0)
    scale = (SIDE - 2 * MARGIN) / max(float((high - low).max()), 1e-12)
    centred = (at - (low + high) / 2) * scale
    return centred * np.array([1, -1]) + SIDE / 2  # y goes up


def colour_of(points: Points) -> list[str]:
    """Returns the colour of each point."""
    palette = colours(len(points.classes))
    return [palette[label] if label >= 0 else UNLABELLED for label in points.labels]


def present(points: Points) -> list[int]:
    """Returns the labels that occur, ascending, without -1."""
    return [int(label) for label in np.unique(points.labels) if label >= 0]


def draw_png(points: Points) -> Image.Image:
    """Returns the map with a legend of the classes that occur."""
    canvas = Image.new("RGB", (FINER * (SIDE + LEGEND), FINER * SIDE), "white")
    draw = ImageDraw.Draw(canvas, "RGBA")
    positions, inks = FINER * placed(points.at), colour_of(points)
    radius = FINER * RADIUS
    # In a random order, so that no class hides the others.
    for number in np.random.default_rng(0).permutation(len(inks)):
        x, y = positions[number]
        ink = f"{inks[number]}{round(255 * OPACITY):02x}"
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), ink)
    labels, palette = present(points), colours(len(points.classes))
    lines = [MARGIN + LINE * number for number in range(LISTED + 1)]
    for y, label in zip(lines, labels[:LISTED], strict=False):
        box = (SIDE + 4, y + 4, SIDE + 16, y + 16)
        draw.ellipse([FINER * edge for edge in box], palette[label])
    canvas = canvas.resize((SIDE + LEGEND, SIDE), Image.Resampling.BOX)
    draw, font = ImageDraw.Draw(canvas), font_for([points.title, *points.classes], FONT_SIZE)
    draw.text((MARGIN, 6), points.title, INK, font)
    words = [_fitting(points.classes[label], font) for label in labels[:LISTED]]
    words += [f"and {len(labels) - LISTED} more classes"] * (len(labels) > LISTED)
    for y, text in zip(lines, words, strict=False):
        draw.text((SIDE + 24, y), text, INK, font)
    return canvas


def _fitting(text: str, font: Font) -> str:
    """Returns the text, cut so that it fits the legend."""
    room = LEGEND - 24 - MARGIN
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"


def draw_html(points: Points) -> str:
    """Returns the map as a page that needs no other file.

    The pointer over a point shows its name and class, and a click on a class in the legend hides or
    shows its points.
    """
    content = {
        "at": np.round(placed(points.at), 2).tolist(),
        "names": list(points.names),
        "labels": points.labels.tolist(),
        "classes": list(points.classes),
        "present": present(points),
        "colours": colours(len(points.classes)),
        "unlabelled": UNLABELLED,
        "side": SIDE,
        "radius": RADIUS,
        "opacity": OPACITY,
    }
    # A name must not end the script.
    text = json.dumps(content).replace("<", "\\u003c")
    return PAGE.replace("{{title}}", html.escape(points.title)).replace("{{content}}", text)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{title}}</title>
<style>
body { margin: 0; padding: 12px 16px; font: 15px/1.5 system-ui, sans-serif; color: #222; }
h1 { font-size: 17px; font-weight: 600; margin: 0 0 8px; }
main { display: flex; gap: 24px; align-items: flex-start; }
canvas { max-width: 78vw; max-height: 90vh; border: 1px solid #ddd; }
#legend { max-height: 88vh; overflow-y: auto; margin: 0; padding: 0; list-style: none; }
#legend button { display: flex; gap: 8px; align-items: center; border: 0; background: none;
  font: inherit; color: inherit; padding: 1px 4px; cursor: pointer; text-align: left; }
#legend button[aria-pressed="false"] { opacity: 0.3; }
#legend i { width: 12px; height: 12px; border-radius: 50%; flex: none; }
#tip { position: fixed; pointer-events: none; background: #222; color: #fff; padding: 3px 8px;
  border-radius: 4px; font-size: 13px; max-width: 60ch; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{title}}</h1>
<main><canvas id="map"></canvas><ul id="legend"></ul></main>
<div id="tip" hidden></div>
<script id="content" type="application/json">{{content}}</script>
<script>
"use strict";
const map = JSON.parse(document.getElementById("content").textContent);
const canvas = document.getElementById("map"), tip = document.getElementById("tip");
const sharp = window.devicePixelRatio || 1, hidden = new Set();
canvas.width = canvas.height = map.side * sharp;
canvas.style.width = map.side + "px";
canvas.style.aspectRatio = "1";
const context = canvas.getContext("2d");
context.scale(sharp, sharp);

function colour(label) { return label < 0 ? map.unlabelled : map.colours[label]; }

function circle(point, radius) {
  context.beginPath();
  context.arc(point[0], point[1], radius, 0, 2 * Math.PI);
}

function draw(chosen) {
  context.globalAlpha = 1;
  context.clearRect(0, 0, map.side, map.side);
  context.globalAlpha = map.opacity;
  map.at.forEach((point, number) => {
    if (hidden.has(map.labels[number])) return;
    context.fillStyle = colour(map.labels[number]);
    circle(point, map.radius);
    context.fill();
  });
  if (chosen < 0) return;
  context.globalAlpha = 1;
  context.strokeStyle = "#000";
  context.lineWidth = 2;
  circle(map.at[chosen], map.radius + 2);
  context.stroke();
}

function nearest(x, y) {
  let best = -1, least = 10 * 10;
  map.at.forEach((point, number) => {
    const distance = (point[0] - x) ** 2 + (point[1] - y) ** 2;
    if (distance < least && !hidden.has(map.labels[number])) {
      least = distance;
      best = number;
    }
  });
  return best;
}

canvas.addEventListener("mousemove", (event) => {
  const box = canvas.getBoundingClientRect(), scale = map.side / box.width;
  const found = nearest((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
  draw(found);
  tip.hidden = found < 0;
  if (found < 0) return;
  const label = map.labels[found];
  tip.textContent = map.names[found] + (label < 0 ? "" : " \u2013 " + map.classes[label]);
  const left = event.clientX + 14, room = document.documentElement.clientWidth;
  tip.style.left = Math.max(0, Math.min(left, room - tip.offsetWidth - 4)) + "px";
  tip.style.top = event.clientY + 14 + "px";
});
canvas.addEventListener("mouseleave", () => { tip.hidden = true; draw(-1); });

for (const label of map.present) {
  const button = document.createElement("button"), dot = document.createElement("i");
  dot.style.background = colour(label);
  button.append(dot, map.classes[label]);
  button.setAttribute("aria-pressed", "true");
  button.addEventListener("click", () => {
    const shown = hidden.delete(label) || !hidden.add(label);
    button.setAttribute("aria-pressed", String(shown));
    draw(-1);
  });
  const item = document.createElement("li");
  item.append(button);
  document.getElementById("legend").append(item);
}
draw(-1);
</script>
</body>
</html>
"""
