"""Reads a record, and retries if the storage is at fault rather than the record."""

import errno
import os
import sys
import threading
import time

import numpy as np

from sop_jax.data.folders import printable
from sop_jax.data.sources import Source
from sop_jax.errors import Interrupted, Unreachable, UserError

FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds between two attempts; each wait doubles the last
DENIED = (errno.EACCES, errno.EPERM)

_last_notice = 0.0  # when this process last reported that it is waiting, by time.monotonic


def read(
    source: Source, index: int, retry_seconds: float, stop: threading.Event | None = None
) -> bytes | np.ndarray:
    """Returns record `index` of a source, and retries for a while if the storage fails.

    A file-system error says nothing about the record itself: the disk or the network has failed,
    or a file that was listed is gone, as all files are when a disk is no longer mounted. Replacing
    the record by another one would change the run, so the read is retried instead.

    Args:
        source: the data set.
        index: the index of the record.
        retry_seconds: how long to retry, in seconds; 0 to not retry.
        stop: ends the wait when it is set.

    Returns:
        An encoded image, or pixels uint8 [h, w, 3].

    Raises:
        ValueError: the record is damaged, or is a link to a file that does not exist.
        Unreachable: it still could not be read after `retry_seconds`.
        Interrupted: `stop` was set during the wait.
        UserError: the user does not have permission to read it.
    """
    began, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            return source[index]
        except OSError as error:
            name, why = source.name(index), error.strerror or str(error)
            if target := missing_target(error.filename):
                raise ValueError(f"it is a link to {target}, which does not exist") from error
            if error.errno in DENIED:
                raise UserError(
                    f"{name} cannot be read: {why}. Make it readable for this user, or remove it "
                    "and start a new run."
                ) from error
            left = began + retry_seconds - time.monotonic()
            if left <= 0:
                raise Unreachable(_unreachable(name, why, retry_seconds)) from error
            _report_wait(name, why, left)
            _wait(min(wait, left), stop)
            wait = min(2 * wait, LONGEST_WAIT)


def missing_target(path: str | None) -> str | None:
    """Returns the target of a broken link in printable form, or None for any other path."""
    if path is None or os.path.exists(path) or not os.path.islink(path):
        return None
    return printable(os.readlink(path))


def _unreachable(name: str, why: str, seconds: float) -> str:
    tried = f" after {seconds:g} s of retries (data.retry_seconds)" if seconds else ""
    return (
        f"the data cannot be reached: {name} was listed as an image but cannot be read{tried}: "
        f"{why}. Check that its disk is mounted and that no file was moved or removed; then run "
        "the same command again, which resumes from the last checkpoint"
    )


def _report_wait(name: str, why: str, left: float) -> None:
    """Reports that the data is being waited for, at most once per minute and process."""
    global _last_notice
    now = time.monotonic()
    if not _last_notice or now - _last_notice > 60:
        _last_notice = now
        print(f"the data cannot be read, retrying for {left:.0f} s: {name}: {why}", file=sys.stderr)


def _wait(seconds: float, stop: threading.Event | None) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stop and stop.is_set():
            raise Interrupted("interrupted while waiting for data that could not be reached")
        time.sleep(min(left, 0.1))
