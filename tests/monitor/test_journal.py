"""What a run records and shows: every row once, and a message when something begins or ends."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sop_jax.monitor import metrics
from sop_jax.monitor.journal import Journal
from sop_jax.monitor.pace import Pace

BUSY, WAITING = Pace(busy=8.0, idle=0.0, steps=4), Pace(busy=4.0, idle=4.0, steps=4)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    return "collapsing: try something" if rows[-1]["loss"] > 5 else None


def open_journal(
    workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]] = (), step: int = 0
) -> Journal:
    progress = metrics.Progress(step, 100)
    return Journal(rows, metrics.Writer(workdir, step), progress, verdict, batch_size=16)


def close(journal: Journal) -> None:
    assert journal.writer is not None
    journal.writer.close()
    journal.progress.close()


def test_rows_are_written_with_the_time_of_all_starts(tmp_path: pathlib.Path) -> None:
    first = open_journal(tmp_path)
    first.record(0, {"knn_top1": 0.25})
    first.record(10, {"loss": 3.0})
    close(first)
    rows = metrics.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 10] and rows == first.rows
    rows[-1]["wall_s"] = 1000.0
    second = open_journal(tmp_path, rows, step=10)
    second.record(20, {"loss": 2.0})
    close(second)
    assert [row["step"] for row in second.rows] == [0, 10, 20]
    assert 1000 <= second.rows[-1]["wall_s"] < 1060
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [0, 10, 20]


def test_a_bottleneck_is_reported_when_it_begins_and_shown_until_it_ends(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = open_journal(tmp_path)
    for step, pace in enumerate((BUSY, WAITING, WAITING, BUSY, BUSY), start=1):
        journal.record(step, {"loss": 1.0}, pace)
    close(journal)
    lines = capsys.readouterr().err.splitlines()
    assert sum("the input is the bottleneck" in line for line in lines) == 1
    shown = [line for line in lines if line.startswith("step ") and "/100" in line]
    found = ["waiting" in line for line in shown]
    assert found == [False, True, True, False, False]
    assert ["keeps up" in line for line in shown] == [False, False, False, True, False]


def test_bad_health_is_reported_when_it_begins_and_when_it_is_over(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = open_journal(tmp_path)
    for step, loss in enumerate((1.0, 9.0, 9.0, 1.0, 1.0), start=1):
        journal.record(step, {"loss": loss})
    journal.record(6, {"knn_top1": 0.5})  # a row without signs of health
    close(journal)
    lines = capsys.readouterr().err.splitlines()
    assert sum("try something" in line for line in lines) == 1
    shown = [line for line in lines if "/100" in line]
    assert [line.count("health collapsing") for line in shown] == [0, 1, 1, 0, 0, 0]
    assert ["no longer collapsing" in line for line in shown] == [False] * 3 + [True, False, False]


def test_a_note_is_shown_once(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = open_journal(tmp_path)
    for text in ("one", "two", "one"):
        journal.note_once(text)
    close(journal)
    assert capsys.readouterr().err.splitlines() == ["one", "two"]


def test_other_processes_write_nothing(tmp_path: pathlib.Path) -> None:
    progress = metrics.Progress(0, 100, shown=False)
    journal = Journal([], None, progress, verdict, batch_size=16)
    journal.record(1, {"loss": 1.0}, BUSY)
    journal.flush()
    progress.close()
    assert journal.rows[0]["loss"] == 1.0 and not list(tmp_path.iterdir())
