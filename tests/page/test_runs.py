"""What a page reads of the folders of runs, which may be damaged or still be written."""

import json
import pathlib

import pytest
from etils import epath

from sop_jax import config as config_lib
from sop_jax.config import paper
from sop_jax.errors import UserError
from sop_jax.page import runs


def make(folder: pathlib.Path, metrics: str | None = '{"step": 1, "loss": 2.0}\n') -> pathlib.Path:
    folder.mkdir(parents=True)
    config_lib.save(paper(), epath.Path(folder))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text(metrics)
    return folder


def test_half_written_lines_are_left_out(tmp_path: pathlib.Path) -> None:
    text = '{"step": 2, "loss": 1.0}\n[1]\n{"loss": 3}\n{"step": 1, "loss": 2.0}\n{"step": 3, "lo'
    (run,) = runs.read_runs([make(tmp_path / "a", text)])
    assert runs.series(run, "loss") == [(1, 2.0), (2, 1.0)]
    assert runs.last(run, "loss") == 1.0 and runs.last(run, "other") is None


def test_values_that_are_no_numbers_are_left_out(tmp_path: pathlib.Path) -> None:
    text = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n{"step": 3, "loss": true}\n'
    (run,) = runs.read_runs([make(tmp_path / "a", text)])
    assert len(run.rows) == 3 and runs.series(run, "loss") == []


def test_a_run_without_metrics_says_so(tmp_path: pathlib.Path) -> None:
    for name, text in (("none", None), ("empty", "")):
        (run,) = runs.read_runs([make(tmp_path / name, text)])
        assert run.config is not None and "no curves" in run.notes[0]


def test_metrics_without_settings_are_enough(tmp_path: pathlib.Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "config.json").write_text('{"version": ')
    (folder / "summary.json").write_text('{"steps"')
    (run,) = runs.read_runs([folder])
    assert run.config is None and run.summary == {} and "damaged" in run.notes[0]
    assert runs.images_of(run) is None


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_no_folder_of_a_run(tmp_path: pathlib.Path, kind: str) -> None:
    place = tmp_path / kind
    if kind == "file":
        place.write_text("")
    if kind == "empty":
        place.mkdir()
    with pytest.raises(UserError, match="not a folder" if kind != "empty" else "not the folder"):
        runs.read_runs([place])


def test_names_tell_runs_apart(tmp_path: pathlib.Path) -> None:
    a, b, c = (make(tmp_path / name) for name in ("x/run", "y/run", "x/other"))
    assert [run.name for run in runs.read_runs([a, c])] == ["run", "other"]
    assert [run.name for run in runs.read_runs([a, b])] == [str(a), str(b)]


def test_the_number_of_images(tmp_path: pathlib.Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "data.json").write_text(json.dumps({"train": {"images": 7}, "test": None}))
    (run,) = runs.read_runs([folder])
    assert runs.images_of(run) == 7
