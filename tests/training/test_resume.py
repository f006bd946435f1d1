"""A run resumes only with what it began with: here, with the content of the files it names."""

import json
import pathlib

import ml_collections
import numpy as np
import pytest
from etils import epath
from small import small_config

from sop_jax.data.sources import Identity
from sop_jax.errors import UserError
from sop_jax.training import resume

DATA: resume.Data = {"train": Identity(images=9, names="abc"), "test": None}
OLD, NEW = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])


@pytest.fixture
def config(tmp_path: pathlib.Path) -> ml_collections.ConfigDict:
    """The settings of a run whose prior is in a file, and which has begun."""
    np.save(tmp_path / "prior.npy", OLD)
    own = dict(prototypes=3, prior=str(tmp_path / "prior.npy"))
    config = small_config(method="dino", steps=9, dino=own)
    workdir = tmp_path / "run"
    workdir.mkdir()
    resume.save(config, DATA, epath.Path(workdir))
    return config


def check(config: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> resume.Status:
    return resume.check_workdir(config, epath.Path(tmp_path / "run"))


@pytest.mark.parametrize("inside", [".", "runs/mine"])
def test_a_run_does_not_begin_among_its_images(tmp_path: pathlib.Path, inside: str) -> None:
    own = small_config(data=dict(source="folder", path=str(tmp_path)))
    workdir = epath.Path(tmp_path / inside)
    with pytest.raises(UserError, match="name another folder for the run"):
        resume.check_place(own, workdir)
    resume.check_place(own, epath.Path(f"{tmp_path}-run"))


def test_a_run_that_began_among_its_images_goes_on(tmp_path: pathlib.Path) -> None:
    own = small_config(data=dict(source="folder", path=str(tmp_path)))
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    resume.check_place(own, epath.Path(workdir))
    assert resume.is_among_images(own, epath.Path(workdir))


@pytest.mark.parametrize("finished", [False, True])
def test_a_prior_that_changed_in_its_file_is_noticed(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, finished: bool
) -> None:
    if finished:
        (tmp_path / "run" / "summary.json").write_text("{}")
    assert check(config, tmp_path).notes == []
    np.save(tmp_path / "prior.npy", NEW)
    with pytest.raises(UserError, match=r"dino\.prior: .*prior\.npy has other content than when"):
        check(config, tmp_path)


def test_the_same_prior_may_be_written_anew(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    np.save(tmp_path / "prior.npy", OLD.astype(np.float32))
    assert check(config, tmp_path).notes == []


def test_files_without_a_record_are_named(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "run" / "data.json"
    record = json.loads(path.read_text())
    del record["files"]
    path.write_text(json.dumps(record))
    (note,) = check(config, tmp_path).notes
    assert "no record of what the run read from dino.prior=" in note
    assert resume.recorded(epath.Path(tmp_path / "run")) == DATA


def test_processes_must_read_the_same_prior(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    before = resume.file_facts(config)
    np.save(tmp_path / "prior.npy", NEW)
    after = resume.file_facts(config)
    assert before.keys() == after.keys() == {"the content of dino.prior"}
    assert before != after
    config.dino.prior = "uniform"
    assert resume.file_facts(config) == {}


@pytest.mark.parametrize("damage", [{"files": 3}, {"files": None}, {"train": 1}])
def test_a_damaged_record_is_an_error(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, damage: dict[str, object]
) -> None:
    path = tmp_path / "run" / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError, match=r"data\.json.* is damaged"):
        check(config, tmp_path)
