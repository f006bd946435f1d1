"""Features on disk: nothing is computed twice, and nothing stale is used."""

import pathlib
from typing import Any

import numpy as np
import pytest
from etils import epath
from subjects import toolbox

from sop_jax.data.sources import DigitsSource
from sop_jax.errors import Interrupted
from sop_jax.evaluation import tools
from sop_jax.evaluation.task import Features, View

VIEW = View(resize=16, crop=16)


class Counted(DigitsSource):
    """Digits that count which records were read."""

    def __init__(self) -> None:
        super().__init__("test")
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def box(folder: pathlib.Path, **options: Any) -> tools.Toolbox:
    made = toolbox(cache=epath.Path(folder), **options)
    made.subject.config.eval.batch_size = 64
    return made


def same(one: Features, other: Features) -> None:
    for name in ("vectors", "index", "labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


class StopsAfter(tools.Toolbox):
    """Tools that are asked to stop after some batches."""

    left = 2

    def between(self, save: bool = False) -> bool:
        self.left -= 1
        if self.left == 0:
            raise Interrupted("interrupted")
        return False


def test_an_interrupted_extraction_continues_where_it_stopped(tmp_path: pathlib.Path) -> None:
    whole = box(tmp_path / "whole").features(Counted(), VIEW)
    made = box(tmp_path / "parts")
    stopping = StopsAfter(
        made.subject, made.mesh, cache=made.cache, extractors=made.extractors, shown=False
    )
    source = Counted()
    with pytest.raises(Interrupted):
        stopping.features(source, VIEW)
    source = Counted()
    same(made.features(source, VIEW), whole)
    assert min(source.read) == 128  # two batches of 64 were kept
    source = Counted()
    same(made.features(source, VIEW), whole)
    assert source.read == []


@pytest.mark.parametrize(
    "change",
    [
        {"subject": {"fingerprint": "another"}},
        {"view": {"layers": 2}},
        {"view": {"interpolation": "bilinear"}},
        {"config": {"data.white": 3.0}},
    ],
    ids=["weights", "layers", "interpolation", "decoding"],
)
def test_other_features_are_not_taken_for_these(tmp_path: pathlib.Path, change: Any) -> None:
    made = box(tmp_path)
    made.features(Counted(), VIEW)
    config = made.subject.config.copy_and_resolve_references()
    config.update_from_flattened_dict(change.get("config", {}))
    made.subject = made.subject._replace(config=config, **change.get("subject", {}))
    source = Counted()
    made.features(source, VIEW._replace(**change.get("view", {})))
    assert len(source.read) == len(source)


@pytest.mark.parametrize("damage", ["cut", "another shape", "no notes"])
def test_damaged_files_are_computed_again(tmp_path: pathlib.Path, damage: str) -> None:
    made = box(tmp_path)
    expected = made.features(Counted(), VIEW)
    expected = Features(
        np.array(expected.vectors), None, expected.index, np.array(expected.labels), []
    )
    (file,) = tmp_path.rglob("vectors.npy")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "another shape":
        np.save(file, np.zeros((3, 2), np.float32))
    else:
        (file.parent / "about.json").write_text("{")
    source = Counted()
    same(made.features(source, VIEW), expected)
    assert len(source.read) == len(source)


def test_features_can_be_kept_in_memory() -> None:
    made = toolbox(kept={})
    source = Counted()
    first = made.features(source, VIEW)
    assert made.features(source, VIEW) is first and len(source.read) == len(source)
    assert made.features(source, VIEW._replace(layers=2)) is not first


def test_without_a_cache_nothing_is_left(tmp_path: pathlib.Path) -> None:
    toolbox().features(Counted(), VIEW)
    assert not list(tmp_path.iterdir())
