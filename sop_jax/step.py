"""The train step: one pure function from state and batch to state and metrics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key, UInt8

from sop_jax.models import Model, Params
from sop_jax.optim import Schedule
from sop_jax.sop.objective import Embeddings, Objective, Temperatures
from sop_jax.state import TrainState

Batch = dict[str, Array]


def embed_views(
    model: Model,
    params: Params,
    views: UInt8[Array, "B V H W 3"],
    mask: Bool[Array, "B V h w"] | None = None,
    key: Key[Array, ""] | None = None,
    patches: bool = True,
) -> tuple[Float[Array, "V B d"], Float[Array, "V B L d"]]:
    """Embeddings of views in one forward, views first in the result."""
    batch, count = views.shape[:2]
    flat_mask = None if mask is None else mask.reshape(-1, *mask.shape[2:])
    flat = views.reshape(-1, *views.shape[2:])
    outputs = model.embed(params, flat, flat_mask, key, patches)
    # Images stay the leading axis inside the network, so that their sharding does.
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 0), outputs
    )


def make_train_step(
    model: Model,
    objective: Objective,
    tx: optax.GradientTransformation,
    plan: dict[str, Schedule],
) -> Callable[[TrainState, Batch, Bool[Array, ""]], tuple[TrainState, dict[str, Array]]]:
    """The step of a run.

    Args:
        model: the network that student and teacher share.
        objective: memories, targets and losses.
        tx: the optimizer.
        plan: schedules, see `optim.schedules`.

    Returns:
        A function of the state, a batch (as `data.pipeline.train_batches` gives it) and whether to
        measure the signs of health, which are zeros otherwise. It gives the next state and
        metrics: scalars, and `corrupt` [B] of the global batch.
    """

    def train_step(
        state: TrainState, batch: Batch, measure: Bool[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        now = {name: schedule(state.step) for name, schedule in plan.items()}
        temperatures = Temperatures(now["student_temperature"], now["teacher_temperature"])
        sop_key, global_key, local_key, patch_key = jax.random.split(
            jax.random.fold_in(state.key, state.step), 4
        )
        views, local_views, mask = batch["global_views"], batch["local_views"], batch["mask"]
        view_mask = jnp.moveaxis(mask, 1, 0).reshape(mask.shape[1], mask.shape[0], -1)

        with jax.named_scope("teacher"):
            teacher = Embeddings(*embed_views(model, state.teacher, views))

        with jax.named_scope("prototypes"):
            sops = objective.prototypes(state.memories, sop_key)
            targets = objective.targets(sops, teacher, temperatures)

        def loss_fn(params: Params) -> tuple[Array, tuple[dict[str, Array], Embeddings]]:
            with jax.named_scope("student"):
                cls, patches = embed_views(model, params, views, mask, global_key)
                if local_views.shape[1]:
                    local_cls, _ = embed_views(
                        model, params, local_views, None, local_key, patches=False
                    )
                    cls = jnp.concatenate([cls, local_cls])
                student = Embeddings(cls, patches)
            with jax.named_scope("losses"):
                loss, terms = objective.loss(
                    sops, targets, student, teacher, view_mask, temperatures
                )
            return loss, (terms, student)

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (terms, student)), grads = gradient(state.student)

        with jax.named_scope("update"):
            updates, opt_state = tx.update(grads, state.opt_state, state.student)
            student_params = optax.apply_updates(state.student, updates)
            teacher_params = optax.incremental_update(
                student_params, state.teacher, 1 - now["momentum"]
            )

        with jax.named_scope("memories"):
            memories = objective.remember(state.memories, teacher, batch["index"], patch_key)

        signs = measure_when(
            measure,
            lambda: objective.measure(memories, sops, targets, student, teacher),
        )
        metrics = {
            "loss": loss,
            **terms,
            "grad_norm": optax.tree.norm(grads),
            **now,
            **signs,
            "corrupt": batch["corrupt"],
        }
        state = TrainState(
            state.step + 1, student_params, teacher_params, opt_state, memories, state.key
        )
        return state, metrics

    return train_step


def measure_when(due: Bool[Array, ""], measure: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """The measurements when they are due, zeros in their place otherwise."""
    shapes = jax.eval_shape(measure)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.cond(due, measure, lambda: zeros)
