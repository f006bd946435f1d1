"""Curves in other places than metrics.jsonl, and what happens if these fail."""

import errno
import itertools
import json
import os
import pathlib
import sys
import types
from typing import Any

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX.event_file_writer import EventsWriter

from sop_jax.errors import UserError
from sop_jax.monitor import metrics, trackers

SETTINGS = {"batch_size": 8}


class FakeRun:
    """Records what a run of wandb gets."""

    def __init__(self, number: int, **given: Any) -> None:
        self.id = given["id"] or f"run{number}"
        self.project, self.url, self.given = given["project"], None, given
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A module in the place of wandb, which records its runs."""
    made: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        made.append(FakeRun(len(made), **given))
        return made[-1]

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    return made


def wandb_writer(workdir: pathlib.Path, resume_step: int = 0, **more: Any) -> metrics.Writer:
    return metrics.Writer(workdir, resume_step, trackers.TRACKERS["wandb"](SETTINGS), **more)


def write(writer: metrics.Writer, *steps: int) -> None:
    for step in steps:
        writer.write(step, {"loss": float(step), "knn_top1": None, "state": "fine"})
    writer.close()


def test_a_run_of_wandb_has_numbers_settings_and_a_name(
    tmp_path: pathlib.Path, runs: list[FakeRun]
) -> None:
    write(wandb_writer(tmp_path / "mine"), 0, 10)
    (run,) = runs
    assert run.rows == [(0, {"loss": 0.0}), (10, {"loss": 10.0})] and run.finished
    assert run.given["config"] == SETTINGS and run.given["name"] == "mine"
    assert (run.given["project"], run.given["resume"], run.given["dir"]) == (
        *("sop_jax", None),
        str(tmp_path / "mine"),
    )
    assert json.loads((tmp_path / "mine" / "wandb.json").read_text())["id"] == "run0"
    assert not (tmp_path / "mine" / "tensorboard").exists()
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "mine")] == [0, 10]


def test_a_resumed_run_continues_the_same_run_and_doubles_no_step(
    tmp_path: pathlib.Path, runs: list[FakeRun]
) -> None:
    write(wandb_writer(tmp_path), 10, 20, 30)  # and was killed; its checkpoint is that of step 20
    write(wandb_writer(tmp_path, 20), 30, 40)
    assert [run.id for run in runs] == ["run0", "run0"]
    assert runs[1].given["resume"] == "allow"
    assert [step for run in runs for step, _ in run.rows] == [10, 20, 30, 40]
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [10, 20, 30, 40]
    write(wandb_writer(tmp_path), 10)  # a run that starts anew
    assert runs[2].id == "run2" and runs[2].given["resume"] is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 3}'])
def test_a_damaged_record_begins_another_run(
    tmp_path: pathlib.Path, runs: list[FakeRun], text: str
) -> None:
    write(wandb_writer(tmp_path), 10, 20)
    (tmp_path / "wandb.json").write_text(text)
    write(wandb_writer(tmp_path, 20), 30)
    assert runs[1].id == "run1" and [step for step, _ in runs[1].rows] == [10, 20, 30]


def test_a_tracker_that_is_changed_gets_the_earlier_steps(
    tmp_path: pathlib.Path, runs: list[FakeRun]
) -> None:
    write(metrics.Writer(tmp_path), 10, 20)
    write(wandb_writer(tmp_path, 20), 30)
    assert [step for step, _ in runs[0].rows] == [10, 20, 30]
    (tmp_path / "tensorboard").rename(tmp_path / "moved")
    write(metrics.Writer(tmp_path, 30), 40)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [10, 20, 30, 40]


def test_a_tracker_that_fails_is_reported_once_and_ends_nothing(
    tmp_path: pathlib.Path, runs: list[FakeRun]
) -> None:
    notes: list[str] = []
    writer = wandb_writer(tmp_path, note=notes.append)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the network is gone")

    runs[0].log = fail  # type: ignore[method-assign]
    write(writer, 10, 20)
    (note,) = notes
    assert "has failed and gets no more rows" in note and "the network is gone" in note
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [10, 20]
    writer = wandb_writer(tmp_path / "other", note=notes.append)
    runs[1].finish = fail  # type: ignore[method-assign]
    write(writer, 10)
    assert len(notes) == 2


@pytest.mark.parametrize("good", [5, 65])  # events; a row has 40, and tensorboardX's queue 10
def test_curves_on_a_full_disk_are_reported_once_and_hold_nothing_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    written, write_event = itertools.count(), EventsWriter.write_event

    def write_until_full(self: EventsWriter, event: Any) -> Any:
        if next(written) >= good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_event(self, event)

    monkeypatch.setattr(EventsWriter, "write_event", write_until_full)
    notes: list[str] = []
    writer = metrics.Writer(tmp_path, note=notes.append)
    for step in range(1, 4):
        writer.write(step, {f"value {i}": 0.5 for i in range(40)})
    writer.close()
    (note,) = notes
    assert "has failed and gets no more rows" in note and "No space left on device" in note
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [1, 2, 3]


def test_what_is_missing_is_told_at_the_start(
    tmp_path: pathlib.Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match="cannot start: no API key. Run wandb login, set WANDB"):
        wandb_writer(tmp_path)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs wandb, which is not installed; run: pip install"):
        trackers.check_tracker("wandb")
    trackers.check_tracker("tensorboard")


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore")  # those of the library
def test_wandb_stores_an_offline_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(wandb_writer(tmp_path), 10, 20, 30)
    write(wandb_writer(tmp_path, 20), 30, 40)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    run = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert len(folders) == 2 and all(run in folder.name for folder in folders)
    assert all(list(folder.glob("run-*.wandb")) for folder in folders)
    assert os.environ.get("WANDB_RUN_ID") is None


def test_every_tracker_has_the_interface(tmp_path: pathlib.Path, runs: list[FakeRun]) -> None:
    for name, opener in trackers.TRACKERS.items():
        folder = epath.Path(tmp_path / name)
        folder.mkdir()
        tracker = opener(SETTINGS)(folder, 0, -1)
        assert isinstance(tracker, trackers.Tracker) and tracker.has == -1
        tracker.log(3, {"loss": 1.0})
        tracker.close()
