"""Decoupled prototypes follow the teacher's embeddings, in the unchanged loss of another method."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from small import small_config

from sop_jax.models.head import unit
from sop_jax.objectives import decoupled
from sop_jax.objectives.methods import METHODS
from sop_jax.objectives.objective import Objective, Outputs
from sop_jax.objectives.prototypical import mixture
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length

pytestmark = pytest.mark.medium

BATCH, VIEWS, DIM, COUNT = 8, 4, 6, 12
GRID = (2, 2)

SHARED = dict(
    prototypes=COUNT,
    student_temperature=0.2,
    teacher_temperature=(0.1, 0.1),
    temperature_warmup_epochs=0.0,
    layer="unit",
    freeze_epochs=0.0,
)
# The settings with which a method and its decoupled version have the same loss.
LOSSES: dict[str, dict[str, Any]] = {
    "dino": dict(marginal="probability_centering", prior="uniform"),
    "carp": dict(block=5, marginal="none", prior="uniform"),
    "ibot": dict(patch_prototypes=7, marginal="centering", prior="none"),
}


def make_config(method: str, loss: str) -> ml_collections.ConfigDict:
    section = SHARED | LOSSES[loss] | (dict(loss=loss) if method == "decoupled" else {})
    return small_config(
        method=method,
        batch_size=BATCH,
        augment=dict(local_crops=VIEWS - 2),
        mask=dict(ratio=(0.5, 0.5)),
        **{method: section},
    )


def build(method: str, loss: str) -> Objective:
    config = make_config(method, loss)
    return METHODS[method].build(config, DIM, make_mesh(1), Length(10, 1.0), GRID)


def outputs(seed: int, views: int, patches: int) -> Outputs:
    of_cls, of_patches = jax.random.split(jax.random.key(seed))
    cls = unit(jax.random.normal(of_cls, (BATCH, views, DIM)))
    rows = unit(jax.random.normal(of_patches, (BATCH, 2, patches, DIM)))
    return Outputs(cls, rows, cls, rows)


class Step:
    """One step of the objective of a method, without a network."""

    def __init__(self, method: str, loss: str, prototypes: Any = None) -> None:
        self.objective = build(method, loss)
        self.now = {name: schedule(0) for name, schedule in self.objective.schedules.items()}
        self.params, self.carried = self.objective.init(jax.random.key(0))
        if prototypes is not None:
            self.params = {"prototypes": prototypes}
        mask = jnp.arange(4).reshape(GRID) < 2
        keys = jax.random.split(jax.random.key(3), BATCH)
        selection = self.objective.select(jnp.broadcast_to(mask, (BATCH, 2, *GRID)), keys)
        self.teacher = outputs(1, 2, selection.teacher.patches.shape[-1])
        self.student = outputs(2, VIEWS, selection.student.patches.shape[-1])
        self.masked = selection.masked
        given = (self.carried, self.teacher, self.masked, jnp.arange(BATCH), self.now)
        self.shared, self.targets, self.after = self.objective.teach(
            *(self.params, self.params, *given), jax.random.key(4)
        )

    def loss(self, params: Any, cls: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        student = self.student._replace(cls=cls)
        return self.objective.loss(
            params, self.shared, self.targets, student, self.masked, self.now
        )

    def gradients(self) -> Any:
        compare = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)
        return compare(self.params, self.student.cls)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_the_other_method(loss: str) -> None:
    """With the means as its prototypes, the other method has the same loss and gradient."""
    found = Step("decoupled", loss)
    taught = found.shared["prototypes"]
    expected = Step(loss, loss, taught)
    (value, terms), (_, by_student) = found.gradients()
    (other, others), (_, by_other) = expected.gradients()
    assert terms.keys() == others.keys() == {*expected.objective.terms}
    np.testing.assert_allclose(value, other, rtol=1e-6)
    np.testing.assert_allclose(by_student, by_other, atol=1e-7)
    assert np.abs(by_student).max() > 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_the_prototypes_of_cls_learn_by_no_gradient(loss: str) -> None:
    step = Step("decoupled", loss)
    assert step.params.get("prototypes", {}).keys() == ({"patch"} if loss == "ibot" else set())
    _, (by_params, _) = step.gradients()
    for gradient in jax.tree.leaves(by_params):
        assert np.abs(gradient).max() > 1e-4  # those of patches do


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mixture_begins_at_features_and_is_updated_before_use(loss: str) -> None:
    """It takes both global views of all images."""
    step, section = Step("decoupled", loss), make_config("decoupled", loss).decoupled
    h = step.teacher.cls.reshape(-1, DIM)
    floor = section.variance_floor / DIM
    assert step.carried["source"].mass.sum() == 0
    key = jax.random.fold_in(jax.random.key(0), decoupled.START)
    variance = jnp.float32(section.start_variance / DIM)
    before = mixture.start_at(h, key, COUNT, section.start_mass, variance)
    expected = mixture.update(before, h, section.beta[0], section.eta, floor, section.forgetting)
    found = step.after["source"]
    for name, array in expected._asdict().items():
        np.testing.assert_allclose(getattr(found, name), array, rtol=1e-5, atol=1e-6)
    means = step.shared["prototypes"]["cls"]["direction"]
    np.testing.assert_allclose(means, mixture.prototypes(expected), atol=1e-6)
    assert np.abs(means - mixture.prototypes(before)).max() > 1e-3
    given = step.after, step.teacher, step.masked, jnp.arange(BATCH), step.now, jax.random.key(5)
    *_, later = step.objective.teach(step.params, step.params, *given)
    expected = mixture.update(found, h, section.beta[0], section.eta, floor, section.forgetting)
    np.testing.assert_allclose(later["source"].mass, expected.mass, rtol=1e-5)


def test_the_entropy_of_the_mixture_is_a_sign() -> None:
    step = Step("decoupled", "carp")
    given = step.after, step.shared, step.targets, step.student.cls, step.now
    entropy = step.objective.measure(*given)["mixture_entropy"]
    assert 0.5 * np.log(COUNT) < entropy < np.log(COUNT)
