"""The step serves an objective that shares nothing with SOP: it trains, shards and resumes."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from centered import CENTERED, COUNT, FROZEN
from jax.sharding import PartitionSpec as P

from sop_jax.objectives.methods import METHODS
from sop_jax.parallel.mesh import put, replicated, split
from sop_jax.training import checkpoint

pytestmark = pytest.mark.medium

STEPS = 5


@pytest.fixture(autouse=True)
def other_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "sop", CENTERED)


@pytest.fixture(scope="module")
def one_device() -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(METHODS, "sop", CENTERED)
        return layouts.trajectory(monkeypatch)


class Taken:
    """A run on one device, and its first steps on the same batch."""

    def __init__(self) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setitem(METHODS, "sop", CENTERED)
            self.run, state = layouts.small_run(monkeypatch)
        self.batch = layouts.make_batch(self.run.batch)
        measure = jax.ShapeDtypeStruct((), bool, sharding=replicated(self.run.mesh))
        self.compiled = self.run.train_step.lower(
            self.run.abstract, self.run.batch, measure
        ).compile()
        self.states, self.metrics = [jax.device_get(self.hidden(state))], []
        for _ in range(STEPS):
            state, metrics = self.step(state, self.batch)
            self.states.append(jax.device_get(self.hidden(state)))
            self.metrics.append(jax.device_get(metrics))

    def hidden(self, state: Any) -> Any:
        """Returns the state with the data of its key."""
        return state._replace(key=jax.random.key_data(state.key))

    def step(self, state: Any, batch: dict[str, np.ndarray]) -> tuple[Any, dict[str, jax.Array]]:
        placed = {name: put(array, split(self.run.mesh)) for name, array in batch.items()}
        return self.compiled(state, placed, put(np.array(True), replicated(self.run.mesh)))

    def first_step(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        _, metrics = self.step(self.run.init(jax.random.key(0)), batch)
        return jax.device_get(metrics)


@pytest.fixture(scope="module")
def taken() -> Taken:
    return Taken()


def prototypes(params: Any) -> np.ndarray:
    return params["objective"]["prototypes"]["kernel"]


def test_it_learns(taken: Taken) -> None:
    losses = [row["loss"] for row in taken.metrics]
    assert losses[-1] < losses[0] - 0.05
    row = taken.metrics[0]
    assert row["loss"] == pytest.approx(row["views"] + row["patches"] + row["features"], rel=1e-6)
    assert row["patches"] > 0  # the masks are those of the views that the student sees
    assert row["temperature"] == 0.5


def test_its_parameters_have_an_optimizer_of_their_own(taken: Taken) -> None:
    """They are frozen in the first steps, unlike the network; the teacher has their average."""
    students = [prototypes(state.student) for state in taken.states]
    assert students[0].shape == (8, COUNT)
    for i in range(FROZEN):
        np.testing.assert_array_equal(students[i + 1], students[0])
    assert np.abs(students[FROZEN + 1] - students[0]).max() > 1e-4
    before, after = (state.student["head"]["fc1"]["kernel"] for state in taken.states[1:3])
    assert np.abs(after - before).max() > 1e-6
    for i, row in enumerate(taken.metrics):
        m = row["momentum"]
        expected = m * prototypes(taken.states[i].teacher) + (1 - m) * students[i + 1]
        np.testing.assert_allclose(prototypes(taken.states[i + 1].teacher), expected, rtol=1e-5)


def test_the_student_does_not_see_the_view_of_the_teacher(taken: Taken) -> None:
    for view, seen in ((0, False), (1, True)):
        changed = taken.batch | {"global_views": taken.batch["global_views"].copy()}
        changed["global_views"][:, view] = 255 - changed["global_views"][:, view]
        metrics = taken.first_step(changed)
        assert (metrics["student_cls"] != taken.metrics[0]["student_cls"]) == seen
        assert metrics["center"] != taken.metrics[0]["center"]  # the teacher sees both


@pytest.mark.parametrize("layout", [dict(data=2, fsdp=4), dict(accumulate=4)], ids=str)
def test_every_layout_computes_what_one_device_does(
    layout: dict[str, Any], one_device: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they change the center, which is the mean over the whole batch."""
    found = layouts.trajectory(monkeypatch, **layout)
    layouts.assert_same(found, one_device)
    assert np.abs(one_device["carried/center"]).max() > 0.1
    np.testing.assert_allclose(found["carried/center"], one_device["carried/center"], rtol=1e-5)


def test_its_parameters_are_shared_by_the_devices_of_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = layouts.small_run(monkeypatch, data=2, fsdp=4)
    for params in (run.abstract.student, run.abstract.teacher):
        assert prototypes(params).sharding.spec == P(None, "fsdp")


def test_it_resumes_to_the_same_bits(taken: Taken, tmp_path: pathlib.Path) -> None:
    state = taken.run.init(jax.random.key(0))
    for _ in range(2):
        state, _ = taken.step(state, taken.batch)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(2, state)
    checkpoints.close()
    state = checkpoint.restore(tmp_path, taken.run.abstract)
    for _ in range(2, STEPS):
        state, metrics = taken.step(state, taken.batch)
    found, expected = (layouts.named(x) for x in (taken.hidden(state), taken.states[-1]))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.asarray(found[name]).tobytes() == array.tobytes(), name
    assert metrics["loss"] == taken.metrics[-1]["loss"]


def test_terms_of_an_objective_are_among_the_metrics(taken: Taken) -> None:
    assert {*taken.run.objective.terms} < taken.metrics[0].keys()
    assert all(np.isfinite(jnp.asarray(row["features"])) for row in taken.metrics)
