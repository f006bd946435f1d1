"""The train step: one pure function from state and batch to state and metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, Key, Shaped, UInt8

from sop_jax.models import Model, Params
from sop_jax.objectives.objective import Objective, Outputs, Places
from sop_jax.schedules import Schedule
from sop_jax.training.state import OWN, TrainState

Batch = dict[str, Array]


def make_train_step(
    model: Model,
    objective: Objective,
    tx: optax.GradientTransformation,
    schedules: Mapping[str, Schedule],
    accumulate: int = 1,
) -> Callable[[TrainState, Batch, Bool[Array, ""]], tuple[TrainState, dict[str, Array]]]:
    """The step of a run.

    Args:
        model: the network that student and teacher share.
        objective: targets, losses and signs of health.
        tx: the optimizer.
        schedules: see `optim.schedules`; those of the objective join them.
        accumulate: microbatches of a batch, one after another, to save memory. Targets are made
            of the whole batch; all results are those of one batch, unless the network has batch
            norm. That norms each microbatch by itself, and a step moves its running statistics
            once a pass, by the mean of what the microbatches have seen.

    Returns:
        A function of the state, a batch (as `data.pipeline.train_batches` gives it) and whether to
        measure the signs of health, which are zeros otherwise. It gives the next state and
        metrics: scalars, and `corrupt` [B] of the global batch.
    """
    schedules = {**schedules, **objective.schedules}

    def train_step(
        state: TrainState, batch: Batch, measure: Bool[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        now = {name: schedule(state.step) for name, schedule in schedules.items()}
        targets_key, images_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        # Keys of each image: neither devices nor microbatches change what it draws.
        images_keys = split_each(jax.random.split(images_key, len(batch["index"])), 3)
        global_keys, local_keys, patch_keys = images_keys.T
        selection = objective.select(batch["mask"], patch_keys)
        parts = jax.tree.map(
            lambda x: deal(x, accumulate),
            {
                "global_views": batch["global_views"],
                "local_views": batch["local_views"],
                "mask": batch["mask"],
                "keys": (global_keys, local_keys),
                "selection": selection,
            },
        )

        def teacher(part: Any) -> tuple[Params, Outputs]:
            """The running statistics that some images move, and the teacher's outputs."""
            outputs, statistics = embed_views(
                model, state.teacher, objective.teacher_views, part, part["selection"].teacher
            )
            return statistics, outputs

        with jax.named_scope("teacher"):
            teacher_moved, outputs = mean_over_parts(teacher, parts, accumulate)
            outputs = jax.tree.map(collect, outputs)

        with jax.named_scope("targets"):
            shared, targets, carried = objective.teach(
                student=state.student.get(OWN, {}),
                teacher=state.teacher.get(OWN, {}),
                carried=state.carried,
                outputs=outputs,
                index=batch["index"],
                now=now,
                key=targets_key,
            )

        def loss_fn(params: Params, part: Any) -> tuple[Array, tuple[Any, Params, Array]]:
            """The loss of some images, its terms, the statistics they move, and their [CLS]."""
            with jax.named_scope("student"):
                outputs, statistics = embed_views(
                    model,
                    params,
                    objective.student_views,
                    part,
                    part["selection"].student,
                    mask=part["mask"],
                    keys=part["keys"],
                )
            with jax.named_scope("losses"):
                loss, terms = objective.loss(
                    params=params.get(OWN, {}),
                    shared=shared,
                    targets=part["targets"],
                    student=outputs,
                    masked=part["selection"].masked,
                    now=now,
                )
            return loss, (terms, statistics, outputs.cls)

        def student(part: Any) -> tuple[Any, Array]:
            """Loss, terms, statistics and gradients of some images, and their [CLS]."""
            (loss, (terms, statistics, cls)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.student, part
            )
            return (loss, terms, statistics, grads), cls

        parts["targets"] = jax.tree.map(lambda x: deal(x, accumulate), targets)
        (loss, terms, moved, grads), student_cls = mean_over_parts(student, parts, accumulate)

        with jax.named_scope("update"):
            updates, opt_state = tx.update(grads, state.opt_state, state.student)
            student_params = optax.apply_updates(state.student, updates)
            teacher_params = optax.incremental_update(
                student_params, state.teacher, 1 - now["momentum"]
            )
            # Neither the optimizer nor the average moves running statistics: forward passes do.
            student_params = with_statistics(student_params, moved)
            teacher_params = with_statistics(teacher_params, teacher_moved)

        with jax.named_scope("health"):
            signs = measure_when(
                measure,
                lambda: objective.measure(carried, shared, targets, collect(student_cls), now),
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
            state.step + 1, student_params, teacher_params, opt_state, carried, state.key
        )
        return state, metrics

    return train_step


def embed_views(
    model: Model,
    params: Params,
    views: Sequence[int],
    part: Mapping[str, Any],
    places: Places,
    mask: Bool[Array, "B Q h w"] | None = None,
    keys: tuple[Key[Array, " B"], Key[Array, " B"]] | None = None,
) -> tuple[Outputs, Params]:
    """What a network makes of some views in training, and the running statistics it leaves.

    Args:
        model: the network.
        params: its parameters.
        views: numbers of the views, global ones from 0, then local ones.
        part: has `global_views` [B Q S S 3] and `local_views` [B V s s 3].
        places: patches of all Q global views.
        mask: patches of the global views to replace by the mask token.
        keys: of the images, for the global and for the local views; they turn on drop path.
    """
    count = part["global_views"].shape[1]
    of_global = [view for view in views if view < count]
    of_local = [view - count for view in views if view >= count]
    global_keys, local_keys = keys or (None, None)
    outputs, statistics = embed_pass(
        *(model, params, pick(part["global_views"], of_global), global_keys),
        mask=None if mask is None else pick(mask, of_global),
        patches=pick(places.patches, of_global),
        kept=None if places.kept is None else pick(places.kept, of_global),
    )
    if of_local:
        params = with_statistics(params, statistics)
        local, statistics = embed_pass(
            model, params, pick(part["local_views"], of_local), local_keys
        )
        outputs = outputs._replace(
            cls=jnp.concatenate([outputs.cls, local.cls], axis=1),
            cls_features=jnp.concatenate([outputs.cls_features, local.cls_features], axis=1),
        )
    return outputs, statistics


def embed_pass(
    model: Model,
    params: Params,
    views: UInt8[Array, "B V H W 3"],
    keys: Key[Array, " B"] | None,
    mask: Bool[Array, "B V h w"] | None = None,
    patches: Int[Array, "B V M"] | None = None,
    kept: Int[Array, "B V T"] | None = None,
) -> tuple[Outputs, Params]:
    """What a network makes of views of one size in one forward pass of training."""
    batch, count = views.shape[:2]

    def flat(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(batch * count, *x.shape[2:])

    outputs, statistics = model.embed_training(
        *(params, flat(views), flat(mask)),
        keys=None if keys is None else split_each(keys, count).reshape(-1),
        patches=False if patches is None else flat(patches),
        kept=flat(kept),
    )
    # Images stay the leading axis inside the network, so that their sharding does.
    return Outputs(*(x.reshape(batch, count, *x.shape[1:]) for x in outputs)), statistics


def pick(x: Shaped[Array, "B V ..."], views: Sequence[int]) -> Shaped[Array, "B v ..."]:
    """Some of the views."""
    return x if list(views) == list(range(x.shape[1])) else x[:, np.array(views)]


def with_statistics(params: Params, statistics: Params) -> Params:
    """The parameters with these running statistics, a part of the same tree, in their places."""
    return params | {
        name: with_statistics(params[name], part) if isinstance(part, dict) else part
        for name, part in statistics.items()
    }


def split_each(keys: Key[Array, " B"], count: int) -> Key[Array, "B {count}"]:
    """So many keys from each."""
    return jax.vmap(lambda key: jax.random.split(key, count))(keys)


def deal(x: Shaped[Array, "B ..."], parts: int) -> Shaped[Array, "{parts} b ..."]:
    """A batch dealt out like cards, so that every device keeps its images."""
    return jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)


def collect(x: Shaped[Array, "parts b ..."]) -> Shaped[Array, "B ..."]:
    """What was dealt out, in its first order."""
    parts, size = x.shape[:2]
    return jnp.moveaxis(x, 0, 1).reshape(parts * size, *x.shape[2:])


def mean_over_parts(
    function: Callable[[Any], tuple[Any, Any]], parts: Any, count: int
) -> tuple[Any, Any]:
    """The mean over parts of what the function gives first, and what it gives second, stacked."""
    shapes, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        value, rest = function(part)
        return jax.tree.map(jnp.add, total, value), rest

    total, rest = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / count, total), rest


def measure_when(due: Bool[Array, ""], measure: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """The measurements when they are due, zeros in their place otherwise."""
    shapes = jax.eval_shape(measure)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.cond(due, measure, lambda: zeros)
