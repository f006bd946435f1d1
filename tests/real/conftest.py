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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with real programs come first: one worker runs them all, while others do the rest."""
    items.sort(key=lambda item: pathlib.Path(__file__).parent not in item.path.parents)
