"""Compiled programs are cached in the folder of the user's caches, and found there again."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import jax
import pytest

from sop_jax.compiled.cache import default_folder, keep_compiled

PROGRAM = """
import sys, jax, jax.numpy as jnp
{before}
from sop_jax.compiled.cache import keep_compiled
print(keep_compiled())
jax.config.update("jax_persistent_cache_min_compile_time_secs", {least})
jax.jit(lambda x: jnp.{function}(x) @ x)(jnp.ones((50, 50)))
"""

FULL = """
import shutil, types
shutil.disk_usage = lambda folder: types.SimpleNamespace(free=0)
"""


def start(
    cache: pathlib.Path, function: str = "sin", before: str = "", least: float = 0.0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a new process that computes something, with `cache` as XDG_CACHE_HOME."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    program = PROGRAM.format(function=function, before=before, least=least)
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=kept | {"XDG_CACHE_HOME": str(cache)} | more,
        check=True,
    )


def run(cache: pathlib.Path, **more: Any) -> pathlib.Path:
    """Returns the folder that a new process uses, and asserts that it prints no error."""
    done = start(cache, **more)
    assert done.stderr == ""
    return pathlib.Path(done.stdout.strip())


def entries(folder: pathlib.Path) -> dict[str, int]:
    """Returns the programs in a cache, and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.rglob("*-cache")}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The caches of a user after a first program; tests that change them make a copy."""
    cache = tmp_path_factory.mktemp("cache")
    run(cache)
    return cache


@pytest.fixture
def copied(warm: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(warm, tmp_path / "elsewhere")


def test_programs_are_kept_in_the_users_cache(copied: pathlib.Path) -> None:
    """A copy of the cache in another place is used too."""
    kept = entries(copied)
    assert any(name.startswith("jit__lambda") for name in kept)
    folder = run(copied)
    assert folder.parent == copied / "sop_jax" and folder.name.startswith("compiled-")
    assert entries(copied) == kept


def test_half_an_entry_does_not_keep_others_from_being_written(copied: pathlib.Path) -> None:
    (time,) = copied.rglob("jit__lambda*-atime")
    time.unlink()
    before = entries(copied)
    stray = time.with_name("jit_gone-atime")
    stray.write_bytes(b"12345678")
    run(copied, function="cos")
    after = entries(copied)
    assert before.keys() - after.keys() == {time.name.replace("-atime", "-cache")}
    assert [name for name in after.keys() - before.keys() if name.startswith("jit__lambda")]
    assert not stray.exists()


def test_a_full_disk_is_reported_once_and_what_is_there_is_used(copied: pathlib.Path) -> None:
    def times() -> dict[str, int]:
        return {str(f): f.stat().st_mtime_ns for f in copied.rglob("*") if f.is_file()}

    kept = times()
    look = "jax.config.update('jax_explain_cache_misses', True)"
    done = start(copied, before=FULL + look, least=1e9)
    said = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and "has only 0 MiB left" in said[0]
    assert "PERSISTENT COMPILATION CACHE MISS for 'jit__lambda" not in done.stderr
    assert times() == kept


@pytest.mark.parametrize("case", ["read-only", "no folder"])
def test_a_cache_that_cannot_be_written_is_reported_in_one_line(
    case: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("compilation_cache_dir", "compilation_cache_max_size")
    names = (*names, "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": jax.config.values[f"jax_{name}"] for name in names}

    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    folder = tmp_path / "cache"
    if case == "no folder":
        folder.write_text("in its place")
    else:
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        used = keep_compiled(str(folder))
        written_after = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert used == (None if case == "no folder" else str(folder))
    assert written_after > 1e6 or used is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and str(folder) in line
    assert {"read-only": "Read-only file system", "no folder": "File exists"}[case] in line


def test_a_cache_that_fails_later_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    keep_compiled()
    told = f"{keep_compiled()}"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for name in ("jit_a", "jit_b"):
            warnings.warn(
                f"Error writing persistent compilation cache entry for '{name}': OSError: "
                "[Errno 28] No space left on device",
                stacklevel=1,
            )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: writing the cache of compiled programs failed (OSError: ")
    assert told in line


def test_a_folder_that_jax_is_configured_with_is_kept(tmp_path: pathlib.Path) -> None:
    told = tmp_path / "told"
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(told)) == told
    assert not (tmp_path / "sop_jax").exists()
    assert entries(told)


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert keep_compiled() is None
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_another_kind_of_processor_has_another_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = default_folder()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert default_folder() != here and default_folder().parent == here.parent
