"""Commands as a shell starts them; those in Python begin with everything imported.

To import JAX and the package takes longer than most small commands. So one process imports them
and forks for each command, which then runs as `python -m MODULE` or `python FILE` would.
"""

import contextlib
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

SERVER = """
import json, os, runpy, signal, sys
import sop_jax.convert, sop_jax.data.prepare, sop_jax.diagnose, sop_jax.evaluate, sop_jax.extract
import sop_jax.nearest, sop_jax.plan, sop_jax.preview, sop_jax.report, sop_jax.train

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
asked = json.loads(line)
os.setsid()
os.chdir(asked["folder"])
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
out = os.open(asked["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(out, 1), os.dup2(out, 2)
first, *sys.argv = asked["words"]
if first == "-m":
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, first)
    sys.path.insert(0, os.path.dirname(first))
    runpy.run_path(first, run_name="__main__")
"""


PRINTED = "printed.txt"


class Running:
    """A command that was started.

    Args:
        group: the number of its process group.
        out: the file with what it prints, stdout and stderr together.
        poll: returns its exit code, negative for a signal; None while it runs.
    """

    def __init__(self, group: int, out: pathlib.Path, poll: Callable[[], int | None]) -> None:
        self.group, self.out, self.poll = group, out, poll

    def text(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def wait_for(self, pattern: str, timeout: float) -> bool:
        """Waits until it has printed something; returns False if it has ended instead."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if re.search(pattern, self.text()):
                return True
            assert time.monotonic() < until, self.text()[-3000:]
            time.sleep(0.05)
        return False

    def end(self, timeout: float) -> int:
        """Waits for the end, and returns the exit code."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < until, self.text()[-3000:]
            time.sleep(0.05)
        return code

    def kill(self) -> None:
        """Kills the command and what it has started, if it still runs, and waits until it ends."""
        self.signal(signal.SIGKILL)
        self.end(60)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the command and what it has started, as Ctrl-C does, if it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, number)


def shell(line: str, folder: pathlib.Path, environment: Mapping[str, str]) -> Running:
    """Starts a line of bash in a folder, with these variables only."""
    out = folder / PRINTED
    with out.open("w") as file:
        popen = subprocess.Popen(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(popen.pid, out, popen.poll)


class Forked:
    """Starts commands in Python, one at a time, in a context.

    Args:
        folder: the folder with the package, which is imported.
        environment: the variables of all commands.
    """

    def __init__(self, folder: pathlib.Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, dict(environment)
        self.running: Running | None = None

    def __enter__(self) -> Self:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answers: queue.Queue[int] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.server.communicate(timeout=60)

    def _listen(self) -> None:
        assert self.server.stdout is not None
        for line in self.server.stdout:
            self.answers.put(int(line))

    def python(self, words: Sequence[str], folder: pathlib.Path) -> Running:
        """Starts `python WORDS` in a folder."""
        self.stop()
        out = folder / PRINTED
        asked = {"words": list(words), "folder": str(folder), "out": str(out)}
        assert self.server.stdin is not None
        out.unlink(missing_ok=True)
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        group, ended = self.answers.get(timeout=300), list[int]()

        def poll() -> int | None:
            with contextlib.suppress(queue.Empty):
                ended.append(self.answers.get_nowait())
            return ended[0] if ended else None

        self.running = Running(group, out, poll)
        return self.running

    def stop(self) -> None:
        """Kills the command that was started last, if it still runs."""
        if self.running is not None:
            self.running.kill()
