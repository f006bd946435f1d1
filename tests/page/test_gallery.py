"""Pictures as HTML: that they can be decoded, are named, and that no name can end a script."""

import base64
import io
import json
import re

import numpy as np
from PIL import Image

from sop_jax.page.gallery import ACROSS, SIDE, TILE, Cell, Points, feature_map, grid, picture


def decoded(text: str) -> Image.Image:
    found = re.search(r"data:image/\w+;base64,([\w+/=]+)", text)
    assert found
    return Image.open(io.BytesIO(base64.b64decode(found[1])))


def test_small_pictures_keep_their_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    text = picture(image, "a < b")
    assert np.array_equal(np.asarray(decoded(text)), image)
    assert 'class="pixels"' in text and 'alt="a &lt; b"' in text


def test_large_pictures_are_reduced() -> None:
    text = picture(np.full((100, 400, 3), 200, np.uint8), "large")
    assert decoded(text).size == (SIDE, SIDE // 4) and "pixels" not in text


def test_a_grid_names_every_picture() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    rows = [[Cell(image, "one\n<i>", "first"), Cell(None, "none", "cannot be read")]]
    text = grid(["image", "other"], rows, "A caption. More")
    assert 'alt="first"' in text and 'aria-label="cannot be read"' in text
    assert "one\n&lt;i&gt;" in text and "<figcaption>A caption. More" in text
    assert text.count('class="first"') == 1 and 'aria-label="A caption"' in text


def points(count: int, name: str = "photo") -> Points:
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(count, dtype=np.uint8), 3 * 64).reshape(count, 8, 8, 3)
    return Points(
        "map",
        rng.normal(size=(count, 2)).astype(np.float32),
        images,
        [f"{name} {number}" for number in range(count)],
        np.arange(count, dtype=np.int32) % 3 - 1,
        ["cats", "dogs </script>"],
    )


def test_a_map_has_a_point_a_thumbnail_and_a_row_for_each_image() -> None:
    count = ACROSS + 3
    text = feature_map(points(count), "Map.")
    assert text.count("<circle") == count and text.count('scope="row"') == count
    content = re.search(r'<script type="application/json">(.*?)</script>', text)
    assert content
    data = json.loads(content[1])
    assert len(data["texts"]) == count and data["texts"][2] == "photo 2, dogs </script>"
    assert decoded(data["sprite"]).size == (ACROSS * TILE, 2 * TILE)
    fills = set(re.findall(r'fill="(#\w+)"', text))
    assert len(fills) == 3 and text.count("<li><i") == 2  # two classes, and images of none


def test_no_name_ends_the_script() -> None:
    text = feature_map(points(3, "</script><img src=x>"), "Map.")
    assert text.count("</script>") == 1 and "<img" not in text


def test_points_at_one_place() -> None:
    one = points(3)._replace(at=np.zeros((3, 2), np.float32), labels=np.full(3, -1, np.int32))
    text = feature_map(one, "Map.")
    assert text.count("<circle") == 3 and "nan" not in text and 'class="key"' not in text
