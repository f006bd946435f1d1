"""The train step: one pure function from state and batch to state and metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8

from sop_jax.models import Model, Params
from sop_jax.objectives.objective import Objective, Outputs, PatchIndices
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
    """Returns the train step of a run.

    Args:
        model: the network of student and teacher.
        objective: the targets, losses and signs of health.
        tx: the optimizer.
        schedules: see `optim.schedules`; the objective's schedules are added to them.
        accumulate: the number of microbatches into which a batch is split to save memory. Targets
            are made from the whole batch, and all results equal those of an unsplit batch unless
            the network has batch norm. Batch norm normalizes each microbatch by itself, and a step
            updates its running statistics once per pass, by the mean over the microbatches.

    Returns:
        A function `(state, batch, measure) -> (state, metrics)`. The batch is that of
        `data.pipeline.train_batches`, and `measure` says whether to measure the signs of health,
        which are zeros otherwise. The metrics are scalars by name, and `corrupt` [B] of the batch.
    """
    schedules = {**schedules, **objective.schedules}

    def train_step(
        state: TrainState, batch: Batch, measure: Bool[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        now = {name: schedule(state.step) for name, schedule in schedules.items()}
        targets_key, images_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        # Each image has keys of its own, so that neither the devices nor the microbatches change
        # what it draws.
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

        seen = [view for view in objective.student_views if view < batch["mask"].shape[1]]

        def teacher(part: Any) -> tuple[Params, Outputs]:
            """Returns the running statistics after a microbatch, and the teacher's outputs."""
            outputs, statistics = embed_views(
                model, state.teacher, objective.teacher_views, part, part["selection"].teacher
            )
            return statistics, outputs

        with jax.named_scope("teacher"):
            teacher_moved, outputs = mean_over_parts(teacher, parts, accumulate)
            outputs = jax.tree.map(collect, outputs)

        with jax.named_scope("targets"):
            shared, targets, carried = objective.teach(
                student_params=state.student.get(OWN, {}),
                teacher_params=state.teacher.get(OWN, {}),
                carried=state.carried,
                teacher=outputs,
                masked=selection.masked,
                index=batch["index"],
                now=now,
                key=targets_key,
            )

        def loss_fn(params: Params, part: Any) -> tuple[Array, tuple[Any, Params, Array]]:
            """Returns the loss of a microbatch, and its terms, running statistics and [CLS]."""
            with jax.named_scope("student"):
                outputs, statistics = embed_views(
                    model,
                    params,
                    objective.student_views,
                    part,
                    part["selection"].student,
                    mask=part["mask"] if objective.masks else None,
                    keys=part["keys"],
                )
            with jax.named_scope("losses"):
                loss, terms = objective.loss(
                    params=params.get(OWN, {}),
                    shared=shared,
                    targets=part["targets"],
                    student=outputs,
                    masked=pick(part["selection"].masked, seen),
                    now=now,
                )
            return loss, (terms, statistics, outputs.cls)

        def student(part: Any) -> tuple[Any, Array]:
            """Returns the loss, terms, statistics and gradients of a microbatch, and its [CLS]."""
            (loss, (terms, statistics, cls)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.student, part
            )
            return (loss, terms, statistics, grads), cls

        parts["targets"] = jax.tree.map(lambda x: deal(x, accumulate), targets)
        (loss, terms, moved, grads), student_cls = mean_over_parts(student, parts, accumulate)

        with jax.named_scope("update"):
            student_params, teacher_params, opt_state = update(tx, grads, state, now["momentum"])
            # Only forward passes change running statistics, not the optimizer or the average.
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


def update(
    tx: optax.GradientTransformation,
    gradients: Params,
    state: TrainState,
    momentum: Float[Array, ""] | float,
) -> tuple[Params, Params, Any]:
    """Returns the student after an optimizer step, the new teacher, and the optimizer's state.

    Args:
        tx: the optimizer.
        gradients: the gradients of the student's parameters.
        state: the state before the step.
        momentum: the share of the teacher's parameters that remains.
    """
    updates, opt_state = tx.update(gradients, state.opt_state, state.student)
    student = optax.apply_updates(state.student, updates)
    teacher = optax.incremental_update(student, state.teacher, 1 - momentum)
    return student, teacher, opt_state


def embed_views(
    model: Model,
    params: Params,
    views: Sequence[int],
    part: Mapping[str, Any],
    indices: PatchIndices,
    mask: Bool[Array, "B Q h w"] | None = None,
    keys: tuple[Key[Array, " B"], Key[Array, " B"]] | None = None,
) -> tuple[Outputs, Params]:
    """Embeds some views in training.

    Args:
        model: the network.
        params: its parameters.
        views: the numbers of the views: from 0, first the global ones and then the local ones.
        part: contains `global_views` [B Q S S 3] and `local_views` [B V s s 3] as uint8.
        indices: the patches of all Q global views to encode and to embed.
        mask: the patches of the global views to replace by the mask token; none by default.
        keys: for the global and for the local views, a key per image; with them drop path is on.

    Returns:
        The outputs, and the running statistics after the forward passes.
    """
    count = part["global_views"].shape[1]
    of_global = [view for view in views if view < count]
    of_local = [view - count for view in views if view >= count]
    global_keys, local_keys = keys or (None, None)
    tokens, moved = encode_views(
        *(model, params, pick(part["global_views"], of_global), global_keys),
        mask=None if mask is None else pick(mask, of_global),
        patches=pick(indices.patches, of_global),
        kept=None if indices.kept is None else pick(indices.kept, of_global),
    )
    passes = [tokens]
    if of_local:
        params = with_statistics(params, moved)
        local, moved = encode_views(model, params, pick(part["local_views"], of_local), local_keys)
        passes.append(local)
    embedded, moved_head = project_passes(model, params, passes)
    cls, cls_features = (
        jnp.concatenate([x[:, :, 0] for x in of_passes], axis=1) for of_passes in (embedded, passes)
    )
    outputs = Outputs(cls, embedded[0][:, :, 1:], cls_features, tokens[:, :, 1:])
    return outputs, moved | moved_head


def project_passes(
    model: Model, params: Params, passes: Sequence[Array]
) -> tuple[list[Array], Params]:
    """Returns the embeddings of each pass of the backbone, and the head's running statistics.

    The tokens of a pass are [B V N D], with V and N of its own, and their embeddings [B V N d].
    The head sees the passes one after the other, or all at once if `model.together`.
    """
    if model.together:
        # Images remain the first axis, to keep their sharding.
        by_image = [x.reshape(len(x), -1, x.shape[-1]) for x in passes]
        whole, moved = model.project_training(params, jnp.concatenate(by_image, axis=1))
        ends = np.cumsum([x.shape[1] for x in by_image])[:-1].tolist()
        parts = jnp.split(whole, ends, axis=1)
        shapes = [(*x.shape[:-1], whole.shape[-1]) for x in passes]
        return [x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)], moved
    embedded, moved = [], {}
    for tokens in passes:
        batch, count = tokens.shape[:2]
        flat = tokens.reshape(batch * count, *tokens.shape[2:])
        found, moved = model.project_training(with_statistics(params, moved), flat)
        embedded.append(found.reshape(batch, count, *found.shape[1:]))
    return embedded, moved


def encode_views(
    model: Model,
    params: Params,
    views: UInt8[Array, "B V H W 3"],
    keys: Key[Array, " B"] | None,
    mask: Bool[Array, "B V h w"] | None = None,
    patches: Int[Array, "B V M"] | None = None,
    kept: Int[Array, "B V T"] | None = None,
) -> tuple[Float[Array, "B V N D"], Params]:
    """Returns the tokens of views of the same size, from one pass of the backbone in training.

    [CLS] is the first token, and the patches to embed follow; the second result is the running
    statistics of the backbone after the pass. See `embed_views`.
    """
    batch, count = views.shape[:2]

    def flat(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(batch * count, *x.shape[2:])

    tokens, statistics = model.encode_training(
        *(params, flat(views), flat(mask)),
        keys=None if keys is None else split_each(keys, count).reshape(-1),
        patches=False if patches is None else flat(patches),
        kept=flat(kept),
    )
    # Inside the network, images remain the leading part of the first axis, to keep their sharding.
    return tokens.reshape(batch, count, *tokens.shape[1:]), statistics


def pick(x: Shaped[Array, "B V ..."], views: Sequence[int]) -> Shaped[Array, "B v ..."]:
    """Returns some of the views, in the order given."""
    return x if list(views) == list(range(x.shape[1])) else x[:, np.array(views)]


def with_statistics(params: Params, statistics: Params) -> Params:
    """Returns the parameters with the leaves of `statistics`, a part of the same tree, replaced."""
    return params | {
        name: with_statistics(params[name], part) if isinstance(part, dict) else part
        for name, part in statistics.items()
    }


def split_each(keys: Key[Array, " B"], count: int) -> Key[Array, "B {count}"]:
    """Splits each key into `count` keys."""
    return jax.vmap(lambda key: jax.random.split(key, count))(keys)


def deal(x: Shaped[Array, "B ..."], parts: int) -> Shaped[Array, "{parts} b ..."]:
    """Splits a batch: image i joins microbatch i % parts, so that images stay on their devices."""
    return jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)


def collect(x: Shaped[Array, "parts b ..."]) -> Shaped[Array, "B ..."]:
    """Joins microbatches from `deal` into a batch in the original order."""
    parts, size = x.shape[:2]
    return jnp.moveaxis(x, 0, 1).reshape(parts * size, *x.shape[2:])


def mean_over_parts(
    function: Callable[[Any], tuple[Any, Any]], parts: Any, count: int
) -> tuple[Any, Any]:
    """Maps a function over microbatches, one at a time.

    Args:
        function: returns a pair for each microbatch.
        parts: the microbatches, stacked on the leading axis of every leaf.
        count: the number of microbatches.

    Returns:
        The mean of the first results, and the stack of the second results.
    """
    if count == 1:  # without a loop, in which XLA's compiler for CPUs optimizes less
        value, rest = function(jax.tree.map(lambda x: x[0], parts))
        return value, jax.tree.map(lambda x: x[None], rest)
    shapes, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        value, rest = function(part)
        return jax.tree.map(jnp.add, total, value), rest

    total, rest = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / count, total), rest


def measure_when(due: Bool[Array, ""], measure: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """Returns the measurements if they are due, else zeros of the same shapes."""
    shapes = jax.eval_shape(measure)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.cond(due, measure, lambda: zeros)
