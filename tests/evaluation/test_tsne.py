"""Maps of the digits by t-SNE: files, seeds and the sample of images."""

import copy
import csv
import os
import pathlib
import signal
import threading
import time
from typing import Any

import numpy as np
import processes
import pytest
from etils import epath
from PIL import Image
from subjects import toolbox, untrained
from test_evaluate import make_run

from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluation import tsne
from sop_jax.evaluation.tables import text_of
from sop_jax.parallel.interruption import Interruption

DIGITS = {"source": "digits"}


def opened(**changes: Any) -> tuple[Any, tsne.Inputs]:
    settings = tsne.settings()
    settings.update(iterations=300, **changes)
    config = copy.deepcopy(untrained().config)
    return settings, tsne.open_inputs(config, settings, DIGITS)


def measure(folder: pathlib.Path | None, **changes: Any) -> tuple[dict[str, Any], str]:
    settings, inputs = opened(**changes)
    result = tsne.run(untrained(), inputs, settings, toolbox(folder))
    return result, text_of(tsne.table(result, settings))


@pytest.mark.medium
def test_a_map_of_the_digits(tmp_path):
    result, text = measure(tmp_path / "map", images=120)
    assert (result["images"], result["unreadable"]) == (120, 0) and result["divergence"] > 0
    assert "a map of 120 images is in tsne.png, tsne.html, tsne.csv" in text
    files = {file.name for file in (tmp_path / "map").iterdir()}
    assert files == {"tsne.png", "tsne.html", "tsne.csv"} == set(result["files"])
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
    result, text = measure(None, images=40, perplexity=5.0)
    assert result["images"] == 40 and result["files"] == []
    assert text.startswith("a map of 40 images was not saved")


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_a_map_that_takes_long(number, monkeypatch):
    settings, inputs = opened(images=300)
    embed = tsne.embed

    def embed_for_long(*arguments: Any) -> None:
        """Computes the map again and again: how long one takes depends on the machine."""
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            embed(*arguments)
        pytest.fail("the signal had no effect")

    monkeypatch.setattr(tsne, "embed", embed_for_long)
    with Interruption() as interruption:
        box = toolbox(interruption=interruption)
        with pytest.raises(Interrupted, match="interrupted"):
            tsne.run(untrained(), inputs, settings, box)


@pytest.mark.slow
def test_the_command_ends_at_the_first_signal_and_keeps_the_features(tmp_path):
    make_run(tmp_path / "run", (3,))
    command = [
        *("-m", "sop_jax.evaluate", f"--workdir={tmp_path / 'run'}", "--task=tsne"),
        *("--eval.split=train", "--eval.images=1400", "--eval.iterations=1000000"),
    ]
    with processes.start([command], tmp_path / "logs", devices=1) as started:
        until = time.monotonic() + 120
        while "computing the map" not in (tmp_path / "logs" / "0.err").read_text():
            assert time.monotonic() < until and started.running[0].poll() is None, started.end(0)
            time.sleep(0.02)
        started.signal(0, signal.SIGINT)  # in the few milliseconds before the map, or in the map
        (ended,) = started.end(30)
    assert ended.code == 130 and "the features are kept" in ended.err, ended
    assert not list((tmp_path / "run" / "evaluations").glob("*.json"))


def test_a_signal_before_the_map_ends_it(tmp_path):
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        box = toolbox(interruption=interruption, cache=epath.Path(tmp_path))
        kept = "the features are kept, and the same command"
        with pytest.raises(Interrupted, match=kept), box.at_once():
            pytest.fail("the context was entered")


def test_settings_that_do_not_fit_the_images():
    with pytest.raises(UserError, match="eval.perplexity is 30, but the map has 20 images"):
        opened(images=20)
