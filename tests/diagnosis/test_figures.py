"""Figures of collapse: what is drawn for which results, and that the page needs no other file."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sop_jax.diagnosis import figures
from sop_jax.diagnosis.diagnosis import Result, diagnose
from sop_jax.diagnosis.figures import LEAST, Map, draw, map_of
from sop_jax.diagnosis.uniqueness import covers
from sop_jax.errors import UserError
from sop_jax.page import charts

DIM = 8


def prototypes(directions: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    known = rng.normal(size=(directions, DIM)).astype(np.float32)
    return known[rng.integers(0, directions, 60)]


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    features = np.random.default_rng(1).normal(size=(50, DIM)).astype(np.float32)
    return {
        "joint <&> $x$": diagnose(prototypes(9), features, [0.001, 0.025, 0.5]),
        "apart": diagnose(np.eye(DIM, dtype=np.float32), features, [0.02, 0.3]),
        "no data": diagnose(prototypes(40)),
    }


class Page(HTMLParser):
    """Collects what a page refers to, its ids, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.links += [found[name] for name in ("href", "src") if name in found]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(found.values()))
        self.ids += [found["id"]] if "id" in found else []
        self.labels += [found["aria-label"]] if tag == "svg" else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_files_of_several_results(results, tmp_path):
    maps = {"no data": map_of(prototypes(40), covers(prototypes(40), [0.025])[0], 0)}
    files = draw(results, tmp_path / "new" / "folder", {"apart": 0.914, "no data": 0.5}, maps)
    names = ["unique", "share", "classes", "knn", "tsne"]
    assert files == [*(f"{name}.png" for name in names), "diagnosis.html"]
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == set(files)
    for name in names:
        with Image.open(tmp_path / "new" / "folder" / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(2**20)) > 5
    text = (tmp_path / "new" / "folder" / "diagnosis.html").read_text()
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert len(page.labels) == 5
    assert page.labels[0].startswith("Share of unique prototypes") and "100 % at 0.02" in text
    assert "k-NN accuracy: apart 91.4 %, no data 50.0 %" in page.labels[3]
    assert page.text.count("joint <&> $x$") >= 2  # escaped, and not read as a formula
    assert "prefers-color-scheme: dark" in text and charts.INK not in text.split("<main")[1]
    cells = re.findall(r"<td>(.*?)</td>", text)
    width = len(figures.COLUMNS) + 1
    assert cells[:4] == ["60", "0.025", "9", "15.00"] and cells[width - 1] == "–"
    assert cells[2 * width - 1] == "91.40"


def test_only_what_is_known_is_drawn(results, tmp_path):
    assert draw({"no data": results["no data"]}, tmp_path) == ["unique.png", "diagnosis.html"]


def test_every_axis_has_a_number_where_all_prototypes_differ(results):
    apart = results["apart"]
    entries = [entry | {"share_mean_soft": [0.1249]} for entry in apart["eps"]]
    picture = figures._shares({"apart": apart | {"eps": entries}}, ["apart"])
    for axes in picture.figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            assert any(low <= tick <= high for tick in axis.get_majorticklocs())


def test_the_same_results_give_the_same_files(results, tmp_path):
    for folder in ("one", "other"):
        files = draw(results, tmp_path / folder)
    for name in files:
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("one", "other"))
        assert one == other


def test_many_epochs_share_a_short_legend(tmp_path):
    runs = {f"epoch {n}": diagnose(prototypes(60 - 2 * n)) for n in range(25)}
    draw(runs, tmp_path)
    text = (tmp_path / "diagnosis.html").read_text()
    drawn = text.split("<main")[1].split("</title>")[1]
    named = [name for name in runs if f"{name}:" in drawn]
    assert len(named) <= charts.LISTED + 1 and {"epoch 0", "epoch 24"} <= set(named)
    table = text.split("<svg")[0]
    assert all(f">{name}</th>" in table for name in runs)


def test_a_map_shows_the_representatives(monkeypatch):
    rows = prototypes(30)
    (cover,) = covers(rows, [0.025])
    found = map_of(rows, cover, seed=3)
    assert found.at.shape == (len(cover.representatives), 2) and np.isfinite(found.at).all()
    np.testing.assert_array_equal(found.redundancy, cover.redundancy)
    assert (found.eps, found.unique) == (0.025, len(cover.representatives))
    np.testing.assert_array_equal(found.at, map_of(rows, cover, seed=3).at)
    monkeypatch.setattr(figures, "MOST", 12)
    sampled = map_of(rows, cover, seed=3)
    assert len(sampled.at) == 12 and sampled.unique == len(cover.representatives)
    assert not np.array_equal(sampled.redundancy, map_of(rows, cover, seed=4).redundancy)


def test_there_is_no_map_of_a_few():
    rows = prototypes(LEAST - 1)
    assert map_of(rows, covers(rows, [0.025])[0], seed=0) is None


def test_a_sampled_map_is_said_to_be_one(results, tmp_path):
    one = Map(np.zeros((3, 2), np.float32), np.array([1, 1, 1]), 0.025, 5001)
    draw({"no data": results["no data"]}, tmp_path, maps={"no data": one})
    assert "so many are drawn at random" in (tmp_path / "diagnosis.html").read_text()


def test_figures_without_matplotlib(monkeypatch, results, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(UserError, match=r"not installed.*pip install -e '.\[plot\]'"):
        draw(results, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.medium
def test_only_drawing_imports_matplotlib():
    code = "import sys, sop_jax.diagnosis.figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
