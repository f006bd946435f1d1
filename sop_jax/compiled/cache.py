"""Compiled programs kept on disk, so that the same run starts in seconds the next time."""

import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import jax

LIMIT = 4 * 2**30  # bytes of the cache; the least recently used programs are removed first
LEAST = 2**26  # bytes of free disk space that are required, enough for a step or two

_NEVER = 1e9  # seconds that a compilation would have to take to be stored
_LOCK_TIMEOUT = 10  # seconds for another process to release the cache's lock, as in JAX


def keep_compiled(folder: str | None = None) -> str | None:
    """Stores what XLA compiles in a folder, and reads it from there the next time.

    A folder given by JAX_COMPILATION_CACHE_DIR, or one that JAX already uses, takes precedence;
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. If the folder cannot be written to, it
    is only read. This is reported once, and so is any later failure. Incomplete entries of an
    interrupted write are removed.

    Args:
        folder: the folder; by default `default_folder()`, which differs between kinds of
            processors, because a program compiled for one may not run on another.

    Returns:
        The folder in use; None if the user has no home folder or the folder cannot be made.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            folder = folder or str(default_folder())
        except RuntimeError:  # of Path.home()
            return None
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_compilation_cache_max_size", LIMIT)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not jax.config.values["jax_enable_compilation_cache"] or "://" in folder:
        return folder
    if jax.default_backend() != "gpu":
        # XLA's own caches, inside this one, serve GPUs only, and their path would become a part of
        # the key of every program.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if not isinstance(warnings.showwarning, functools.partial):
        warnings.showwarning = functools.partial(_show, warnings.showwarning, [])
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _warn(f"compiled programs are not stored, because {folder} cannot be made: {error}")
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if reason := unwritable(Path(folder)):
        _warn(f"newly compiled programs are not stored, because {reason}")
        # Without a limit, reading writes neither a lock nor the time of the last use.
        jax.config.update("jax_compilation_cache_max_size", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _NEVER)
    elif jax.config.values["jax_compilation_cache_max_size"] != -1:
        remove_halves(Path(folder))
    return folder


def unwritable(folder: Path) -> str | None:
    """Returns why nothing can be stored in a folder, or None if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror or error}"
    free = shutil.disk_usage(folder).free
    return f"the disk of {folder} has only {free // 2**20} MiB left" if free < LEAST else None


def remove_halves(folder: Path) -> None:
    """Removes entries of JAX's cache without their time of use, and times without their entry.

    A single such entry, which may be incomplete, stops JAX from writing any others.
    """
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=_LOCK_TIMEOUT):  # as JAX does
            entries = {file.name[: -len("-cache")]: file for file in folder.glob("*-cache")}
            times = {file.name[: -len("-atime")]: file for file in folder.glob("*-atime")}
            for key in entries.keys() ^ times.keys():
                (entries.get(key) or times[key]).unlink(missing_ok=True)
    except (OSError, filelock.Timeout):
        pass  # JAX meets the same error and reports it


def _show(
    others: Callable[..., Any], shown: list[str], message: Warning | str, *where: Any, **file: Any
) -> None:
    """Shows a warning as usual, but only the first one of JAX's cache, in plain words."""
    text = str(message)
    if "persistent compilation cache entry" not in text:
        others(message, *where, **file)
    elif not shown:
        shown.append(text)
        doing = "reading" if "Error reading" in text else "writing"
        _warn(
            f"{doing} the cache of compiled programs failed ({text.partition(': ')[2]}), so some "
            "programs are compiled again each time. Free some disk space, or remove "
            f"{jax.config.values['jax_compilation_cache_dir']}"
        )


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def default_folder() -> Path:
    """Returns `sop_jax/compiled-<processor>` in XDG_CACHE_HOME, or in ~/.cache by default.

    Raises:
        RuntimeError: the user has no home folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sop_jax" / f"compiled-{_processor()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    abilities = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    text = "\n".join([platform.machine(), *abilities])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
