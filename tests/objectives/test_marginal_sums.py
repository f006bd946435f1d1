"""The train step balances targets over all devices and microbatches, as the golden numbers say.

Each image stands for one row of golden logits, which a network looks up in a table. So the targets
are made by the whole step, from batches that are split over devices or into microbatches.
"""

import functools
import math
from typing import Any

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_numbers import Found, difference
from small import small_config

from sop_jax.models import Model
from sop_jax.objectives.objective import Objective
from sop_jax.objectives.prototypical.layers import logits
from sop_jax.objectives.prototypical.objective import prototypical
from sop_jax.parallel.mesh import make_mesh, put, replicated, split
from sop_jax.schedules import Length
from sop_jax.training.state import TrainState
from sop_jax.training.step import make_train_step

pytestmark = pytest.mark.medium

TOLERANCE = 1e-5
DEVICES = 8
FAMILY = golden_numbers.load("family.npz")
LOGITS, TEMPS = FAMILY["marginal/logits"], FAMILY["marginal/temps"]
BATCHES, ROWS, COUNT = LOGITS.shape
COPIES = DEVICES // math.gcd(ROWS, DEVICES)  # equal copies of all rows change no mean and no scale

LAYOUTS = {"microbatches": dict(accumulate=2), "devices": dict(devices=DEVICES)}
# The golden targets of a marginal, and its golden centers.
GOLDEN = {
    "sinkhorn": ("sinkhorn3", None),
    "sinkhorn_probabilities": ("sinkhorn3_probs", None),
    "centering": ("centering_probs", "center"),
    "probability_centering": ("probability_probs", "probability_center"),
}


def lookup(params: Any, images: jax.Array, *_: Any, **__: Any) -> tuple[jax.Array, Any]:
    """Returns the rows of the table whose numbers the pixels hold as [CLS], and no patches."""
    pixels = images[:, 0, 0].astype(jnp.int32)
    return params["table"][pixels[:, 0] + 256 * pixels[:, 1]][:, None], {}


def showing_targets(objective: Objective) -> Objective:
    """Returns the objective with the targets of the first view as a sign, and the golden temps."""

    def measure(carried: Any, shared: Any, targets: Any, student_cls: Any, now: Any) -> Any:
        del carried, student_cls
        raised = logits("unit", shared["prototypes"]["cls"], targets["cls"][:, 0], now["sharp"])
        return {"targets": jax.nn.softmax(raised + shared["offsets"]["cls"])}

    def sharp(step: Any) -> jax.Array:
        return jnp.asarray(TEMPS, jnp.float32)[step]

    schedules = {**objective.schedules, "teacher_temperature": sharp, "sharp": sharp}
    return objective._replace(measure=measure, schedules=schedules)


@functools.cache
def steps(kind: str, accumulate: int = 1, devices: int = 1) -> dict[str, np.ndarray]:
    """Returns the targets of each golden batch, and its center if there is one, by golden names."""
    images, mesh = ROWS * COPIES, make_mesh(devices)
    momentum = float(FAMILY["marginal/momentum"])
    own = dict(prototypes=COUNT, layer="unit", freeze_epochs=0.0, marginal=kind)
    config = small_config(method="dino", batch_size=images, augment=dict(local_crops=0))
    config.dino.update(own | dict(center_momentum=momentum))
    given = config, COUNT, mesh, Length(10, 1.0)
    objective = showing_targets(prototypical(*given, teacher_views=(0,)))
    functions = dict.fromkeys(("init", "embed", "embed_training", "features", "attention"), lookup)
    model = Model(
        **functions,
        encode_training=lookup,
        project_training=lambda params, tokens: (tokens, {}),
        patch=1,
        dim=COUNT,
    )
    plan = {"momentum": lambda step: jnp.ones(())}
    step = make_train_step(model, objective, optax.set_to_zero(), plan, accumulate)
    table = jnp.asarray(LOGITS.reshape(-1, COUNT), jnp.float32)
    params = {"table": table, "objective": {"prototypes": {"cls": {"direction": jnp.eye(COUNT)}}}}
    _, carried = objective.init(jax.random.key(0))
    key = jax.random.key(0)
    state: Any = TrainState(jnp.zeros((), jnp.int32), params, params, (), carried, key)
    state = jax.device_put(state, replicated(mesh))
    compiled, found = jax.jit(step), {}
    probs, center = GOLDEN[kind]
    for i in range(BATCHES):
        row = np.tile(np.arange(ROWS), COPIES) + i * ROWS
        pixels = np.zeros((images, 2, 1, 1, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = (x[:, None, None, None] for x in (row % 256, row // 256))
        batch = {
            "global_views": pixels,
            "local_views": pixels[:, :0],
            "mask": np.zeros((images, 2, 1, 1), bool),
            "index": np.arange(images, dtype=np.int32),
            "corrupt": np.full(images, -1, np.int32),
        }
        placed = {name: put(array, split(mesh)) for name, array in batch.items()}
        state, metrics = compiled(state, placed, put(np.array(True), replicated(mesh)))
        targets = np.asarray(metrics["targets"]).reshape(COPIES, ROWS, COUNT)
        np.testing.assert_allclose(targets, targets[:1].repeat(COPIES, 0), atol=1e-6)
        found[f"marginal/{probs}_{i}"] = targets[0]
        if center:
            found[f"marginal/{center}_{i}"] = state.carried["marginals"]["cls"]["center"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", GOLDEN)
def test_targets_are_made_from_the_whole_batch(kind: str, layout: str) -> None:
    found = steps(kind, **LAYOUTS[layout])
    assert len(found) == BATCHES * (2 if GOLDEN[kind][1] else 1)
    wrong = (difference(key, FAMILY[key], Found(x, TOLERANCE)) for key, x in found.items())
    assert [message for message in wrong if message] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinkhorn_differs_from_one_that_forgets_to_sum(layout: str) -> None:
    """Each half of the batch alone gives other targets, by far more than the tolerance."""
    for key, targets in steps("sinkhorn", **LAYOUTS[layout]).items():
        other = FAMILY[key.replace("sinkhorn3", "sinkhorn3_unsynchronised")]
        assert np.abs(targets - other).max() > 1000 * TOLERANCE
