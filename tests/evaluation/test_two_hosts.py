"""Tasks give the same results on one device and in two processes of four devices each."""

import json
import pathlib
from typing import Any

import numpy as np
import processes
import pytest
from datasets import write_small_set
from PIL import Image
from test_evaluate import make_run
from test_retrieval import write_folder

from sop_jax.evaluation.heads import Head, write_head
from sop_jax.evaluation.task import View

SCRIPT = pathlib.Path(__file__).parents[1] / "two_hosts.py"


def write_classes(root: pathlib.Path) -> None:
    """Writes images of three colours, as classes of a test split and of variants of ImageNet-9."""
    rng = np.random.default_rng(0)
    for split in ("classes/train", "classes/val", "nine/original/val", "nine/mixed_same/val"):
        for label, name in enumerate(("00_dog", "01_bird", "02_wheeled vehicle")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(7):
                pixels = np.full((16, 16, 3), 30, np.uint8)
                pixels[..., label] = rng.integers(150, 250, (16, 16))
                Image.fromarray(pixels).save(folder / f"{i}.png")


def run(folder: pathlib.Path, count: int, devices: int, plan: pathlib.Path) -> list[Any]:
    """Returns the results of each process."""
    flags = processes.among(count) if count > 1 else [["--processes=1"]]
    task = [SCRIPT, "evaluations", folder / "out", plan.parent / "run", plan]
    ended = processes.run([[*task, *own] for own in flags], folder, devices=devices, timeout=300)
    assert [process.code for process in ended] == [0] * count, ended
    found = [json.loads((folder / f"out-{i}.json").read_text()) for i in range(count)]
    assert all(results == found[0] for results in found)
    return found[0]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    make_run(tmp_path / "run", (3,))
    write_classes(tmp_path)
    write_small_set(tmp_path / "sets")
    write_folder(tmp_path / "images", 9)
    rng = np.random.default_rng(0)
    head = Head(rng.normal(size=(9, 32)).astype(np.float32), np.zeros(9, np.float32), View())
    write_head(tmp_path / "head.npz", head)
    small = {"longest": 32, "sets": ["roxford5k"]}
    searched = {"images": str(tmp_path / "images")}
    classes = {"path": str(tmp_path / "classes"), "test_split": "val"}
    plan = tmp_path / "plan.json"
    linear = {"epochs": 2, "batch_size": 16, "rates": [0.1, 1.0], "threads": 0, "held_out": 0.3}
    tasks = [
        ("knn", {"k": [1, 5]}, classes),
        ("linear", linear, classes),
        ("logistic", {"strengths": [0.1, 10.0], "validation": 0.3}, classes),
        ("fewshot", {"shots": [1, 2], "draws": 2}, classes),
        ("retrieval", small, {"path": str(tmp_path / "sets")}),
        ("retrieval", {"longest": 32, "neighbours": 4} | searched, {}),
        ("cluster", {"starts": 3}, classes),
        ("tsne", {"perplexity": 5.0, "iterations": 300}, classes),
        (
            *("backgrounds", {"head": str(tmp_path / "head.npz"), "crop": 16}),
            {"path": str(tmp_path / "nine")},
        ),
    ]
    plan.write_text(json.dumps(tasks))
    one, two = run(tmp_path / "one", 1, 1, plan), run(tmp_path / "two", 2, 4, plan)
    names = [name for name, *_ in tasks]
    for name, alone, together in zip(names, one, two, strict=True):
        for rounded in ("divergence", "iterations"):  # the rounding of features changes these
            alone.pop(rounded, None), together.pop(rounded, None)
        assert alone == together, name
    files = [sorted((tmp_path / where).rglob("neighbours.csv")) for where in ("one", "two")]
    rows = [path.read_text().splitlines() for (path,) in files]
    for line, other in zip(*rows, strict=True):
        assert line.split(",")[:3] == other.split(",")[:3]
