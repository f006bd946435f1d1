"""Normalizes paths, checks that they can be written to, and writes files atomically."""

import contextlib
import importlib.util
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator

from etils import epath

from sop_jax.errors import UserError

ABANDONED = 3600  # seconds without a write after which a draft was left by a killed process


def expand(text: str) -> str:
    """Normalizes a path that a user wrote to the form that all commands use.

    Args:
        text: a local path, in which `~` and `~user` stand for home folders, or a `gs://` address.

    Returns:
        A local path without `~`, `./` and a trailing slash; an address is returned unchanged.

    Raises:
        UserError: the path is empty, the user is unknown, or this kind of address is not supported.
    """
    if not text.strip():
        raise UserError("it is empty; give a path (is a shell variable not set?)")
    if re.match(r"[A-Za-z][\w+.-]+:/", text):
        if not text.startswith("gs://"):
            raise UserError(
                "this kind of address is not supported; use a local path, or gs://BUCKET/PATH for "
                "Google Cloud Storage"
            )
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(
                "gs:// needs gcsfs, which is not installed; run: pip install -e '.[gcs]'"
            )
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"there is no user {expanded.split('/')[0][1:]!r}; if the name itself starts with ~, "
            "write ./~"
        )
    return str(epath.Path(expanded))


def absolute(path: str) -> str:
    """Returns a path expanded and, if it is local, absolute, for readers in other folders.

    Raises:
        UserError: see `expand`.
    """
    path = expand(path)
    return path if "://" in path else os.path.abspath(path)


def check_writable(path: epath.PathLike, flag: str) -> None:
    """Checks that a folder can be written to, or created, without leaving anything behind.

    Args:
        path: the folder, local or `gs://`; it need not exist.
        flag: the flag that sets this folder, for the message.

    Raises:
        UserError: it cannot be written to; the message gives the reason.
    """
    folder = there = epath.Path(path)
    try:
        if "://" in str(folder):
            probe = folder / f".probe-{uuid.uuid4().hex}"
            probe.write_text("")
            probe.unlink(missing_ok=True)  # a repeated request finds what the first has removed
            return
        while not os.path.lexists(there):
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except Exception as error:  # each kind of remote storage has its own exceptions
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if there == folder:
            raise UserError(f"cannot write to {folder}: {reason}; choose another {flag}") from error
        raise UserError(
            f"cannot create {folder} in {there}: {reason}; choose another {flag}"
        ) from error


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file atomically, as UTF-8: it appears, or replaces the old one, when complete.

    Several processes may write the same file: each file is whole, and the last one stays.

    Args:
        path: the file, local or `gs://`, in an existing folder.
        text: the entire content.

    Raises:
        OSError: the file cannot be written; an old one is left unchanged.
    """
    content = text.encode()  # whatever the locale is
    if "://" in str(path):  # objects in a bucket appear only when complete
        path.write_bytes(content)
        return
    with draft_of(path) as draft:
        draft.write_bytes(content)


@contextlib.contextmanager
def draft_of(path: epath.Path) -> Iterator[epath.Path]:
    """A context that gives the path of a draft, which replaces the file when it is complete.

    An exception removes the draft. Older ones of the same file are removed too: a killed process
    leaves its draft.

    Args:
        path: the file, local or `gs://`, in an existing folder.

    Raises:
        OSError: the file cannot be replaced.
    """
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
        if "://" not in str(path):
            _remove_abandoned_drafts(path)


def _remove_abandoned_drafts(path: epath.Path) -> None:
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{32}\.tmp")
    # Another process may remove them at the same time, or they belong to another user.
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - ABANDONED:
                os.unlink(entry)
