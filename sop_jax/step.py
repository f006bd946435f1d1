"""The train step: one pure function from state and batch to state and metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key, Shaped, UInt8

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
    keys: Key[Array, " B"] | None = None,
    patches: Int[Array, "B V M"] | None = None,
) -> tuple[Embeddings, Params]:
    """Embeddings of views in one forward pass of training, and the running statistics it leaves.

    Of patches, those at the given places alone.
    """
    batch, count = views.shape[:2]
    flat_mask = None if mask is None else mask.reshape(-1, *mask.shape[2:])
    flat_keys = None if keys is None else split_each(keys, count).reshape(-1)
    flat = views.reshape(-1, *views.shape[2:])
    flat_patches = False if patches is None else patches.reshape(len(flat), patches.shape[-1])
    outputs, statistics = model.embed_training(params, flat, flat_mask, flat_keys, flat_patches)
    # Images stay the leading axis inside the network, so that their sharding does.
    embeddings = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 0), outputs
    )
    return Embeddings(*embeddings), statistics


def make_train_step(
    model: Model,
    objective: Objective,
    tx: optax.GradientTransformation,
    schedules: dict[str, Schedule],
    accumulate: int = 1,
    most_masked: int | None = None,
) -> Callable[[TrainState, Batch, Bool[Array, ""]], tuple[TrainState, dict[str, Array]]]:
    """The step of a run.

    Args:
        model: the network that student and teacher share.
        objective: memories, targets and losses.
        tx: the optimizer.
        schedules: see `optim.schedules`.
        accumulate: microbatches of a batch, one after another, to save memory. Prototypes are
            drawn once and memories written once; all results are those of one batch, unless the
            network has batch norm. That norms each microbatch by itself, and a step moves its
            running statistics once a pass, by the mean of what the microbatches have seen.
        most_masked: patches of a view, at most, as masks are drawn; the head sees so many. By
            default all.

    Returns:
        A function of the state, a batch (as `data.pipeline.train_batches` gives it) and whether to
        measure the signs of health, which are zeros otherwise. It gives the next state and
        metrics: scalars, and `corrupt` [B] of the global batch.
    """

    def train_step(
        state: TrainState, batch: Batch, measure: Bool[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        now = {name: schedule(state.step) for name, schedule in schedules.items()}
        temperatures = Temperatures(now["student_temperature"], now["teacher_temperature"])
        sop_key, images_key = jax.random.split(jax.random.fold_in(state.key, state.step))

        with jax.named_scope("prototypes"):
            sops = objective.prototypes(state.memories, sop_key)

        def loss_fn(params: Params, part: Batch) -> tuple[Array, tuple[dict[str, Array], Any, Any]]:
            """The loss of some images, where they move running statistics, and what is kept."""
            views, local_views, mask = part["global_views"], part["local_views"], part["mask"]
            global_keys, local_keys, patch_keys = split_each(part["keys"], 3).T

            # The head sees the patches that a loss or a memory takes: masked ones, and the
            # teacher's one more, drawn for each image, which comes last.
            masked, is_masked = masked_first(mask, most_masked if objective.patches else 0)
            taken = masked
            if objective.patches:
                drawn = draw_patches(patch_keys, views.shape[1], mask[0, 0].size)
                taken = jnp.concatenate([masked, drawn], axis=-1)

            with jax.named_scope("teacher"):
                teacher, teacher_statistics = embed_views(
                    model, state.teacher, views, patches=taken
                )
                kept = objective.keep(teacher)
                teacher = Embeddings(teacher.cls, teacher.patches[:, :, : masked.shape[-1]])

            with jax.named_scope("student"):
                (cls, patches), statistics = embed_views(
                    model, params, views, mask, global_keys, masked
                )
                if local_views.shape[1]:
                    params = with_statistics(params, statistics)
                    (local_cls, _), statistics = embed_views(
                        model, params, local_views, None, local_keys
                    )
                    cls = jnp.concatenate([cls, local_cls])
                student = Embeddings(cls, patches)

            with jax.named_scope("losses"):
                views_first = jnp.moveaxis(is_masked, 1, 0)
                loss, terms = objective.loss(sops, student, teacher, views_first, temperatures)

            seen = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), (student.cls, teacher.cls))
            return loss, (terms, (statistics, teacher_statistics), (kept, seen))

        def gradient(part: Batch) -> tuple[Any, Any]:
            (loss, (terms, moved, outputs)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.student, part
            )
            return (loss, terms, moved, grads), outputs

        # A key for each image: neither devices nor microbatches change what it draws.
        batch = batch | {"keys": jax.random.split(images_key, len(batch["index"]))}
        parts = jax.tree.map(lambda x: deal(x, accumulate), batch)
        (loss, terms, moved, grads), outputs = mean_over_parts(gradient, parts)
        kept, (student_cls, teacher_cls) = jax.tree.map(collect, outputs)

        with jax.named_scope("update"):
            updates, opt_state = tx.update(grads, state.opt_state, state.student)
            student_params = optax.apply_updates(state.student, updates)
            teacher_params = optax.incremental_update(
                student_params, state.teacher, 1 - now["momentum"]
            )
            # Neither the optimizer nor the average moves running statistics: forward passes do.
            student_params, teacher_params = map(
                with_statistics, (student_params, teacher_params), moved
            )

        with jax.named_scope("memories"):
            memories = objective.remember(state.memories, kept, batch["index"])

        with jax.named_scope("health"):
            views_first = [jnp.moveaxis(cls, 0, 1) for cls in (student_cls, teacher_cls)]
            signs = measure_when(
                measure,
                lambda: objective.measure(memories, sops, *views_first, temperatures),
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


def masked_first(
    mask: Bool[Array, "B V h w"], most: int | None
) -> tuple[Int[Array, "B V M"], Bool[Array, "B V M"]]:
    """Places of `most` patches of each view, masked ones before others, and which are masked."""
    flat = mask.reshape(*mask.shape[:2], -1)
    places = jnp.argsort(~flat, axis=-1, stable=True)[..., :most]
    return places, jnp.take_along_axis(flat, places, axis=-1)


def draw_patches(keys: Key[Array, " B"], views: int, patches: int) -> Int[Array, "B {views} 1"]:
    """The place of one random patch of each image, the same for all of its views."""
    drawn = jax.vmap(lambda key: jax.random.randint(key, (1, 1), 0, patches))(keys)
    return jnp.broadcast_to(drawn, (len(keys), views, 1))


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
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def mean_over_parts(function: Callable[[Batch], tuple[Any, Any]], parts: Batch) -> tuple[Any, Any]:
    """The mean over parts of what the function gives first, and what it gives second, stacked."""
    shapes, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Batch) -> tuple[Any, Any]:
        value, rest = function(part)
        return jax.tree.map(jnp.add, total, value), rest

    total, rest = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / len(parts["index"]), total), rest


def measure_when(due: Bool[Array, ""], measure: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """The measurements when they are due, zeros in their place otherwise."""
    shapes = jax.eval_shape(measure)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.cond(due, measure, lambda: zeros)
