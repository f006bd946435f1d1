"""Weighted k-nearest-neighbour classification of frozen features, DINO's protocol."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer

from sop_jax.errors import UserError
from sop_jax.parallel.mesh import place, replicated, split
from sop_jax.parallel.search import nearest

CHUNK = 1024  # test images at a time; the last chunk is padded, so that one program serves all


def knn_top1(
    train_features: Float[np.ndarray, "N D"],
    train_labels: Integer[np.ndarray, " N"],
    test_features: Float[np.ndarray, "M D"],
    test_labels: Integer[np.ndarray, " M"],
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    mesh: Mesh,
    between: Callable[[], Any] | None = None,
) -> dict[int, float]:
    """Top-1 accuracy of the weighted k-NN classifier, for each k.

    The k train images of largest cosine vote for their class with weight exp(cosine /
    temperature); the class with most votes wins, a tie goes to the class of the nearer neighbour.
    Source: DINO's and iBOT's `eval_knn.py`, T = 0.07, k of 10, 20, 100 and 200.

    Args:
        train_features: of any length; rows are normalised here.
        train_labels: any integers.
        test_features: one image or more.
        test_labels: a class that no train image has counts as an error.
        ks: neighbours that vote. Those above N are left out; when all are, k = N stands in.
        temperature: of the weights.
        mesh: devices that share the train images among them.
        between: called after each CHUNK of test images; it may raise.

    Returns:
        Share of test images classified rightly, in [0, 1], by k in ascending order.

    Raises:
        UserError: there is no train or no test image.
    """
    train_size, test_size = len(train_features), len(test_features)
    if not train_size or not test_size:
        raise UserError(
            f"k-NN needs train and test images; got {train_size} and {test_size} that could be "
            "read. Check that the data set is complete."
        )
    usable = sorted({k for k in ks if 1 <= k <= train_size}) or [train_size]
    padding = -train_size % mesh.devices.size
    rows = place(np.pad(unit_rows(train_features), ((0, padding), (0, 0))), split(mesh))
    present = place(np.arange(len(rows)) < train_size, split(mesh))
    labels = place(np.asarray(train_labels, np.int32), replicated(mesh))
    test_features = unit_rows(test_features)
    chunk = min(CHUNK, test_size)
    right = np.zeros(len(usable), np.int64)
    for start in range(0, test_size, chunk):
        queries = test_features[start : start + chunk]
        padded = place(np.pad(queries, ((0, chunk - len(queries)), (0, 0))), replicated(mesh))
        predicted = classify(padded, rows, present, labels, tuple(usable), temperature, mesh)
        truth = test_labels[start : start + chunk]
        right += (np.asarray(predicted)[:, : len(truth)] == truth).sum(axis=1)
        if between:
            between()
    return {k: int(count) / test_size for k, count in zip(usable, right, strict=True)}


@partial(jax.jit, static_argnames=("ks", "temperature", "mesh"))
def classify(
    queries: Float[Array, "Q D"],
    rows: Float[Array, "N D"],
    present: Bool[Array, " N"],
    labels: Int[Array, " n"],
    ks: tuple[int, ...],
    temperature: float,
    mesh: Mesh,
) -> Int[Array, "K Q"]:
    """The labels that the nearest present rows give to unit queries, for each of `ks`."""
    scores, indices = nearest(queries, rows, max(ks), mesh, allowed=present)
    classes = labels[indices]
    # Relative to the nearest row: the winner is the same, and no temperature overflows.
    weights = jnp.exp((scores - scores[:, :1]) / temperature)
    elected = jnp.stack([elect(classes[:, :k], weights[:, :k]) for k in ks])
    return jax.lax.with_sharding_constraint(elected, replicated(mesh))  # every host reads it


def elect(classes: Int[Array, "Q k"], weights: Float[Array, "Q k"]) -> Int[Array, " Q"]:
    """The class with the largest sum of weights; of equal ones that of the nearer neighbour."""
    # Every neighbour collects the votes of its class: the number of classes does not matter.
    same = classes[:, :, None] == classes[:, None, :]
    votes = jnp.sum(jnp.where(same, weights[:, None, :], 0), axis=2)
    best = jnp.argmax(votes, axis=1, keepdims=True)
    return jnp.take_along_axis(classes, best, axis=1)[:, 0]


def unit_rows(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows of length 1 in float32; a row of zeros stays one."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
