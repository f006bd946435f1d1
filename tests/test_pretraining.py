"""Pretraining in Python, which does what the command does."""

import json
import pathlib
import threading

import numpy as np
import pytest
from PIL import Image

import sop_jax
from sop_jax.errors import UserError
from sop_jax.pretraining import pretrain

pytestmark = pytest.mark.medium

TINY = {
    "steps": 2,
    "batch_size": 8,
    "data.workers": 0,
    "model.size": "custom",
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "model.patch": 8,
    "augment.global_size": 16,
    "augment.local_size": 8,
    "augment.local_crops": 1,
    "head.hidden": 16,
    "head.dim": 8,
    "sop.cls.memory": 32,
    "sop.patch.memory": 32,
    "sop.cls.anchors": 8,
    "sop.patch.anchors": 8,
    "sop.cls.supports": 2,
    "sop.patch.supports": 2,
    "eval.resize": 16,
    "eval.crop": 16,
}


@pytest.fixture
def photos(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "my photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def test_it_trains_resumes_and_returns_the_network(
    photos: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    summary, network = sop_jax.pretrain(images=photos, workdir=workdir, **TINY)
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 2 and network.step == 2
    assert network.features(photos).shape == (40, 16)
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"]["path"] == str(photos) and config["model"]["width"] == 16
    assert "Settings, chosen for these images" in capfd.readouterr().err
    again = sop_jax.pretrain(photos, workdir, **TINY)
    np.testing.assert_array_equal(again.network.features(photos), network.features(photos))
    assert "nothing is chosen again" in capfd.readouterr().err
    with pytest.raises(UserError, match="batch_size"):
        pretrain(photos, workdir, **TINY | {"batch_size": 16})


def test_nonsense_is_refused(photos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="epochz.*did you mean epochs"):
        pretrain(photos, tmp_path / "run", epochz=3)
    with pytest.raises(UserError, match="data.path is given, but so is the folder"):
        pretrain(photos, tmp_path / "run", **{"data.path": "elsewhere"})
    with pytest.raises(UserError):
        pretrain(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_main_thread_can_be_interrupted(
    photos: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    errors: list[Exception] = []

    def call() -> None:
        try:
            pretrain(photos, tmp_path / "run")
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    (error,) = errors
    assert "call it in the main thread" in str(error)
