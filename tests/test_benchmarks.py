"""The benchmark of the step measures what its command line says."""

import importlib
import pathlib
import sys
from types import ModuleType

import pytest

from sop_jax.data.masks import most_masked

pytestmark = pytest.mark.medium

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("step")


def parse(step: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple:
    monkeypatch.setattr(sys, "argv", ["step.py", *words])
    return step.parse()


def test_the_yardsticks_method_is_one_task_of_smoothed_votes(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = step.settings(*parse(step, monkeypatch, "--batch=4", "--dtype=float32"))
    cls = config.sop.cls
    assert (cls.tasks, cls.votes, config.sop.pool) == (1, "smoothed", "all")
    assert (cls.anchors, 1 + cls.supports, cls.memory) == (4096, 9, 65536)
    assert (config.batch_size, config.model.dtype, config.model.size) == (4, "float32", "ti")


def test_a_setting_of_the_command_line_wins(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--config.sop.cls.tasks=2", "--config.mask.ratio=(0.1,0.5)", "--method", "paper")
    words += ("--config.sop.search_precision=float32", "--config.model.remat=full")
    for method in ("yardstick", "paper"):
        args, changes = parse(step, monkeypatch, *words)
        args.method = method
        config = step.settings(args, changes)
        assert config.sop.cls.tasks == 2 and config.sop.search_precision == "float32"
        assert config.mask.ratio == (0.1, 0.5) and config.model.remat == "full"


@pytest.mark.parametrize(
    "word", ["--bogus=3", "--config.model.remt=full", "--config.model.remat=some", "--batch=0"]
)
def test_nonsense_is_one_line(step: ModuleType, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    args, changes = parse(step, monkeypatch, word)
    with pytest.raises(SystemExit, match="error: "):
        step.settings(args, changes)


def test_both_sides_get_the_same_shapes(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "--arch=vit_small",
        "--batch",
        "8",
        "--steps=3",
        "--peer",
        "theirs.py",
        "--rounds",
        "5",
    )
    words += ("--closed-form", "--device", "cpu", "--parts", "--config.model.remat=full")
    commands = step.commands(*parse(step, monkeypatch, *words))
    same = {"--arch=vit_small", "--batch=8", "--steps=3", "--dtype=bfloat16", "--local-crops=10"}
    assert same < set(commands["ours"]) and same < set(commands["peer"])
    assert {"--parts", "--config.model.remat=full"} < set(commands["ours"])
    assert {"theirs.py", "--closed-form", "--device=cpu"} < set(commands["peer"])
    assert not any("peer" in word or "rounds" in word for word in commands["ours"][2:])


def test_masks_and_pixels_are_as_training_has_them(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = step.settings(*parse(step, monkeypatch, "--batch=3"))
    run = step.assemble(config, step.make_mesh(1), step.IMAGES)
    batch = step.random_batch(config, run)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in run.batch.items()
    }
    most = most_masked(batch["mask"].shape[2:], config.mask)
    assert 0 < batch["mask"].sum((2, 3)).max() <= most
