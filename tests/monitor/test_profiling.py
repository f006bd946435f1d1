"""The trace of some steps is where TensorBoard looks for it, with the parts' names."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from sop_jax.monitor.profiling import Trace


@jax.jit
def step(x: jax.Array) -> jax.Array:
    with jax.named_scope("teacher"):
        return x @ x


def traced(folder: pathlib.Path, steps: tuple[int, int], start: int = 1) -> dict[int, str]:
    """What five steps say of their trace."""
    trace, said = Trace(steps, folder), {}
    x = jnp.eye(8)
    for i in range(start, 6):
        trace.before(i)
        with jax.profiler.StepTraceAnnotation("train", step_num=i):
            x = step(x)
        if words := trace.after(i, x):
            said[i] = words
    trace.close()
    return said


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.glob("plugins/profile/*/*.xplane.pb"))


def test_records_the_steps_that_are_asked_for(tmp_path: pathlib.Path) -> None:
    assert traced(tmp_path, (2, 3)) == {3: f"steps 2 to 3 are traced in {tmp_path}"}
    (file,) = files(tmp_path)
    assert b"train" in file.read_bytes()


def test_names_the_parts_of_a_step() -> None:
    assert "teacher" in step.lower(jnp.eye(8)).compile().as_text()


@pytest.mark.parametrize(("steps", "start"), [((0, 0), 1), ((7, 9), 1), ((1, 2), 3)])
def test_records_nothing_else(tmp_path: pathlib.Path, steps: tuple[int, int], start: int) -> None:
    assert traced(tmp_path, steps, start) == {}
    assert not files(tmp_path)


def test_a_resumed_run_says_which_steps_it_traced(tmp_path: pathlib.Path) -> None:
    assert traced(tmp_path, (2, 4), start=3) == {4: f"steps 3 to 4 are traced in {tmp_path}"}


def test_a_trace_that_is_cut_short_is_written(tmp_path: pathlib.Path) -> None:
    assert traced(tmp_path, (4, 9)) == {}
    assert len(files(tmp_path)) == 1
