"""Weighted k-nearest-neighbour classification of frozen features, DINO's protocol."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sop_jax.errors import UserError
from sop_jax.evaluation.accuracy import NEVER
from sop_jax.evaluation.features import in_chunks, on_devices, unit
from sop_jax.evaluation.splits import Splits, few_labels, open_splits, sources_of
from sop_jax.evaluation.tables import Part, papers_table, percent, standard_error
from sop_jax.evaluation.task import Features, Subject, Task, Tools
from sop_jax.evaluation.views import VIEW_RULES, view_of, view_settings
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import replicated
from sop_jax.parallel.search import nearest
from sop_jax.rules import COUNT, POSITIVE, TEXT, number, some

CHUNK = 1024  # test images at a time, over all processes; all chunks share one program

# ImageNet-1k, top-1 in percent: table 1 of the paper, and table B.2 for 1 % and 10 % of the labels.
PAPER = {
    100: {
        "ViT-S/16": {"DINO": 74.5, "iBOT": 75.2, "MaSSL": 75.1, "SOP": 75.3},
        "ViT-B/16": {"DINO": 76.1, "iBOT": 77.1, "MaSSL": 77.2, "SOP": 78.2},
        "ViT-L/16": {"iBOT": 78.0, "SOP": 79.2},
        "Swin-T/14": {"iBOT": 76.2, "SOP": 77.2},
    },
    10: {
        "ViT-S/16": {"DINO": 69.1, "iBOT": 70.1, "SOP": 70.3},
        "ViT-B/16": {"DINO": 71.0, "iBOT": 72.9, "SOP": 74.3},
        "Swin-T/14": {"iBOT": 71.5, "SOP": 72.3},
    },
    1: {
        "ViT-S/16": {"DINO": 61.3, "iBOT": 62.3, "SOP": 62.2},
        "ViT-B/16": {"DINO": 63.6, "iBOT": 66.3, "SOP": 68.6},
        "Swin-T/14": {"iBOT": 64.2, "SOP": 65.3},
    },
}


class Accuracy(NamedTuple):
    """The accuracy of the classifier with one number of neighbours.

    Attributes:
        top1: the share of images whose class has the most votes, in [0, 1].
        top5: the share of images whose class is among the five with the most votes. Only classes
            with a vote count, unlike in iBOT's `eval_knn.py`, where for k < 5 classes without one
            are drawn by an unstable sort.
    """

    top1: float
    top5: float


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of the task `knn`."""
    return ml_collections.ConfigDict(
        dict(
            k=(10, 20, 100, 200),  # neighbours
            temperature=0.07,
            percent=100.0,  # of the labels of each class that are used; drawn by seed
            list="",  # a file that lists the train images to use instead, such as SimCLR's
            **view_settings(),
        )
    )


RULES = {
    "k": some(COUNT),
    "temperature": POSITIVE,
    "percent": number(1e-6, 100),
    "list": TEXT,
    **VIEW_RULES,
}


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Splits:
    """Opens the images, see `task.Open`."""
    view_of(config, settings)
    splits = open_splits(config, data, "k-NN")
    train = few_labels(splits.train, settings.percent, settings.list, config.seed)
    return splits._replace(train=train)


def run(
    subject: Subject, inputs: Splits, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Returns the accuracy of the test images among the train images, as in DINO.

    Returns:
        `top1`, the best accuracy over k; `k`, the first k that reached it; `top5` of this k;
        `top1_k<k>` and `top5_k<k>` for each k, None if there are fewer train images than k; and
        `unreadable`, the number of images that were left out. Accuracies are shares in [0, 1]. All
        values are None without a test split or without labels.
    """
    names = [f"{top}_k{k}" for k in settings.k for top in ("top1", "top5")]
    result: dict[str, Any] = dict.fromkeys(["top1", "top5", "k", *names, "images", "unreadable"])
    train, test = inputs.train, inputs.test
    if test is None or not (train.has_labels and test.has_labels):
        return result
    view = view_of(subject.config, settings)
    known, queries = tools.features(train, view), tools.features(test, view)
    found = accuracies(
        known, queries, settings.k, settings.temperature, mesh=tools.mesh, between=tools.between
    )
    best = max(found, key=lambda k: found[k].top1)  # the first k of those with the same accuracy
    result |= {"top1": found[best].top1, "top5": found[best].top5, "k": best}
    for k, accuracy in found.items():
        result |= {f"top1_k{k}": accuracy.top1, f"top5_k{k}": accuracy.top5}
    unreadable = len(known.corrupt) + len(queries.corrupt)
    return result | {"images": len(test) - len(queries.corrupt), "unreadable": unreadable}


def accuracies(
    train: Features,
    test: Features,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    mesh: Mesh,
    between: Callable[[], Any] | None = None,
) -> dict[int, Accuracy]:
    """Returns the accuracy of the weighted k-NN classifier for each k.

    The k train images with the largest cosine vote for their class with weight exp(cosine /
    temperature). The class with the most votes wins; ties go to the class of the nearer neighbour,
    and of equally near ones to that of the earlier record. This is the protocol of DINO's and
    iBOT's `eval_knn.py`, with a temperature of 0.07 and k of 10, 20, 100 and 200. That script stops
    if there are fewer than 100 test images or a label of 1000 or more, which work here.

    Args:
        train: features of any norm; they are normalized here. The labels are any numbers.
        test: features of at least one image; a class that no train image has counts as an error.
        ks: the numbers of neighbours that vote. Numbers above the number N of train images are left
            out; if all are, k = N is used.
        temperature: the temperature of the weights.
        mesh: the devices, over which the train images are split.
        between: called between chunks of CHUNK test images; it may raise.

    Returns:
        The accuracies by k, in ascending order.

    Raises:
        UserError: there are no train or no test images.
    """
    own = f"{len(train.vectors)} {len(test.vectors)}"
    counts = [text.split() for text in hosts.gather(own)]
    train_size, test_size = (sum(int(count[i]) for count in counts) for i in (0, 1))
    if not train_size or not test_size:
        raise UserError(
            f"k-NN needs train and test images, but {train_size} and {test_size} could be read; "
            "check that the data set is complete."
        )
    usable = sorted({k for k in ks if 1 <= k <= train_size}) or [train_size]
    rows, labels, index = on_devices(train, mesh)
    rows = jax.jit(unit, donate_argnums=0)(rows)
    right = np.zeros((len(usable), 2), np.int64)
    for i, chunk in enumerate(in_chunks(test, mesh, CHUNK)):
        if i and between:
            between()
        right += np.asarray(
            count_right(chunk, rows, index >= 0, labels, tuple(usable), temperature, mesh)
        )
    shares = right / test_size
    return {k: Accuracy(*map(float, pair)) for k, pair in zip(usable, shares, strict=True)}


@partial(jax.jit, static_argnames=("ks", "temperature", "mesh"))
def count_right(
    chunk: Mapping[str, Array],
    rows: Float[Array, "N D"],
    present: Bool[Array, " N"],
    labels: Int[Array, " N"],
    ks: tuple[int, ...],
    temperature: float,
    mesh: Mesh,
) -> Int[Array, "K 2"]:
    """Returns how many queries are right, by top-1 and by top-5, for each of the K numbers `ks`.

    Args:
        chunk: queries of any norm, see `features.in_chunks`.
        rows: unit vectors, split over the devices.
        present: which rows are images; the others are padding.
        labels: the labels of the rows.
        ks: the numbers of neighbours that vote.
        temperature: see `accuracies`.
        mesh: the devices.
    """
    queries = jax.lax.with_sharding_constraint(unit(chunk["vectors"]), replicated(mesh))
    scores, indices = nearest(queries, rows, max(ks), mesh, allowed=present)
    classes = labels[indices]
    # Relative to the nearest row: the winner is the same, and no temperature makes it overflow.
    weights = jnp.exp((scores - scores[:, :1]) / temperature)
    counts = []
    for k in ks:
        rank = rank_of(chunk["labels"], classes[:, :k], weights[:, :k])
        counts.append([jnp.sum(chunk["valid"] & (rank < top)) for top in (1, 5)])
    counted = jnp.stack([jnp.stack(pair) for pair in counts])
    return jax.lax.with_sharding_constraint(counted, replicated(mesh))  # every process reads it


def rank_of(
    truth: Int[Array, " Q"], classes: Int[Array, "Q k"], weights: Float[Array, "Q k"]
) -> Int[Array, " Q"]:
    """Returns the number of classes with more votes than the true one; NEVER if it has no vote."""
    votes, first = vote(classes, weights)
    own = first & (classes == truth[:, None])
    place = jnp.argmax(own, axis=1, keepdims=True)  # where the true class first occurs
    mine = jnp.take_along_axis(votes, place, axis=1)
    earlier = jnp.arange(classes.shape[1]) < place
    ahead = first & ((votes > mine) | ((votes == mine) & earlier))
    return jnp.where(own.any(axis=1), ahead.sum(axis=1), NEVER)


def vote(
    classes: Int[Array, "Q k"], weights: Float[Array, "Q k"]
) -> tuple[Float[Array, "Q k"], Bool[Array, "Q k"]]:
    """Returns the votes for the class of each neighbour, and whether it is the first of its class.

    Every neighbour collects the votes of its class, so that the cost does not depend on the number
    of classes.
    """
    same = classes[:, :, None] == classes[:, None, :]
    votes = jnp.sum(jnp.where(same, weights[:, None, :], 0), axis=2)
    return votes, ~jnp.any(jnp.tril(same, -1), axis=2)


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns the accuracies by k in percent, the best one marked, and the papers'."""
    if result["top1"] is None:
        return ["no accuracy: there are no labels, or no images to classify"]
    rows: list[list[Any]] = [["k", "top-1 %", "top-5 %", ""]]
    used = [] if result["k"] in settings.k else [result["k"]]  # all train images
    for k in [*settings.k, *used]:
        values = [percent(result[f"{top}_k{k}"]) for top in ("top1", "top5")]
        best = "best" if result["k"] == k else ""
        rows.append([k, *values, "(fewer train images)" if None in values else best])
    error = 100 * standard_error(result["top1"], result["images"])
    parts: list[Part] = [rows, f"standard error of the best: {error:.2f}"]
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} images could not be read and were left out")
    if papers := PAPER.get(settings.percent):
        title = "ImageNet-1k, top-1 % of the best k, from the SOP paper:"
        parts += [title, papers_table(papers)]
    return parts


TASK = Task(
    does="weighted k-NN accuracy of frozen features",
    expects=(
        "labelled images in a train split and a test split: a folder with train/ and val/, each "
        "with one folder per class, a packed .npz file, or a TFDS data set. ImageNet-1k is at "
        "https://image-net.org; the lists of 1 % and 10 % of its images are `1percent.txt` and "
        "`10percent.txt` in google-research/simclr, imagenet_subsets/"
    ),
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="imagenet",
    sources=sources_of,
    paths=("list",),
    during_training=True,
    view=view_of,
)
