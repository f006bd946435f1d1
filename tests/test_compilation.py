"""Compiled programs are kept where the user's caches are, and found there again."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from sop_jax.compilation import default_folder, keep_compiled

PROGRAM = """
import time, jax, jax.numpy as jnp
from sop_jax.compilation import keep_compiled
print(keep_compiled())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((50, 50)))
"""


def run(cache: pathlib.Path, **more: str) -> str:
    """The folder that a new process uses, where XDG_CACHE_HOME is `cache`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    environment = kept | {"XDG_CACHE_HOME": str(cache)} | more
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "error" not in done.stderr.lower()
    return done.stdout.strip()


def test_programs_are_kept_in_the_users_cache(tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(run(tmp_path))
    assert folder.parent == tmp_path / "sop_jax" and folder.name.startswith("compiled-")
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("*-cache")}
    assert any(name.startswith("jit__lambda") for name in kept)
    assert run(tmp_path) == str(folder)
    assert {f.name: f.stat().st_mtime_ns for f in folder.glob("*-cache")} == kept


def test_a_folder_that_jax_was_told_of_stays(tmp_path: pathlib.Path) -> None:
    told = str(tmp_path / "told")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=told) == told
    assert not (tmp_path / "sop_jax").exists()
    assert any(pathlib.Path(told).iterdir())


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


def test_tests_share_what_they_compile() -> None:
    assert keep_compiled() == jax.config.values["jax_compilation_cache_dir"]
