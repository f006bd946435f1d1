"""Starts programs that are no part of this project, and the trainings that they start."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from processes import flags
from test_train import CONFIG, SMALL

from sop_jax.monitor.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 30
SETTINGS = SMALL | {
    "steps": STEPS,
    "mesh.data": 0,
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": 2,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every": 0,
}


def need(*names: str) -> None:
    """Skips the test if a program is not installed; `.ci/install` installs all of them."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}; as root on Debian, .ci/install installs it")


def installed(name: str) -> pathlib.Path:
    """Returns a program that `.ci/install` installs from PyPI; skips the test without it."""
    program = ROOT / ".venv-real" / "bin" / name
    if not program.exists():
        pytest.skip(f"needs {name} in {program.parent}; .ci/install installs it")
    return program


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to be root")


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a training on one virtual CPU device per process."""
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices=1), "PYTHONPATH": str(ROOT)}
    return os.environ | own | {"PYTHONUNBUFFERED": "1"} | variables


def arguments(workdir: object, **changes: Any) -> list[str]:
    """Returns the flags of a small training in `workdir`; all runs have the same program."""
    settings = SETTINGS | changes
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [f"--config={CONFIG}", f"--workdir={workdir}", *flags]


def training(workdir: object, **changes: Any) -> list[str]:
    """Returns the command of a small training."""
    return [sys.executable, "-m", "sop_jax.train", *arguments(workdir, **changes)]


class Program:
    """A program that runs, with the file that has its output and errors."""

    def __init__(self, popen: subprocess.Popen[bytes], log: pathlib.Path) -> None:
        self.popen = popen
        self.log = log

    def says(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, timeout: float = 600) -> int:
        """Waits until the program has ended, and returns its exit code."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self.says()}") from None


@contextlib.contextmanager
def start(
    command: Sequence[object],
    log: pathlib.Path,
    variables: Mapping[str, str] | None = None,
    folder: pathlib.Path | None = None,
) -> Iterator[Program]:
    """Runs a command; on leaving the context, kills it and everything that it has started.

    Args:
        command: the program and its arguments.
        log: the file for its output and errors, which is appended to.
        variables: its environment; by default that of `environment`.
        folder: the folder in which it runs, by default that of the log.
    """
    with log.open("ab") as out:
        popen = subprocess.Popen(
            list(map(str, command)),
            cwd=folder or log.parent,
            env=environment() if variables is None else dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Program(popen, log)
    finally:
        session = popen.pid
        for pid in processes(lambda process: process.session == session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        popen.wait()


class Process(NamedTuple):
    """What Linux says of a process."""

    session: int
    command: str
    variables: dict[str, str]


def processes(wanted: Callable[[Process], bool]) -> list[int]:
    """Returns the numbers of the processes of this machine that are wanted."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            command = (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
            lines = (folder / "environ").read_text(errors="replace").split("\0")
            variables = dict(line.partition("=")[::2] for line in lines)
            if wanted(Process(session, command, variables)):
                found.append(int(folder.name))
    return found


def trainings(workdir: pathlib.Path, **variables: str) -> list[int]:
    """Returns the numbers of the processes that train in `workdir` with these variables."""
    begins = re.compile(rf"\S*python\S* -m sop_jax\.train .*--workdir={re.escape(str(workdir))} ")
    return processes(
        lambda process: bool(
            begins.match(process.command) and process.variables.items() >= variables.items()
        )
    )


def wait_for(
    what: str, done: Callable[[], Any], says: Callable[[], str], timeout: float = 600
) -> Any:
    """Waits until `done()` is true and returns it; on a timeout, shows what `says()` returns."""
    until = time.monotonic() + timeout
    while not (answer := done()):
        assert time.monotonic() < until, f"waited {timeout} s for {what}:\n{says()}"
        time.sleep(0.05)
    return answer


def wait_for_step(workdir: pathlib.Path, step: int, says: Callable[[], str]) -> None:
    """Waits until the run in `workdir` has logged the step."""

    def reached() -> bool:
        return any(row["step"] >= step for row in read_metrics(workdir))

    wait_for(f"step {step}", reached, says)
