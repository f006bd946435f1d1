"""Starts several processes on this machine as the hosts of one run."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

DEVICES = 2  # per process


class Ended(NamedTuple):
    """A process that has ended: its exit code, negative for a signal, and its output."""

    code: int
    out: str
    err: str


class Processes:
    """The running processes of one run, by their number."""

    def __init__(self, running: Sequence[subprocess.Popen[str]], folder: pathlib.Path) -> None:
        self.running = running
        self.folder = folder

    def says(self, process: int) -> str:
        """Returns what a process has printed to stdout so far."""
        return (self.folder / f"{process}.out").read_text()

    def wait_for(self, process: int, text: str, timeout: float = 60) -> None:
        """Waits until a process has printed the text to stdout."""
        until = time.monotonic() + timeout
        while text not in self.says(process):
            assert time.monotonic() < until, f"process {process} never said {text!r}: {self.end(0)}"
            assert self.running[process].poll() is None, f"a process ended early: {self.end(5)}"
            time.sleep(0.02)

    def signal(self, process: int, number: signal.Signals) -> None:
        self.running[process].send_signal(number)

    def end(self, timeout: float = 60) -> list[Ended]:
        """Waits until all have ended; after `timeout` seconds, kills those that have not."""
        until = time.monotonic() + timeout
        for popen in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(max(0, until - time.monotonic()))
        for popen in self.running:
            popen.kill()
            popen.wait()
        return [
            Ended(popen.returncode, self.says(i), (self.folder / f"{i}.err").read_text())
            for i, popen in enumerate(self.running)
        ]


def flags(devices: int) -> str:
    """Returns the XLA_FLAGS of the tests with another number of virtual CPU devices."""
    flag = "--xla_force_host_platform_device_count="
    return re.sub(rf"{flag}\d+", f"{flag}{devices}", os.environ["XLA_FLAGS"])


@contextlib.contextmanager
def start(
    commands: Sequence[Sequence[object]],
    folder: pathlib.Path,
    environments: Sequence[dict[str, str]] | None = None,
    devices: int = DEVICES,
    folders: Sequence[pathlib.Path] | None = None,
) -> Iterator[Processes]:
    """Runs `python ARGUMENTS` for all commands at once; on leaving the context, kills them.

    Args:
        commands: the arguments of each process.
        folder: the folder in which they run, and which their output is written to.
        environments: variables that are added to the environment of each process.
        devices: the number of virtual CPU devices per process.
        folders: the folder in which each process runs, if not in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags(devices),
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        "PYTHONUNBUFFERED": "1",
    }
    with contextlib.ExitStack() as stack:
        running = []
        for i, command in enumerate(commands):
            out, err = (
                stack.enter_context((folder / f"{i}.{name}").open("w")) for name in ("out", "err")
            )
            popen = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=folders[i] if folders else folder,
                env=common | (environments[i] if environments else {}),
                stdout=out,
                stderr=err,
                text=True,
            )
            stack.callback(popen.wait)
            stack.callback(popen.kill)
            running.append(popen)
        yield Processes(running, folder)


def run(
    commands: Sequence[Sequence[object]],
    folder: pathlib.Path,
    environments: Sequence[dict[str, str]] | None = None,
    devices: int = DEVICES,
    timeout: float = 60,
) -> list[Ended]:
    """Runs the commands as `start` does, until all have ended."""
    with start(commands, folder, environments, devices) as processes:
        return processes.end(timeout)


def among(count: int) -> list[list[str]]:
    """Returns the flags of `count` processes of one run, on a port that is free now."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    return [[coordinator, f"--processes={count}", f"--process={i}"] for i in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def taken(port: int) -> bool:
    """Whether another program listens at this port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
