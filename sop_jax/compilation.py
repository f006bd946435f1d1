"""Compiled programs kept on disk, so that the same run starts in seconds the next time."""

import hashlib
import os
import platform
from pathlib import Path

import jax

LIMIT = 4 * 2**30  # bytes; what was used least recently goes first


def keep_compiled(folder: str | None = None) -> str | None:
    """Keeps what XLA compiles in a folder, and takes it from there.

    A folder that JAX was told of by JAX_COMPILATION_CACHE_DIR, or that it uses already, stays;
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.

    Args:
        folder: by default one of the user's cache folder, apart for each kind of processor: a
            program that was compiled for one may not run on another that shares the disk.

    Returns:
        The folder that is used; None for a user who has no home.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            folder = folder or str(default_folder())
        except RuntimeError:  # of Path.home()
            return None
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_compilation_cache_max_size", LIMIT)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return jax.config.values["jax_compilation_cache_dir"]


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
