"""Input workers: they end with their parent, ignore signals, and their loss is reported."""

import contextlib
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sop_jax import errors
from sop_jax.config import paper
from sop_jax.data import pipeline
from sop_jax.data.sources import open_source
from sop_jax.errors import UserError

# Each worker first runs the top level of this script too.
SCRIPT = """
import multiprocessing, os, signal, sys, time
from multiprocessing import shared_memory
from sop_jax.config import paper
from sop_jax.data import pipeline, sources

shared_memory._SHM_NAME_PREFIX = sys.argv[1]  # the memory of this test only
if __name__ == "__mp_main__" and "signals" in sys.argv:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
if __name__ == "__main__":
    config = paper()
    config.batch_size = 16
    config.data.update(source="digits", workers=2, threads=1)
    config.augment.update(global_size=16, local_size=8, local_crops=2)
    batches = pipeline.train_batches(sources.open_source(config.data, "train"), config, 4)
    next(batches)
    while len(multiprocessing.active_children()) < 2:  # the second can start after the first batch
        time.sleep(0.01)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
    next(batches)
    batches.close()
"""


@contextlib.contextmanager
def started(folder: pathlib.Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Runs the script in its own process group, all of which is killed afterwards."""
    (folder / "script.py").write_text(SCRIPT)
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "script.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def lives(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.medium
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="looks for what Linux shows in /dev/shm")
def test_workers_of_a_killed_process_end_and_leave_no_shared_memory(tmp_path: pathlib.Path) -> None:
    prefix = f"w{os.getpid():07}"[:8]
    with started(tmp_path, f"/{prefix}") as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2 and list(pathlib.Path("/dev/shm").glob(f"{prefix}*"))
        process.kill()
        until = time.monotonic() + 30
        while any(map(lives, workers)) or list(pathlib.Path("/dev/shm").glob(f"{prefix}*")):
            assert time.monotonic() < until, "workers live on"
            time.sleep(0.1)


@pytest.mark.medium
def test_signals_to_workers_that_are_starting_leave_them_alone(tmp_path: pathlib.Path) -> None:
    with started(tmp_path, "/psm_", "signals") as process:
        _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")


def batches_of(workers: int) -> pipeline.Batches:
    config = paper()
    config.batch_size = 8
    config.data.update(source="digits", workers=workers, threads=1)
    config.augment.update(global_size=16, local_size=8, local_crops=2)
    source = open_source(config.data, "train")
    assert source is not None
    return pipeline.train_batches(source, config, 4)


def test_a_killed_worker_is_reported_in_words_and_as_lost() -> None:
    with contextlib.closing(batches_of(1)) as batches:
        next(batches)
        (child,) = multiprocessing.active_children()
        child.kill()
        with pytest.raises(UserError, match=r"killed.*memory.*data\.workers") as caught:
            for _ in range(20):  # batches that the dead worker has made are still available
                next(batches)
    assert isinstance(caught.value, errors.Lost)


def test_a_run_that_ends_before_its_first_batch_does_not_wait_for_workers() -> None:
    batches = batches_of(1)
    until = time.monotonic() + 60
    while not multiprocessing.active_children():
        assert time.monotonic() < until
        time.sleep(0.01)
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("code", "words", "lost"),
    [
        (-signal.SIGBUS, r"bus error: /dev/shm is full.*--shm-size.*data\.workers=0", False),
        (-signal.SIGSEGV, r"SIGSEGV.*data\.workers=0", True),
        (3, r"exit code 3.*data\.workers=0", True),
    ],
)
def test_how_a_worker_ended_is_reported_in_words(code: int, words: str, lost: bool) -> None:
    def grain() -> Iterator[Any]:
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Se")
        yield

    with pytest.raises(UserError, match=words) as caught:
        next(pipeline.Batches(grain(), threading.Event()))
    assert isinstance(caught.value, errors.Lost) == lost


@pytest.mark.parametrize(
    ("free", "workers", "fits"), [(64, 4, False), (1024, 4, True), (0, 0, True)]
)
def test_dockers_shared_memory_is_too_small_for_workers(
    monkeypatch: pytest.MonkeyPatch, free: int, workers: int, fits: bool
) -> None:
    """Batches of 64 images with views 2x224 + 10x96 need more than the 64 MiB of a container."""
    config = paper()
    config.data.workers = workers
    config.augment.update(global_size=224, local_size=96, local_crops=10)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 2**20))
    refused = pytest.raises(UserError, match=r"workers=4.* 64 MiB are free.*--shm-size.*workers=0")
    with contextlib.nullcontext() if fits else refused:
        pipeline.check_shared_memory(config, 64)
