"""The trace of some steps is in TensorBoard's folder, and has the names of the parts."""

import pathlib
import re
from collections.abc import Iterator

import jax
import layouts
import numpy as np
import pytest

from sop_jax.monitor.profiling import Trace
from sop_jax.parallel.mesh import put, replicated, split

pytestmark = pytest.mark.medium

PARTS = ("prototypes", "teacher", "student", "losses", "update", "memories", "health")


@pytest.fixture(scope="module")
def steps() -> Iterator[jax.Array]:
    """Yields the loss of each step of a small run."""

    def taken() -> Iterator[jax.Array]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            run, state = layouts.small_run(monkeypatch)
        numbers = layouts.make_batch(run.batch)
        batch = {name: put(array, split(run.mesh)) for name, array in numbers.items()}
        measure = put(np.array(True), replicated(run.mesh))
        while True:
            state, metrics = run.train_step(state, batch, measure)
            yield metrics["loss"]

    return taken()


def traced(
    steps: Iterator[jax.Array], folder: pathlib.Path, wanted: tuple[int, int], start: int = 1
) -> dict[int, str]:
    """Returns the messages of the trace in the steps from `start` to 5."""
    trace, said = Trace(wanted, folder), {}
    for i in range(start, 6):
        trace.before(i)
        with jax.profiler.StepTraceAnnotation("train", step_num=i):
            loss = next(steps)
        if words := trace.after(i, loss):
            said[i] = words
    trace.close()
    return said


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.glob("plugins/profile/*/*.xplane.pb"))


def test_records_the_steps_that_are_asked_for_with_the_names_of_their_parts(
    steps: Iterator[jax.Array], tmp_path: pathlib.Path
) -> None:
    assert traced(steps, tmp_path, (2, 3)) == {3: f"steps 2 to 3 are traced in {tmp_path}"}
    (file,) = files(tmp_path)
    recorded = file.read_bytes()
    assert b"train" in recorded
    for part in PARTS:  # such as "jvp(student)"
        assert re.search(rf"[/(]{part}[/)]".encode(), recorded), part


@pytest.mark.parametrize(("wanted", "start"), [((0, 0), 1), ((7, 9), 1), ((1, 2), 3)])
def test_records_nothing_else(
    steps: Iterator[jax.Array], tmp_path: pathlib.Path, wanted: tuple[int, int], start: int
) -> None:
    assert traced(steps, tmp_path, wanted, start) == {}
    assert not files(tmp_path)


def test_a_resumed_run_says_which_steps_it_traced(
    steps: Iterator[jax.Array], tmp_path: pathlib.Path
) -> None:
    words = f"steps 3 to 4 are traced in {tmp_path}"
    assert traced(steps, tmp_path, (2, 4), start=3) == {4: words}


def test_a_trace_that_is_cut_short_is_written(
    steps: Iterator[jax.Array], tmp_path: pathlib.Path
) -> None:
    assert traced(steps, tmp_path, (4, 9)) == {}
    assert len(files(tmp_path)) == 1
