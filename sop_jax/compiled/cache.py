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

LIMIT = 4 * 2**30  # bytes; what was used least recently goes first
LEAST = 2**26  # bytes of free disk, for a step or two

_NEVER = 1e9  # seconds that a compilation would have to take to be written
_PATIENCE = 10  # seconds, of JAX too, for another process that holds the cache's lock


def keep_compiled(folder: str | None = None) -> str | None:
    """Keeps what XLA compiles in a folder, and takes it from there.

    A folder that JAX was told of by JAX_COMPILATION_CACHE_DIR, or that it uses already, stays;
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. A folder that cannot be written to is read,
    and this is said once, as is any later failure; what an interrupted write left is removed.

    Args:
        folder: by default one of the user's cache folder, apart for each kind of processor: a
            program that was compiled for one may not run on another that shares the disk.

    Returns:
        The folder that is used; None for a user who has no home, or where it cannot be made.
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
        # A cache inside the cache, for GPUs, whose path would be a part of every program's key.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if not isinstance(warnings.showwarning, functools.partial):
        warnings.showwarning = functools.partial(_show, warnings.showwarning, [])
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _tell(f"compiled programs are not kept, because {folder} cannot be made: {error}")
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if reason := unwritable(Path(folder)):
        _tell(f"what is compiled now is not kept, because {reason}")
        # Without a limit, reading writes nothing: neither a lock nor the time of the last use.
        jax.config.update("jax_compilation_cache_max_size", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _NEVER)
    elif jax.config.values["jax_compilation_cache_max_size"] != -1:
        remove_halves(Path(folder))
    return folder


def unwritable(folder: Path) -> str | None:
    """Why nothing can be kept in a folder; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror or error}"
    free = shutil.disk_usage(folder).free
    return f"the disk of {folder} has only {free // 2**20} MiB left" if free < LEAST else None


def remove_halves(folder: Path) -> None:
    """Removes entries of JAX's cache without their time of use, and times without their entry.

    One such entry, which may be cut off, is enough for JAX to write no others.
    """
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=_PATIENCE):  # as JAX does
            entries = {file.name[: -len("-cache")]: file for file in folder.glob("*-cache")}
            times = {file.name[: -len("-atime")]: file for file in folder.glob("*-atime")}
            for key in entries.keys() ^ times.keys():
                (entries.get(key) or times[key]).unlink(missing_ok=True)
    except (OSError, filelock.Timeout):
        pass  # JAX meets the same and says it


def _show(
    others: Callable[..., Any], told: list[str], message: Warning | str, *where: Any, **file: Any
) -> None:
    """Shows a warning as ever, but of those of JAX's cache the first only, in plain words."""
    text = str(message)
    if "persistent compilation cache entry" not in text:
        others(message, *where, **file)
    elif not told:
        told.append(text)
        doing = "reading" if "Error reading" in text else "writing"
        _tell(
            f"{doing} the cache of compiled programs failed ({text.partition(': ')[2]}), so some "
            f"are compiled anew each time. Free some space or remove "
            f"{jax.config.values['jax_compilation_cache_dir']}"
        )


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def default_folder() -> Path:
    """`sop_jax/compiled-<processor>` where XDG_CACHE_HOME says, or in ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sop_jax" / f"compiled-{_processor()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    abilities = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    text = "\n".join([platform.machine(), *abilities])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
