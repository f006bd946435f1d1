"""A run of two processes that Open MPI's mpirun starts."""

import contextlib
import os
import pathlib
import signal

import programs
import pytest
from test_train import assert_same_run

from sop_jax.training import checkpoint

# One worker of pytest runs all tests with real programs, because each needs both cores.
pytestmark = [pytest.mark.xdist_group("real"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def open_mpi() -> None:
    programs.need("mpirun")


def mpirun(workdir: pathlib.Path) -> contextlib.AbstractContextManager[programs.Program]:
    variables = programs.environment(
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        OMPI_MCA_rmaps_base_oversubscribe="1",  # on a machine of one core
    )
    command = ["mpirun", "-n", 2, "--bind-to", "none", *programs.training(workdir)]
    return programs.start(command, workdir.parent / "log", variables)


def rank(workdir: pathlib.Path, number: int) -> int:
    """Returns the process of this rank."""
    (process,) = programs.trainings(workdir, OMPI_COMM_WORLD_RANK=str(number))
    return process


def test_processes_find_each_other_stop_and_resume(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """One is asked to stop, then one is killed; the run ends as if it had not been interrupted."""
    workdir = tmp_path / "run"
    with mpirun(workdir) as program:
        programs.wait_for_step(workdir, 4, program.says)
        os.kill(rank(workdir, 1), signal.SIGTERM)
        assert program.end() == 130, program.says()
    saved = checkpoint.latest_step(workdir)
    assert saved is not None and saved >= 4
    assert "on 2 cpu devices of 2 processes" in program.says()
    assert f"interrupted; step {saved} of {programs.STEPS} is saved" in program.says()
    assert "Traceback" not in program.says()

    with mpirun(workdir) as program:
        programs.wait_for_step(workdir, saved + 4, program.says)
        os.kill(rank(workdir, 1), signal.SIGKILL)
        assert program.end(60) == 128 + signal.SIGKILL, program.says()
        assert not programs.trainings(workdir)

    with mpirun(workdir) as program:
        assert program.end() == 0, program.says()
    assert_same_run(workdir, whole)
