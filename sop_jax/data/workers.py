"""Input worker processes: how they start, which resources they need and how they end."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection, resource_tracker
from typing import Any

from sop_jax.errors import Lost, UserError

SHARED_MEMORY = "/dev/shm"  # where Linux keeps the memory that processes share
BUFFER = 2  # finished pieces per worker
# Grain buffers as many pieces in the parent, and on each side one more waits to enter the buffer.
PIECES_PER_WORKER = 2 * (BUFFER + 1)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ROOM = (
    "Give the container more shared memory (Docker: --shm-size=2g; Kubernetes: an emptyDir with "
    "medium: Memory mounted at /dev/shm), set fewer --config.data.workers, or "
    "--config.data.workers=0, which needs none."
)


def check_shared_memory(workers: int, piece_bytes: int, pieces: int) -> None:
    """Checks that there is enough shared memory for the pieces that workers hand over.

    Args:
        workers: the number of worker processes.
        piece_bytes: the size of one piece of a batch in bytes.
        pieces: the number of pieces per batch.

    Raises:
        UserError: there is not enough shared memory.
    """
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    needed = (workers * PIECES_PER_WORKER + pieces) * piece_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"The input workers (data.workers={workers}) hand over images through {SHARED_MEMORY} "
            f"and need up to {needed / 2**20:.0f} MiB there, but only {free / 2**20:.0f} MiB are "
            f"free. {_ROOM}"
        )


def start(iterator: Any) -> None:
    """Starts the workers of a Grain iterator; returns before they are ready.

    Terminals and clusters send signals to all processes of a group. Only the parent handles them,
    and it still needs its workers while it does. Workers therefore start with the signals blocked,
    which they inherit from the threads that start them, and `prepare` then ignores the signals.
    """
    # The tracker frees the shared memory of killed processes; it should not warn of a leak.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    try:
        resource_tracker.ensure_running()  # first, because starting it unblocks the signals
    finally:
        sys.warnoptions.pop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        iterator.get_state()  # makes the iterators whose threads start the workers
        iterator.start_prefetch()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare(*_: Any) -> None:
    """Sets up a worker: it ignores signals, and ends when its parent ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # Linux's parent-death signal is sent when the thread that started this process ends.
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)  # Python's resource tracker frees the shared memory once all processes are gone


def kill() -> None:
    """Ends the workers at once, whatever they are doing."""
    for child in multiprocessing.active_children():
        if child.name.startswith("grain-process-prefetch"):
            child.kill()


@contextlib.contextmanager
def losses_in_words() -> Iterator[None]:
    """Replaces Grain's error about a dead worker with one that says what happened.

    Raises:
        Lost: a worker was killed or has crashed, and a restart may succeed.
        UserError: there is not enough shared memory.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"Worker process was terminated .* exit code (-?\d+)", str(error))
        if found is None:
            raise
        raise _loss(int(found[1])) from error


def _loss(code: int) -> UserError:
    if code == -signal.SIGBUS:
        return UserError(
            f"an input worker ended with a bus error: {SHARED_MEMORY} is full. {_ROOM}"
        )
    if code == -signal.SIGKILL:
        return Lost(
            "an input worker was killed, probably by the system because memory ran out. The same "
            "command resumes from the last checkpoint. If it happens again, set fewer "
            "--config.data.workers, or give the machine or the container more memory."
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Lost(
        f"an input worker ended unexpectedly with {how}; its output above may say why. The same "
        "command resumes from the last checkpoint. If it happens again, try "
        "--config.data.workers=0, with which the error appears in the main process."
    )
