"""The tasks of frozen features on photographs: some of Imagenette's, with a tiny network."""

import collections
import pathlib
import tarfile
from typing import Any

import pytest
from runs import APART, make_run

from sop_jax import evaluate

pytestmark = pytest.mark.medium

PER_CLASS = {"train": 12, "val": 4}


@pytest.fixture(scope="module")
def photos(shared: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a few photographs per class of Imagenette."""
    root = tmp_path_factory.mktemp("photos")
    taken: collections.Counter[str] = collections.Counter()
    with tarfile.open(shared / "data" / "imagenette224" / "imagenette224_subset.tar") as packed:
        for member in packed:
            parts = pathlib.PurePath(member.name).parts
            if (
                member.isfile()
                and len(parts) == 4
                and taken["/".join(parts[1:3])] < PER_CLASS.get(parts[1], 0)
            ):
                taken["/".join(parts[1:3])] += 1
                packed.extract(member, root, filter="data")
    return root / "imagenette224"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run with an untrained network for images of 32 pixels."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, (3,), **APART, **{"eval.resize": 36, "eval.crop": 32})
    return folder


@pytest.mark.parametrize(
    ("task", "settings", "least"),
    [
        ("knn", {"k": (1, 5)}, {"top1": 0.1}),
        (
            *("linear", {"epochs": 3, "batch_size": 40, "rates": (0.03, 0.3), "threads": 0}),
            {"top1": 0.1, "top5": 0.5},
        ),
        ("logistic", {"strengths": (0.1, 10.0)}, {"top1": 0.1, "mean_per_class": 0.1}),
        ("fewshot", {"shots": (1, 5), "draws": 2}, {"top1_1": 0.05, "top1_5": 0.1}),
        ("cluster", {"starts": 2}, {"accuracy": 0.2, "nmi": 0.3}),
        ("tsne", {"perplexity": 5.0, "iterations": 300}, {"divergence": 0.0}),
    ],
)
def test_tasks_measure_photographs(
    photos: pathlib.Path,
    workdir: pathlib.Path,
    task: str,
    settings: dict[str, Any],
    least: dict[str, float],
) -> None:
    record = evaluate.evaluate(evaluate.Asked(workdir), task, settings, {"path": str(photos)})
    split = "images" if task in ("cluster", "tsne") else "test"
    assert record["data"][split]["images"] == record["results"]["images"] == 40
    for name, share in least.items():
        assert share <= record["results"][name] < 1
    assert record["results"]["unreadable"] == 0
