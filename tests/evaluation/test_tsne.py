"""Maps of the digits by t-SNE: files, seeds and the sample of images."""

import copy
import csv
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from subjects import toolbox, untrained

from sop_jax.errors import UserError
from sop_jax.evaluation import tsne

DIGITS = {"source": "digits"}


def opened(**changes: Any) -> tuple[Any, tsne.Inputs]:
    settings = tsne.settings()
    settings.update(iterations=300, **changes)
    config = copy.deepcopy(untrained().config)
    return settings, tsne.open_inputs(config, settings, DIGITS)


def measure(folder: pathlib.Path | None, **changes: Any) -> tuple[dict[str, Any], str]:
    settings, inputs = opened(**changes)
    result = tsne.run(untrained(), inputs, settings, toolbox(folder))
    return result, tsne.table(result, settings)


@pytest.mark.medium
def test_a_map_of_the_digits(tmp_path):
    result, text = measure(tmp_path / "map", images=120)
    assert (result["images"], result["unreadable"]) == (120, 0) and result["divergence"] > 0
    assert "a map of 120 images" in text
    files = {file.name for file in (tmp_path / "map").iterdir()}
    assert files == {"tsne.png", "tsne.html", "tsne.csv"}
    with open(tmp_path / "map" / "tsne.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["name"] for row in rows}) == 120
    assert {row["class"] for row in rows} == set("0123456789")
    page = (tmp_path / "map" / "tsne.html").read_text()
    assert all(row["name"] in page for row in rows)
    with Image.open(tmp_path / "map" / "tsne.png") as picture:
        assert len(picture.getcolors(2**20)) > 10
    measure(tmp_path / "again", images=120)
    for name in files:
        mine, again = ((tmp_path / folder / name).read_bytes() for folder in ("map", "again"))
        assert mine == again  # seeded


@pytest.mark.medium
def test_neighbours_in_features_are_neighbours_in_the_map(tmp_path):
    rng = np.random.default_rng(0)
    truth = np.arange(60) % 3
    vectors = (10 * np.eye(3, 8)[truth] + rng.normal(size=(60, 8))).astype(np.float32)
    settings = tsne.settings()
    settings.update(perplexity=10.0, iterations=500)
    at, _ = tsne.embed(vectors, settings, 0)
    distances = np.linalg.norm(at[:, None] - at[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (truth[distances.argmin(axis=1)] == truth).all()


def test_images_are_drawn_by_seed():
    _, inputs = opened(images=50)
    again = opened(images=50)[1].images
    assert len(inputs.images) == 50 and inputs.images.digest == again.digest
    names = [inputs.images.name(i) for i in range(50)]
    assert len(set(names)) == 50
    assert len(opened(images=5000)[1].images) == 360  # all there are


def test_a_map_without_a_folder_is_measured_only():
    result, _ = measure(None, images=40, perplexity=5.0)
    assert result["images"] == 40


def test_settings_that_do_not_fit_the_images():
    with pytest.raises(UserError, match="eval.perplexity is 30, but the map has 20 images"):
        opened(images=20)
