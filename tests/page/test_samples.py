"""Pictures of a run: the names of images, and anchors without supports."""

import pathlib

import ml_collections
import numpy as np
import pytest
from begun import settings

from sop_jax.data.folders import FolderSource
from sop_jax.data.sources import DigitsSource
from sop_jax.data.subsets import Subset
from sop_jax.page.samples import grid_of_supports, name_of
from sop_jax.pictures.supports import Supported


def data(source: str, path: str = "", name: str = "") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(dict(source=source, path=path, name=name))


class Named(DigitsSource):
    """Digits with the names of another source."""

    def __init__(self, start: str, end: str = "") -> None:
        super().__init__("train")
        self.start, self.end = start, end

    def name(self, index: int) -> str:
        return f"{self.start}[{index}]{self.end}"


def test_names_do_not_have_the_folders_above_the_data(tmp_path: pathlib.Path) -> None:
    root = str(tmp_path / "caf\udce9 photos")
    source = FolderSource(f"{root}/train", ["cat/x.png", "dog/y.png"], None, None)
    for path in (root, f"{root}/"):
        assert name_of(source, 1, data("folder", path)) == "train/dog/y.png"
    part = Subset(source, np.array([1]))
    assert name_of(part, 0, data("folder", f"{root}/train")) == "dog/y.png"
    assert name_of(DigitsSource("test"), 3, data("digits")) == "digits:test[3]"
    packed = Named(f"{root}/x.npz:train")
    assert name_of(packed, 2, data("packed", f"{root}/x.npz")) == "x.npz:train[2]"


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("", "birds:1.0.0", "birds/1.0.0:train[0] a.jpg"),
        ("/home/me/sets", "birds", "birds/1.0.0:train[0] a.jpg"),
        ("/home/me/sets/birds/1.0.0", "", "1.0.0:train[0] a.jpg"),
    ],
)
def test_names_of_tfds(path: str, name: str, expected: str) -> None:
    source = Named("/home/me/sets/birds/1.0.0:train", " a.jpg")
    assert name_of(source, 0, data("tfds", path, name)) == expected


@pytest.mark.parametrize(("level", "words"), [("cls", "[CLS]"), ("patch", "patches")])
def test_anchors_without_supports_are_those_of_their_level(level: str, words: str) -> None:
    images = np.array([[0], [1], [-1]])
    ones = np.ones((3, 1), np.float32)
    anchors = Supported(level, prototypes=8, images=images, cosines=ones, votes=ones)
    text = grid_of_supports(anchors, settings("sop"), DigitsSource("train"))
    assert f"Anchors of {words} have no supports in this run." in text
    assert "digits:train[1]" in text and "a random row" in text
