"""What the tests with real programs share."""

import pathlib

import processes
import programs
import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run of two processes that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    module = programs.training(folder / "run")[1:]
    both = [[*module, *among] for among in processes.among(2)]
    ended = processes.run(both, folder / "log", devices=1, timeout=600)
    assert [process.code for process in ended] == [0, 0], ended
    return folder / "run"
