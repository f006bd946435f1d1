"""Reads a record, and waits where the storage is at fault and not the record."""

import errno
import os
import sys
import threading
import time

import numpy as np

from sop_jax.data.folders import printable
from sop_jax.data.sources import Source
from sop_jax.errors import Interrupted, Unreachable, UserError

FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds between two tries; each wait is twice the one before
DENIED = (errno.EACCES, errno.EPERM)

_told = 0.0  # when this process last said that it waits, by time.monotonic


def read(
    source: Source, index: int, retry_seconds: float, stop: threading.Event | None = None
) -> bytes | np.ndarray:
    """Record `index` of a source.

    An error of the file system says nothing about the record: the disk or the network has failed,
    or a file that was listed is gone, as all of them are when a disk is no longer mounted. To
    replace such a record by another would make another run of it, so it is waited for.

    Args:
        source: the data set.
        index: of the record.
        retry_seconds: how long to try again; 0 for not at all.
        stop: ends the wait when it is set.

    Raises:
        ValueError: the record is damaged, or a link that points to nothing.
        Unreachable: it still could not be read after `retry_seconds`.
        Interrupted: the wait was ended.
        UserError: this user may not read it.
    """
    began, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            return source[index]
        except OSError as error:
            name, why = source.name(index), error.strerror or str(error)
            if target := missing_target(error.filename):
                raise ValueError(f"it is a link to {target}, which is not there") from error
            if error.errno in DENIED:
                raise UserError(
                    f"{name} may not be read: {why}. Make it readable for this user, or remove it "
                    "and start a new run."
                ) from error
            left = began + retry_seconds - time.monotonic()
            if left <= 0:
                raise Unreachable(_unreachable(name, why, retry_seconds)) from error
            _tell(name, why, left)
            _wait(min(wait, left), stop)
            wait = min(2 * wait, LONGEST_WAIT)


def missing_target(path: str | None) -> str | None:
    """Where a link points to if that is nothing; else None."""
    if path is None or os.path.exists(path) or not os.path.islink(path):
        return None
    return printable(os.readlink(path))


def _unreachable(name: str, why: str, seconds: float) -> str:
    tried = f", nor for {seconds:g} s (data.retry_seconds)" if seconds else ""
    return (
        f"the data cannot be reached: {name} is one of the images and cannot be read now{tried}: "
        f"{why}. Check that its disk is mounted and that nothing was moved or removed; then run "
        "the same command again, which goes on from the last checkpoint"
    )


def _tell(name: str, why: str, left: float) -> None:
    """Says that the data is waited for: once a minute, for all threads of this process."""
    global _told
    now = time.monotonic()
    if not _told or now - _told > 60:
        _told = now
        print(f"waiting {left:.0f} s for the data to be back: {name}: {why}", file=sys.stderr)


def _wait(seconds: float, stop: threading.Event | None) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stop and stop.is_set():
            raise Interrupted("interrupted while the data could not be reached")
        time.sleep(min(left, 0.1))
