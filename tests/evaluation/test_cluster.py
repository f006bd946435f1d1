"""Clusters of the digits, and of files of assignments."""

import copy
import os
import pathlib
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score
from subjects import toolbox, untrained
from test_evaluate import make_run

from sop_jax.data.sources import DigitsSource
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluate import Asked, evaluate
from sop_jax.evaluation import cluster
from sop_jax.evaluation.tables import text_of
from sop_jax.parallel.interruption import Interruption

DIGITS = {"source": "digits"}


def measure(data: dict[str, str], **changes: Any) -> tuple[dict[str, Any], str]:
    """Returns the result and the table of the task with a few settings changed."""
    settings = cluster.settings()
    settings.update({} if "assignments" in changes else {"starts": 2}, **changes)
    inputs = cluster.open_inputs(copy.deepcopy(untrained().config), settings, data)
    result = cluster.run(untrained(), inputs, settings, toolbox())
    return result, text_of(cluster.table(result, settings))


@pytest.mark.medium
def test_clusters_of_the_digits():
    result, text = measure(DIGITS)
    assert (result["images"], result["clusters"], result["classes"]) == (360, 10, 10)
    assert 0.1 < result["accuracy"] <= result["accuracy_majority"] < 1
    assert 0.05 < result["nmi"] < 1 and result["unreadable"] == 0
    assert measure(DIGITS)[0] == result  # seeded
    assert f"{100 * result['accuracy']:.2f}" in text
    finer, _ = measure(DIGITS, clusters=50)
    assert finer["clusters"] == 50 and finer["accuracy"] < finer["accuracy_majority"]
    train, _ = measure(DIGITS, split="train", clusters=5)
    assert train["images"] == 1437


def test_well_separated_clusters_are_found_whatever_their_norm():
    rng = np.random.default_rng(0)
    truth = np.arange(90) % 3
    rows = np.eye(3, dtype=np.float32)[truth] + rng.normal(0, 0.05, (90, 3)).astype(np.float32)
    found = cluster.k_means(rows, 3, 2, 100, toolbox())
    assert normalized_mutual_info_score(truth, found) == pytest.approx(1)


def test_k_means_can_be_interrupted_between_two_starts(monkeypatch):
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    box, rows = toolbox(), np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    monkeypatch.setattr(box, "between", stop)
    cluster.k_means(rows, 3, 1, 10, box)
    with pytest.raises(Stopped):
        cluster.k_means(rows, 3, 2, 10, box)


def test_the_first_signal_ends_one_start_of_k_means():
    rows = np.random.default_rng(0).normal(size=(60_000, 16)).astype(np.float32)
    with Interruption() as interruption:
        box = toolbox(interruption=interruption)
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with pytest.raises(Interrupted, match="interrupted"):
            cluster.k_means(rows, 2_000, 1, 10_000, box)  # minutes
    assert time.monotonic() - began < 20


# Assignments


def test_given_assignments_need_no_features(tmp_path):
    digits = DigitsSource("test")
    names = [digits.name(i) for i in range(len(digits))]
    path = tmp_path / "clusters.npz"
    np.savez(path, names=np.array(names[::-1]), clusters=digits.labels[::-1] + 100)
    result, _ = measure(DIGITS, assignments=str(path))
    assert result["accuracy"] == result["nmi"] == 1 and result["images"] == 360


def write_folder(root: pathlib.Path) -> dict[str, str]:
    for name in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/4,5.png"):
        (root / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / "val" / name)
    return {"path": str(root), "train_split": "val", "test_split": "val"}


def test_settings_of_k_means_have_no_effect_on_given_assignments(tmp_path):
    for changes in (dict(starts=2), dict(clusters=3), dict(crop=8, resize=8)):
        with pytest.raises(UserError, match="would have no effect: --eval.assignments is measured"):
            measure(DIGITS, assignments=str(tmp_path / "clusters.csv"), **changes)


@pytest.mark.medium
def test_assignments_that_were_changed_are_measured_again(tmp_path):
    make_run(tmp_path / "run", (3,))
    digits, path = DigitsSource("test"), tmp_path / "clusters.npz"
    names = np.array([digits.name(i) for i in range(len(digits))])
    found = []
    for clusters in (digits.labels, np.zeros_like(digits.labels)):
        np.savez(path, names=names, clusters=clusters)
        record = evaluate(Asked(tmp_path / "run"), "cluster", {"assignments": str(path)}, DIGITS)
        found.append(record["results"]["nmi"])
    assert found == [1, 0]
    assert record["data"]["source"] == "digits" and record["data"]["images"]["images"] == 360


@pytest.mark.parametrize("header", ["", "name,cluster\n"])
def test_names_in_tables_are_those_below_the_folder_of_the_split(tmp_path, header):
    data = write_folder(tmp_path)
    path = tmp_path / "clusters.csv"
    path.write_text(f'{header}cat/1.png,7\ncat/2.png,7\ndog/3.png,-1\n"dog/4,5.png",7\n')
    result, text = measure(data, assignments=str(path))
    assert result["accuracy"] == 0.75 and result["clusters"] == 2
    assert text.startswith("2 clusters of 4 images of 2 classes")


LINES = ("cat/1.png,1", "cat/2.png,1", "dog/3.png,2", '"dog/4,5.png",2')


@pytest.mark.parametrize(
    "lines, message",
    [
        (LINES[:2], r"does not assign 'dog/3.png', 'dog/4,5.png'.* Expected one cluster for each"),
        ((*LINES, "bird/1.png,1"), r"assigns 'bird/1.png', which .* names such as 'cat/1.png'"),
        ((*LINES, LINES[0]), "assigns 'cat/1.png' more than once"),
        (("name,cluster", *LINES, "cat/9.png,x"), "line 6 is 'cat/9.png,x'"),
        (("a,b,c",), "line 1 is 'a,b,c'"),
    ],
)
def test_assignments_that_are_not_of_these_images(tmp_path, lines, message):
    data = write_folder(tmp_path)
    path = tmp_path / "clusters.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        measure(data, assignments=str(path))


def test_files_that_are_no_assignments(tmp_path):
    data, path = write_folder(tmp_path), tmp_path / "clusters.npz"
    with pytest.raises(UserError, match="cannot be read: .*No such file.* Expected a .csv file"):
        measure(data, assignments=str(path))
    np.savez(path, names=np.array(["cat/1.png"]))
    with pytest.raises(UserError, match="clusters"):
        measure(data, assignments=str(path))
    np.savez(path, names=np.array(["cat/1.png"]), clusters=np.array([0.5]))
    with pytest.raises(UserError, match="not a list of as many whole numbers"):
        measure(data, assignments=str(path))


def test_images_that_cannot_be_clustered(tmp_path):
    with pytest.raises(UserError, match="eval.clusters is 361, but there are only 360 images"):
        measure(DIGITS, clusters=361)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    data = {"path": str(tmp_path), "train_split": ""}
    with pytest.raises(UserError, match="have no labels, with which clusters are compared"):
        measure(data, split="train")
    with pytest.raises(UserError, match="--eval.split=train"):
        measure(data)
