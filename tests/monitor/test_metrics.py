"""The curves: every step once, whatever happened, and always valid JSON."""

import json
import math
import pathlib
import sys
import types

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sop_jax.monitor import metrics


def events(workdir: pathlib.Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def lines(workdir: pathlib.Path) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


def test_a_row_holds_what_was_logged_in_its_order(tmp_path: pathlib.Path) -> None:
    writer = metrics.Writer(tmp_path)
    writer.write(10, {"loss": 1.5, "knn_top1": None, "images": 640, "state": "collapsing"})
    writer.close()
    assert lines(tmp_path) == [
        '{"step": 10, "loss": 1.5, "knn_top1": null, "images": 640, "state": "collapsing"}'
    ]
    assert events(tmp_path, "loss") == [(10, 1.5)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "images"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_null(tmp_path: pathlib.Path, value: float) -> None:
    writer = metrics.Writer(tmp_path)
    writer.write(1, {"loss": value})
    writer.close()
    assert json.loads(lines(tmp_path)[0], parse_constant=pytest.fail) == {"step": 1, "loss": None}


def test_rows_are_on_disk_before_the_writer_closes(tmp_path: pathlib.Path) -> None:
    writer = metrics.Writer(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_after_a_kill_in_mid_line_every_step_is_stored_once(tmp_path: pathlib.Path) -> None:
    writer = metrics.Writer(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [10, 20, 30]

    writer = metrics.Writer(tmp_path, resume_step=20)
    for step in (30, 40):
        writer.write(step, {"loss": step + 0.5})
    writer.close()
    expected = [(10, 10.0), (20, 20.0), (30, 30.5), (40, 40.5)]
    assert [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines(tmp_path)] == (
        expected
    )
    assert events(tmp_path, "loss") == expected


def test_a_run_that_starts_anew_keeps_nothing(tmp_path: pathlib.Path) -> None:
    for loss in (1.0, 2.0):
        writer = metrics.Writer(tmp_path)
        for step in (0, 5):
            writer.write(step, {"loss": loss})
        writer.close()
    expected = [{"step": 0, "loss": 2.0}, {"step": 5, "loss": 2.0}]
    assert metrics.read_metrics(tmp_path) == expected
    assert events(tmp_path, "loss") == [(0, 2.0), (5, 2.0)]


def test_a_step_is_one_row(tmp_path: pathlib.Path) -> None:
    writer = metrics.Writer(tmp_path)
    writer.write(5, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 5"):
        writer.write(5, {"knn_top1": 1.0})
    writer.close()


def test_no_run_has_no_rows(tmp_path: pathlib.Path) -> None:
    assert metrics.read_metrics(tmp_path / "nowhere") == []


def test_a_store_that_cannot_append_gets_the_whole_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # TensorBoard writes to a folder "mem:" here
    bucket, clock = "mem://runs/a", [0.0]
    in_bucket = types.SimpleNamespace(Path=lambda path: Bucket(tmp_path, str(path)))
    monkeypatch.setattr(metrics, "epath", in_bucket)
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    writer = metrics.Writer(bucket)
    writer.write(1, {"loss": 1.0})
    assert metrics.read_metrics(bucket) == []
    clock[0] = 61.0
    writer.write(2, {"loss": 2.0})
    assert [row["step"] for row in metrics.read_metrics(bucket)] == [1, 2]
    writer.write(3, {"loss": 3.0})
    writer.close()
    assert [row["step"] for row in metrics.read_metrics(bucket)] == [1, 2, 3]


class Bucket(epath.Path):
    """A path in a bucket, whose objects are written as a whole: it has no `open` or `replace`."""

    def __init__(self, folder: pathlib.Path, address: str) -> None:
        self._folder, self._address = folder, address
        self.local = epath.Path(folder / address.replace("://", "/"))

    def __truediv__(self, part: str) -> "Bucket":
        return Bucket(self._folder, f"{self._address}/{part}")

    def __str__(self) -> str:
        return self._address

    @property
    def parent(self) -> "Bucket":
        return Bucket(self._folder, self._address.rpartition("/")[0])

    def mkdir(self, parents: bool, exist_ok: bool) -> None:
        self.local.mkdir(parents=parents, exist_ok=exist_ok)

    def exists(self) -> bool:
        return self.local.exists()

    def read_bytes(self) -> bytes:
        return self.local.read_bytes()

    def write_bytes(self, data: bytes) -> int:
        return self.local.write_bytes(data)


def test_progress_away_from_a_terminal_is_a_line_a_logged_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = metrics.Progress(0, 40)
    for step in range(1, 41):
        progress.advance()
        if step % 20 == 0:
            progress.show(step, {"loss": 1.23456, "images/s": 812.3, "knn_top1": None})
    progress.note("collapsing: raise loss.teacher_temperature")
    progress.close()
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second, note = printed.err.splitlines()
    assert first.startswith("step 20/40  loss 1.235  images/s 812.3  ") and first.endswith(" left")
    assert second.startswith("step 40/40") and "00:00 left" in second
    assert note == "collapsing: raise loss.teacher_temperature"


def test_the_time_left_is_reported_after_the_second_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not depend on when the first step is logged, and its line shows it too."""
    clock = [100.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    progress = metrics.Progress(10, 1010)
    for _ in range(4):
        progress.advance()  # the first step ends late, because of its preparations
        clock[0] += 9.0
    progress.close()
    assert capsys.readouterr().err == (
        "about 2.5 h left, at 9 s per step, not counting evaluations\n"
    )


def test_a_short_run_does_not_report_its_time_left_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = metrics.Progress(0, 5)
    for _ in range(4):
        progress.advance()
    progress.close()
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = metrics.Progress(10, 20)
    for step in range(11, 21):
        progress.advance()
        progress.show(step, {"loss": 1.5})
    progress.note("a note")
    progress.close()
    printed = capsys.readouterr().err
    assert "20/20" in printed and "loss=1.5" in printed and "a note\n" in printed


def test_progress_of_the_other_processes_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = metrics.Progress(0, 2, shown=False)
    progress.advance()
    progress.show(1, {"loss": 1.0})
    progress.note("nothing")
    progress.close()
    assert capsys.readouterr().err == ""
