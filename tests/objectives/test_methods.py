"""What every method's run has in common: layouts, microbatches, resume, types and refusals."""

import functools
import pathlib
from typing import Any

import jax
import layouts
import numpy as np
import processes
import pytest

from sop_jax.check import check_config, without_use
from sop_jax.config import paper
from sop_jax.errors import UserError
from sop_jax.objectives.methods import METHODS
from sop_jax.parallel.mesh import make_mesh, put, replicated, split
from sop_jax.settings import flatten
from sop_jax.training import checkpoint
from sop_jax.training.assemble import Run, assemble

# Methods whose loss compares all images of a batch, so that they refuse microbatches.
WHOLE_BATCH = {"carp", "decoupled carp", "msn", "pmsn"}
STEPS = 20
# Smaller gradients and terms are sums of a hundred times larger numbers that nearly cancel.
LEAST = 1e-2


def test_every_method_has_a_small_run():
    assert {name.split()[0] for name in layouts.METHODS} == METHODS.keys() - {"sop"}


def runs(method: str) -> list[Any]:
    """Returns a method's name, and the names of its variants, whose tests are all slow."""
    names = sorted(name for name in layouts.METHODS if name.split()[0] == method)
    return [pytest.param(name, marks=[pytest.mark.slow] * (name != method)) for name in names]


@pytest.fixture(
    scope="module", params=[run for method in METHODS if method != "sop" for run in runs(method)]
)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def on_one_device(method: str) -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return layouts.trajectory(monkeypatch, method=method)


@pytest.fixture(scope="module")
def one_device(method: str) -> dict[str, np.ndarray]:
    return on_one_device(method)


@pytest.mark.medium
def test_it_learns_and_every_device_computes_what_one_does(
    method: str, one_device: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = layouts.trajectory(monkeypatch, data=4, fsdp=2, method=method)
    layouts.assert_same(found, one_device, LEAST)
    assert len({float(one_device[f"{step}/metrics/loss"]) for step in range(layouts.STEPS)}) == 3
    gradients = [x for name, x in one_device.items() if name.startswith("0/gradients/")]
    assert max(np.abs(x).max() for x in gradients) > 1e-4


@pytest.mark.slow
def test_microbatches_compute_the_same_or_are_refused(
    method: str, one_device: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    if method in WHOLE_BATCH:
        with pytest.raises(UserError, match=r"accumulate is 4, but .* all images of a batch"):
            check_config(layouts.make_config(accumulate=4, method=method))
        return
    found = layouts.trajectory(monkeypatch, accumulate=4, method=method)
    layouts.assert_same(found, one_device, LEAST)


@pytest.mark.slow
def test_two_processes_compute_what_one_device_does(tmp_path: pathlib.Path) -> None:
    script = pathlib.Path(__file__).parents[1] / "two_hosts.py"
    given = [[script, "methods", tmp_path, *among] for among in processes.among(2)]
    with processes.start(given, tmp_path / "log") as running:
        ended = running.end(900)
    assert [end.code for end in ended] == [0, 0], ended
    for name in layouts.METHODS:
        with np.load(tmp_path / f"{name}.npz") as found:
            layouts.assert_same(dict(found), on_one_device(name), LEAST)


class Taken:
    """A small run with its usual optimizer, and its compiled step."""

    def __init__(self, method: str, dtype: str = "float32") -> None:
        config = layouts.make_config(method=method)
        config.model.dtype = dtype
        config.optim.update(dict(lr=5e-3, warmup_steps=0))
        self.run: Run = assemble(config, make_mesh(1), images=1000)
        self.batch = {
            name: put(array, split(self.run.mesh))
            for name, array in layouts.make_batch(self.run.batch).items()
        }
        measure = jax.ShapeDtypeStruct((), bool, sharding=replicated(self.run.mesh))
        self.compiled = self.run.train_step.lower(
            self.run.abstract, self.run.batch, measure
        ).compile()

    def steps(self, state: Any, count: int) -> tuple[Any, list[dict[str, Any]]]:
        rows = []
        for _ in range(count):
            state, metrics = self.compiled(
                state, self.batch, put(np.array(True), replicated(self.run.mesh))
            )
            rows.append(jax.device_get(metrics))
        return state, rows

    def arrays(self, state: Any) -> dict[str, np.ndarray]:
        return layouts.named(state._replace(key=jax.random.key_data(state.key)))


@pytest.mark.medium
def test_it_learns_a_batch_and_resumes_to_the_same_bits(
    method: str, tmp_path: pathlib.Path
) -> None:
    taken = Taken(method)
    state, rows = taken.steps(taken.run.init(jax.random.key(0)), STEPS)
    for row in rows:
        assert all(np.isfinite(value).all() for value in row.values()), row
    assert {*taken.run.objective.terms} <= rows[0].keys()
    expected = taken.arrays(state)
    state, _ = taken.steps(taken.run.init(jax.random.key(0)), STEPS - 2)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(STEPS - 2, state)
    checkpoints.close()
    state, again = taken.steps(checkpoint.restore(tmp_path, taken.run.abstract), 2)
    found = taken.arrays(state)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name
    assert again[-1]["loss"] == rows[-1]["loss"]


@pytest.mark.slow
@pytest.mark.usefixtures("promotion")
def test_it_is_finite_in_bfloat16(method: str) -> None:
    taken = Taken(method, "bfloat16")
    _, rows = taken.steps(taken.run.init(jax.random.key(0)), STEPS)
    for row in rows:
        assert all(np.isfinite(value).all() for value in row.values()), row


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sop"])
def test_its_settings_have_no_effect_if_another_is_chosen(method: str) -> None:
    reasons = without_use(paper())
    for key in flatten(paper()[method], f"{method}."):
        assert reasons[key] == "method is sop"
    config = paper()
    config.method = method
    assert without_use(config).keys() <= flatten(config).keys()
    assert without_use(config)["sop.pool"] == f"method is {method}"


def test_an_unknown_method_is_named_with_the_nearest():
    config = paper()
    config.method = "dinno"
    with pytest.raises(UserError, match=r"method is 'dinno'; expected one of .*; did you mean din"):
        check_config(config)
