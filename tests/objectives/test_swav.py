"""SwAV gives the numbers of the authors' code, step by step, and its queue is that of a batch."""

from typing import Any

import golden_numbers
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from golden_numbers import Found, differences, unnoticed

from sop_jax.check import check_config, without_use
from sop_jax.config import paper
from sop_jax.errors import UserError
from sop_jax.models.head import unit
from sop_jax.objectives.objective import Objective, Outputs
from sop_jax.objectives.prototypical.layers import init_prototypes, rows, scaled_before
from sop_jax.objectives.prototypical.marginals import sinkhorn_offset
from sop_jax.objectives.swav import SWAV, queued_sinkhorn
from sop_jax.parallel.mesh import make_mesh, replicated, split
from sop_jax.schedules import Length

TOLERANCE = 1e-5
FAMILY = golden_numbers.load("family.npz")
FEATURES = FAMILY["swav/features"]
STEPS, VIEWS, BATCH, DIM = FEATURES.shape
COUNT, QUEUE = len(FAMILY["swav/prototypes_start"]), int(FAMILY["swav/queue_length"])
RATE, FROZEN = 0.5, 1  # of the golden run: its learning rate, and its steps without learning


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    config: ml_collections.ConfigDict = paper()
    config.method, config.batch_size = "swav", BATCH
    config.augment.local_crops = VIEWS - 2
    config.swav.update(dict(prototypes=COUNT, queue=QUEUE, queue_start_epochs=0.0) | changes)
    config.swav.freeze_steps = FROZEN
    config.optim.momentum = (0.0, 0.0)
    return config


def single(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def outputs(z: jax.Array) -> Outputs:
    """Returns the outputs of a network whose embeddings are z [V B d]."""
    cls = jnp.moveaxis(z, 0, 1)
    none = jnp.zeros((BATCH, 2, 0, 1))
    return Outputs(cls, none, cls, none)


class Step:
    """A step of SwAV's loss and of the prototypes, as functions of given features."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.objective: Objective = SWAV.build(config, DIM, make_mesh(1), Length(100, 1.0), (2, 2))

        def network(late: int = 0, plain: bool = False) -> optax.GradientTransformation:
            return optax.sgd(RATE)

        self.tx = self.objective.optimizers["prototypes"](network)
        self.now = {"student_temperature": 0.1, "teacher_temperature": 0.05}

    def loss(self, params: Any, carried: Any, raw: jax.Array) -> tuple[jax.Array, Any]:
        """Returns the loss, and the codes [2 B K] and what is carried."""
        z = unit(raw)
        taught = outputs(jax.lax.stop_gradient(z[:2]))
        mask = jnp.zeros((BATCH, 2, 0), bool)
        given = params, params, carried, taught, mask, jnp.arange(BATCH), self.now
        shared, targets, carried = jax.lax.stop_gradient(
            self.objective.teach(*given, jax.random.key(0))
        )
        value, _ = self.objective.loss(params, shared, targets, outputs(z), mask, self.now)
        scores = jnp.einsum("qbd,kd->qbk", z[:2], rows(params["prototypes"]["cls"]))
        offsets = shared["offsets"]["cls"][:, None]
        return value, (jax.nn.softmax(scores / 0.05 + offsets), carried)


@pytest.mark.medium
def test_every_step_is_that_of_the_authors_code() -> None:
    """The queue is used when it is full, in the last two steps; the newest batch is in front."""
    step = Step(make_config())
    _, carried = step.objective.init(jax.random.key(0))
    params = {"prototypes": {"cls": {"normalized": single(FAMILY["swav/prototypes_start"])}}}
    state, numbers = step.tx.init(params["prototypes"]), {}
    gradient = jax.jit(jax.value_and_grad(step.loss, (0, 2), has_aux=True))
    for i, raw in enumerate(single(FEATURES)):
        (value, (codes, carried)), (by_params, by_raw) = gradient(params, carried, raw)
        own = by_params["prototypes"]
        updates, state = step.tx.update(own, state, params["prototypes"])
        params = {"prototypes": optax.apply_updates(params["prototypes"], updates)}
        queue = carried["marginals"]["cls"]["queue"]["rows"]  # [2, B, slots, d]
        numbers |= {
            f"loss_{i}": value,
            f"codes_{i}": codes,
            f"queue_{i}": jnp.swapaxes(queue, 1, 2).reshape(2, -1, DIM),
            f"grad_features_{i}": by_raw,
            # A frozen prototype has no gradient in PyTorch.
            f"grad_prototypes_{i}": own["cls"]["normalized"] * float(i >= FROZEN),
            f"prototypes_{i}": params["prototypes"]["cls"]["normalized"],
        }
    found = {f"swav/{name}": Found(value, TOLERANCE) for name, value in numbers.items()}
    inputs = ("swav/features", "swav/prototypes_start", "swav/queue_length")
    assert set(found) == {k for k in FAMILY if k.startswith("swav/") and k not in inputs}
    assert STEPS > QUEUE // BATCH + 1
    assert differences(FAMILY, found) == []
    assert unnoticed(FAMILY, found) == []


@pytest.mark.parametrize("full", [False, True])
def test_a_queue_counts_only_when_it_is_full(full: bool) -> None:
    config = make_config(queue=2 * BATCH)
    own = queued_sinkhorn(config.swav, DIM, BATCH, start=3)
    rng = np.random.default_rng(0)
    older, batch = (unit(single(rng.normal(size=(n * BATCH, DIM)))) for n in (2, 1))
    prototypes = unit(single(rng.normal(size=(COUNT, DIM))))
    steps = jnp.int32(3 + 2 if full else 3 + 1)
    state = {"queue": {"rows": older.reshape(BATCH, 2, DIM)}, "steps": steps}

    def logits(u: jax.Array) -> jax.Array:
        return u @ prototypes.T / 0.05

    offset, after = own.offset(logits, batch[None], jnp.ones((1, BATCH)), state, 0.05)
    together = jnp.concatenate([batch, older]) if full else batch
    expected = sinkhorn_offset(logits(together), jnp.ones(len(together)), 3)
    np.testing.assert_allclose(offset - offset.mean(), expected - expected.mean(), atol=1e-4)
    assert after["steps"] == steps + 1
    np.testing.assert_array_equal(after["queue"]["rows"][:, 0], batch)
    np.testing.assert_array_equal(after["queue"]["rows"][:, 1], older.reshape(BATCH, 2, DIM)[:, 0])


@pytest.mark.medium
def test_codes_of_eight_devices_are_those_of_one() -> None:
    config = make_config(queue=16)
    config.batch_size = 8
    own = queued_sinkhorn(config.swav, DIM, 8, start=0)
    rng = np.random.default_rng(0)
    prototypes = unit(single(rng.normal(size=(COUNT, DIM))))
    state = {"queue": {"rows": unit(single(rng.normal(size=(8, 2, DIM))))}, "steps": jnp.int32(2)}
    batch = unit(single(rng.normal(size=(8, DIM))))

    def offset(batch: jax.Array, queue: jax.Array) -> tuple[jax.Array, Any]:
        given = state | {"queue": {"rows": queue}}
        ones = jnp.ones((1, len(batch)))
        return own.offset(lambda u: u @ prototypes.T / 0.05, batch[None], ones, given, 0.05)

    one, after_one = jax.jit(offset)(batch, state["queue"]["rows"])
    mesh = make_mesh()
    given = jax.device_put((batch, state["queue"]["rows"]), split(mesh))
    where = split(mesh), replicated(mesh)
    eight, after = jax.jit(
        offset, out_shardings=(where[1], {"queue": {"rows": where[0]}, "steps": where[1]})
    )(*given)
    np.testing.assert_allclose(eight, one, atol=1e-5)
    np.testing.assert_array_equal(after["queue"]["rows"], after_one["queue"]["rows"])
    alone = [offset(half, state["queue"]["rows"][:4])[0] for half in (batch[:4], batch[4:])]
    assert max(float(jnp.abs(part - one).max()) for part in alone) > 0.1  # unsynchronised


def test_normalized_prototypes_are_scaled_before_a_step_and_not_after_it() -> None:
    params = init_prototypes(jax.random.key(0), "normalized", 5, 8)
    assert params.keys() == {"normalized"}
    np.testing.assert_allclose(jnp.linalg.norm(rows(params), axis=1), 1, rtol=1e-5)
    cotangent = jax.random.normal(jax.random.key(1), (5, 8))
    (gradient,) = jax.vjp(rows, params)[1](cotangent)
    np.testing.assert_array_equal(gradient["normalized"], cotangent)  # not projected
    tx = scaled_before(optax.sgd(0.1))
    updates, _ = tx.update(gradient, tx.init(params), params)
    found = optax.apply_updates(params, updates)["normalized"]
    np.testing.assert_allclose(found, rows(params) - 0.1 * cotangent, atol=1e-6)


def test_a_queue_of_whole_batches_is_asked_for() -> None:
    config = make_config(queue=QUEUE + 1)
    with pytest.raises(UserError, match=rf"swav\.queue {QUEUE + 1} .*--config\.swav\.queue=\d+"):
        check_config(config)
    config = make_config()
    config.batch_size, config.swav.queue = 1, 0
    with pytest.raises(UserError, match=r"swav\.marginal is sinkhorn, but batch_size is 1"):
        check_config(config)
    config = make_config()
    config.head.unit = False
    with pytest.raises(UserError, match=r"head\.unit is false"):
        check_config(config)
    check_config(make_config())


def test_settings_of_a_queue_need_one() -> None:
    unused = without_use(make_config(queue=0))
    assert {"swav.queue_start_epochs", "swav.queue_start_steps"} <= unused.keys()
    unused = without_use(make_config(marginal="centering"))
    assert unused["swav.queue"] == "swav.marginal is centering"
    assert "swav.queue_start_steps" in unused and "swav.queue" not in without_use(make_config())
