"""Paths as people write them, whether they can be written to, and files written whole."""

import importlib.util
import os
import re
import tempfile
import uuid

from etils import epath

from sop_jax.errors import UserError


def expand(text: str) -> str:
    """A path as a person wrote it, in the form that all commands use.

    Args:
        text: a local path, in which `~` and `~user` stand for home folders, or a `gs://` address.

    Returns:
        The local path without `~`, `./` and a trailing slash; an address as it was.

    Raises:
        UserError: the path is empty, the user is unknown, or this kind of address is not supported.
    """
    if not text.strip():
        raise UserError("it is empty: give a path; is a variable not set?")
    if re.match(r"[A-Za-z][\w+.-]+:/", text):
        if not text.startswith("gs://"):
            raise UserError(
                "this kind of address is not supported; use a local path, or gs://BUCKET/PATH for "
                "Google Cloud Storage"
            )
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError("gs:// needs gcsfs, which is not installed; run: pip install -e .[gcs]")
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"there is no user {expanded.split('/')[0][1:]!r}; for a name that starts with ~ "
            "write ./~"
        )
    return str(epath.Path(expanded))


def check_writable(path: epath.PathLike, flag: str) -> None:
    """Checks that a folder can be written to, or made, and leaves everything as it was.

    Args:
        path: of the folder, local or `gs://`; it need not exist.
        flag: by which another one can be chosen.

    Raises:
        UserError: it cannot be written to, and why.
    """
    folder = there = epath.Path(path)
    try:
        if "://" in str(folder):
            probe = folder / f".probe-{uuid.uuid4().hex}"
            probe.write_text("")
            probe.unlink()
            return
        while not os.path.lexists(there):
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except Exception as error:  # each kind of remote storage has its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if there == folder:
            raise UserError(f"cannot write to {folder}: {reason}; choose another {flag}") from error
        raise UserError(
            f"cannot make {folder} in {there}: {reason}; choose another {flag}"
        ) from error


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file that is never half written: it appears, or is replaced, when it is complete.

    Args:
        path: the file, local or `gs://`, in a folder that exists.
        text: the whole of it.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    if "://" in str(path):  # an object appears whole or not at all
        path.write_text(text)
        return
    draft = path.with_suffix(".tmp")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
