"""A second, tiny objective with learned prototypes, a center and a dropped patch."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from sop_jax.objectives.objective import Method, Objective, Outputs, PatchIndices, Selection
from sop_jax.schedules import Length, constant

COUNT = 16  # the number of prototypes
FROZEN = 2  # the number of first steps in which the prototypes do not learn


def frozen_at_first(rate: float) -> optax.GradientTransformation:
    """Returns plain gradient descent that starts after FROZEN steps."""
    started = optax.scale_by_schedule(lambda count: jnp.where(count < FROZEN, 0.0, 1.0))
    return optax.chain(optax.sgd(rate), started)


def centered(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    grid: tuple[int, int],
) -> Objective:
    """Returns the objective: all views and patches of the student predict the teacher's first view.

    Targets are centered by the running mean of the teacher's logits, as in DINO. The student drops
    one patch of each image and never sees the first global view.
    """
    del mesh, length, grid

    def init(key: jax.Array) -> tuple[dict[str, Any], Any]:
        kernel = jax.random.normal(key, (dim, COUNT))
        return {"prototypes": {"kernel": kernel}}, {"center": jnp.zeros(COUNT)}

    def select(mask: jax.Array, keys: jax.Array) -> Selection:
        batch, views, h, w = mask.shape
        order = jax.vmap(lambda key: jax.random.permutation(key, h * w))(keys)
        kept = jnp.broadcast_to(jnp.sort(order[:, None, 1:]), (batch, views, h * w - 1))
        among = jnp.broadcast_to(jnp.arange(h * w - 1), kept.shape)
        # Only the first global view, which the student does not see, has no masked patch.
        masked = jnp.broadcast_to(jnp.arange(views)[:, None] > 0, kept.shape)
        return Selection(PatchIndices(among, kept), PatchIndices(kept), masked)

    def teach(
        student_params: Any,
        teacher_params: Any,
        carried: Any,
        teacher: Outputs,
        masked: jax.Array,
        index: jax.Array,
        now: Any,
        key: jax.Array,
    ) -> tuple[Any, Any, Any]:
        chex.assert_equal_shape_prefix((masked, teacher.cls), 2)  # of all global views
        logits = teacher.cls @ teacher_params["prototypes"]["kernel"]
        center = 0.5 * carried["center"] + 0.5 * logits.mean((0, 1))
        targets = jax.nn.softmax((logits[:, 0] - carried["center"]) / now["temperature"])
        return {}, targets, {"center": center}

    def loss(
        params: Any, shared: Any, targets: jax.Array, student: Outputs, masked: jax.Array, now: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        kernel = params["prototypes"]["kernel"]
        views = jax.nn.log_softmax(student.cls @ kernel)
        patches = jax.nn.log_softmax(student.patches[:, 0] @ kernel)
        terms = {
            "views": -(targets[:, None] * views).sum(-1).mean(),
            "patches": -((targets[:, None] * patches).sum(-1) * masked[:, 0].astype(float)).mean(),
            "features": 1e-3 * (student.patch_features**2).mean(),
        }
        return sum(terms.values(), start=jnp.zeros(())), terms

    def measure(
        carried: Any, shared: Any, targets: Any, student_cls: jax.Array, now: Any
    ) -> dict[str, jax.Array]:
        # A mean of absolute values, since that of the values themselves is rounding error.
        size = jnp.abs(student_cls).mean()
        return {"student_cls": size, "center": jnp.linalg.norm(carried["center"])}

    return Objective(
        student_views=tuple(range(1, 2 + config.augment.local_crops)),
        teacher_views=(0, 1),
        schedules={"temperature": constant(0.5)},
        optimizers={"prototypes": lambda network: frozen_at_first(0.5)},
        terms=("views", "patches", "features"),
        init=init,
        select=select,
        teach=teach,
        loss=loss,
        measure=measure,
        verdict=lambda rows: None,
    )


CENTERED = Method(
    settings=ml_collections.ConfigDict,
    build=centered,
    rules={},
    check=lambda config: None,
    without_use=lambda config: {},
    batch_limit=lambda config: None,
    any_batch={},
    cls_only={},
    warmups={},
    scopes=(),
)
