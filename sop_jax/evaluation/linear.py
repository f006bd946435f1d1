"""Linear classifiers on frozen features, trained with many learning rates at once (iBOT).

The protocol is that of iBOT's `eval_linear_multi.py`: SGD with momentum 0.9 and without weight
decay on random resized crops, a cosine schedule to 0 that changes every epoch, and a classifier for
each of 45 learning rates. Here all classifiers are one stacked head: one matrix product and one
optimizer state, on the features of a single forward pass.

The script reports the best classifier of the best epoch *on the test images*, as the papers do.
That is reported as `top1`; `top1_held_out` is the test accuracy of the classifier and the epoch
that are best on train images that were held out of the training.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.data.decode import decoding
from sop_jax.data.labelled import Recipe, labelled_batches, steps_per_epoch
from sop_jax.data.sources import Source
from sop_jax.data.subsets import Subset, draw_share, labels_of, rest_of
from sop_jax.errors import UserError
from sop_jax.evaluation.accuracy import rank_of
from sop_jax.evaluation.features import in_chunks, pooled
from sop_jax.evaluation.fit import Problem, fit
from sop_jax.evaluation.heads import Head, write_head
from sop_jax.evaluation.splits import Splits, count_labels, open_splits, sources_of
from sop_jax.evaluation.tables import Part, papers_table, percent, standard_error
from sop_jax.evaluation.task import Features, Subject, Task, Tools, View
from sop_jax.evaluation.views import AUTO, VIEW_RULES, view_of, view_settings
from sop_jax.models import Params
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import replicated
from sop_jax.rules import (
    COUNT,
    COUNT_OR_ZERO,
    POSITIVE,
    SHARE,
    ascending,
    less_than,
    positive,
    some,
)
from sop_jax.schedules import Schedule

RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 1) for digit in range(1, 10))
MOMENTUM = 0.9
INIT_STD = 0.01
MAX_SCORES = 2**24  # logits that are computed at a time
HEAD = "head.npz"  # the classifier that is best on the test images
HEAD_HELD_OUT = "head_held_out.npz"

# ImageNet-1k, top-1 in percent (table 1 of the paper).
PAPER = {
    "ViT-S/16": {"DINO": 77.0, "iBOT": 77.9, "MaSSL": 77.8, "SOP": 77.9},
    "ViT-B/16": {"DINO": 78.2, "iBOT": 79.5, "MaSSL": 79.6, "SOP": 79.9},
    "ViT-L/16": {"iBOT": 81.0, "SOP": 81.2},
    "Swin-T/14": {"iBOT": 79.3, "SOP": 79.4},
}


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of the task `linear`."""
    return ml_collections.ConfigDict(
        dict(
            rates=RATES,  # base learning rates, for 256 images per step
            epochs=100,
            batch_size=1024,
            scale=(0.08, 1.0),  # shares of the area that training crops show
            flip=0.5,  # probability
            held_out=0.05,  # share of the train images that select a classifier; the papers: 0
            val_every=1,  # epochs between two validations
            workers=0,  # processes that make training crops; with 0, threads of the main process
            threads=8,
            **view_settings(layers=None, pool=AUTO),
        )
    )


RULES = {
    "rates": some(POSITIVE),
    "epochs": COUNT,
    "batch_size": COUNT,
    "scale": ascending(positive(1)),
    "flip": SHARE,
    "held_out": less_than(1),
    "val_every": COUNT,
    "workers": COUNT_OR_ZERO,
    "threads": COUNT_OR_ZERO,
    **VIEW_RULES,
}


class Inputs(NamedTuple):
    """The images of the task.

    Attributes:
        splits: all labelled images.
        records: the train images to train on.
        held_out: the train images that select a classifier; None if there are none.
        classes: C, one more than the largest label.
    """

    splits: Splits
    records: np.ndarray
    held_out: Source | None
    classes: int


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Inputs:
    """Opens the images, see `task.Open`."""
    view_of(config, settings)
    splits = open_splits(config, data, "a linear classifier")
    labels = labels_of(splits.train)
    held = np.zeros(0, np.int64)
    if settings.held_out:
        held = draw_share(labels, settings.held_out, config.seed)
    records = rest_of(len(labels), held)
    if not len(records):
        raise UserError(
            f"no images are left to train on: eval.held_out={settings.held_out} holds all "
            f"{len(labels)} of them out; choose eval.held_out=0"
        )
    return Inputs(
        splits,
        records,
        Subset(splits.train, held) if len(held) else None,
        count_labels(splits.train),
    )


def run(
    subject: Subject, inputs: Inputs, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Returns the accuracy of linear classifiers of the test images.

    Returns:
        `top1`, `top5`, `rate` and `epoch` of the best classifier and epoch on the test images;
        the same with `_held_out`, for those that are best on held-out train images, None without
        such images; `top1_last`, the best classifier after the last epoch; `images`; `classes`;
        `view`, the layers and the pool; `unreadable`, the number of images that were left out; and
        `files`, what was written. Accuracies are shares in [0, 1].
    """
    view = view_of(subject.config, settings)
    test = inputs.splits.test
    assert test is not None
    queries = tools.features(test, view)
    held = tools.features(inputs.held_out, view) if inputs.held_out is not None else None
    epoch = steps_per_epoch(len(inputs.records), settings.batch_size)
    rates = jnp.array([rate * settings.batch_size / 256 for rate in settings.rates], jnp.float32)

    def validate(params: Params, step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the accuracies [heads, 2] of both sets of images, and keeps the best heads."""
        row: dict[str, Any] = {"test": accuracies(params, queries, tools)}
        if held is not None:
            row["held_out"] = accuracies(params, held, tools)
        for name, file in (("test", HEAD), ("held_out", HEAD_HELD_OUT)):
            if name in row:
                top1 = [pair[0] for pair in row[name]]
                before = (pair[0] for earlier in rows for pair in earlier[name])
                if max(top1) > max(before, default=-1.0):
                    _keep(params, int(np.argmax(top1)), view, subject, tools, file)
        row["top1"] = max(pair[0] for pair in row["test"])
        return row

    fitted = fit(
        problem(subject, inputs, settings, view, rates, epoch),
        tools,
        tools.seed,
        epoch * settings.val_every,
        validate,
    )
    result: dict[str, Any] = {}
    for suffix, name in (("", "test"), ("_held_out", "held_out")):
        keys = ("top1", "top5", "rate", "epoch")
        if name not in fitted.rows[0]:
            result |= {f"{key}{suffix}": None for key in keys}
            continue
        # The first of equally good epochs and heads.
        row, head = max(
            ((row, head) for row in fitted.rows for head in range(len(settings.rates))),
            key=lambda place: place[0][name][place[1]][0],
        )
        values = (*row["test"][head], settings.rates[head], math.ceil(row["step"] / epoch))
        result |= {f"{key}{suffix}": value for key, value in zip(keys, values, strict=True)}
    files = [HEAD] if held is None else [HEAD, HEAD_HELD_OUT]
    unreadable = {*queries.corrupt}, {*(held.corrupt if held else ())}, {*fitted.corrupt}
    return result | {
        "top1_last": fitted.rows[-1]["top1"],
        "images": len(test) - len(queries.corrupt),
        "classes": inputs.classes,
        "view": f"{view.layers} layers, {view.pool}",
        "unreadable": sum(map(len, unreadable)),
        "files": files if tools.folder is not None else [],
    }


def problem(
    subject: Subject,
    inputs: Inputs,
    settings: ml_collections.ConfigDict,
    view: View,
    rates: Float[Array, " H"],
    epoch: int,
) -> Problem:
    """Returns the training of a classifier per rate on the features of random crops."""
    model, train = subject.model, inputs.splits.train
    recipe = Recipe(view.crop, tuple(settings.scale), "bilinear", settings.flip)
    how = decoding(subject.config.data, train)
    shape = jax.ShapeDtypeStruct((1, view.crop, view.crop, 3), np.uint8)
    features, _ = jax.eval_shape(lambda p, x: pooled(model, p, x, view), subject.params, shape)

    def init(key: Key[Array, ""]) -> Params:
        return init_heads(key, len(rates), inputs.classes, features.shape[1])

    def loss(
        params: Params, frozen: Params, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Params]:
        vectors, _ = pooled(model, frozen, batch["image"], view)
        losses = head_losses(params, vectors, batch["label"], batch["valid"])
        return losses.sum(), {}  # the sum, because the heads learn independently of each other

    def batches(start: int, rows: list[int]) -> Any:
        return labelled_batches(
            *(train, recipe, settings.batch_size, subject.config.seed, how, start, rows),
            subset=inputs.records,
            threads=settings.threads,
            workers=settings.workers,
        )

    return Problem(
        init=init,
        frozen=subject.params,
        loss=loss,
        optimizer=optimizer(rates, epoch, settings.epochs),
        steps=epoch * settings.epochs,
        batch_size=settings.batch_size,
        batches=batches,
        parts=len(rates),
    )


def init_heads(key: Key[Array, ""], heads: int, classes: int, width: int) -> Params:
    """Returns the parameters of equal classifiers: weights ~ N(0, 0.01), and biases of 0."""
    weights = INIT_STD * jax.random.normal(key, (classes, width))
    return {
        "weights": jnp.broadcast_to(weights, (heads, classes, width)),
        "bias": jnp.zeros((heads, classes)),
    }


def scores(params: Params, vectors: Float[Array, "B D"]) -> Float[Array, "B H C"]:
    """Returns the logits of all heads, by one matrix product in float32."""
    heads, classes, width = params["weights"].shape
    stacked = params["weights"].reshape(heads * classes, width)
    product = jnp.matmul(vectors, stacked.T, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(-1, heads, classes) + params["bias"]


def head_losses(
    params: Params,
    vectors: Float[Array, "B D"],
    labels: Int[Array, " B"],
    valid: Bool[Array, " B"],
) -> Float[Array, " H"]:
    """Returns the cross-entropy of each head, averaged over the valid images."""
    logits = scores(params, vectors)
    targets = jnp.broadcast_to(labels[:, None], logits.shape[:2])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)
    return jnp.sum(jnp.where(valid[:, None], losses, 0), axis=0) / count


def optimizer(rates: Float[Array, " H"], epoch: int, epochs: int) -> optax.GradientTransformation:
    """Returns SGD with a learning rate per head, which is constant during an epoch.

    Args:
        rates: the learning rate of each head in the first epoch, after scaling by the batch size.
        epoch: the number of steps per epoch.
        epochs: the number of epochs; the rate of epoch e is multiplied by (1 + cos(pi e / epochs))
            / 2.
    """

    def scale(updates: Params, _: Any) -> Params:
        return {
            "weights": -rates[:, None, None] * updates["weights"],
            "bias": -rates[:, None] * updates["bias"],
        }

    return optax.chain(
        optax.trace(MOMENTUM),
        optax.stateless(scale),
        optax.scale_by_schedule(cosine(epoch, epochs)),
    )


def cosine(epoch: int, epochs: int) -> Schedule:
    """Returns the factor of the learning rates at a step."""

    def factor(step: Int[Array, ""]) -> Float[Array, ""]:
        share = (step // epoch).astype(jnp.float32) / epochs
        return (1 + jnp.cos(jnp.pi * share)) / 2

    return factor


def accuracies(params: Params, features: Features, tools: Tools) -> list[list[float]]:
    """Returns the top-1 and top-5 accuracy of each head, as shares of the images."""
    total = sum(int(text) for text in hosts.gather(str(len(features.index))))
    right = np.zeros((len(params["bias"]), 2), np.int64)
    for chunk in in_chunks(features, tools.mesh, max(1, MAX_SCORES // params["bias"].size)):
        right += np.asarray(_count_right(params, chunk, replicated(tools.mesh)))
    return (right / max(total, 1)).tolist()


@partial(jax.jit, static_argnames="everywhere")
def _count_right(params: Params, chunk: Mapping[str, Array], everywhere: Any) -> Int[Array, "H 2"]:
    logits = scores(params, chunk["vectors"])
    ranks = rank_of(logits, jnp.broadcast_to(chunk["labels"][:, None], logits.shape[:2]))
    counts = [jnp.sum(chunk["valid"][:, None] & (ranks < top), axis=0) for top in (1, 5)]
    return jax.lax.with_sharding_constraint(jnp.stack(counts, axis=1), everywhere)


def _keep(params: Params, head: int, view: View, subject: Subject, tools: Tools, file: str) -> None:
    """Writes one head to the folder of the evaluation."""
    if tools.folder is None or not hosts.is_first():
        return
    weights, bias = (
        np.asarray(params[name].addressable_data(0)[head]) for name in ("weights", "bias")
    )
    tools.folder.mkdir(parents=True, exist_ok=True)
    write_head(tools.folder / file, Head(weights, bias, view, subject.fingerprint))


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns the accuracies in percent, how the classifier was selected, and the papers'."""
    rows: list[Sequence[Any]] = [["selected on", "top-1 %", "top-5 %", "rate", "epoch", "error"]]
    for suffix, name in (("", "test images"), ("_held_out", "held-out train images")):
        top1, top5 = (result[f"{top}{suffix}"] for top in ("top1", "top5"))
        if top1 is None:
            continue
        error = 100 * standard_error(top1, result["images"])
        rate = f"{result[f'rate{suffix}']:g}"
        rows.append([name, percent(top1), percent(top5), rate, result[f"epoch{suffix}"], error])
    parts: list[Part] = [f"{result['classes']} classes; {result['view']}", rows]
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} images could not be read and were left out")
    title = "ImageNet-1k, top-1 %, selected on test images, in the SOP paper:"
    return [*parts, title, papers_table(PAPER)]


TASK = Task(
    does="accuracy of linear classifiers on frozen features, best of many learning rates",
    expects=(
        "labelled images in a train split and a test split: a folder with train/ and val/, each "
        "with one folder per class, a packed .npz file, or a TFDS data set. ImageNet-1k is at "
        "https://image-net.org"
    ),
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="imagenet",
    sources=lambda inputs: sources_of(inputs.splits),
    view=view_of,
    free=("workers", "threads"),
)
