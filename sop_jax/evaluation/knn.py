"""Weighted k-nearest-neighbour classification of frozen features, DINO's protocol."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer

from sop_jax.errors import UserError
from sop_jax.parallel.mesh import put, replicated, split
from sop_jax.parallel.search import nearest

CHUNK = 1024  # test images at a time; the last chunk is padded, so that all share one program


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
    """Returns the top-1 accuracy of the weighted k-NN classifier for each k.

    The k train images with the largest cosine vote for their class with weight exp(cosine /
    temperature). The class with the most votes wins; ties go to the class of the nearer neighbour.
    This is the protocol of DINO's and iBOT's `eval_knn.py`, with a temperature of 0.07 and k of 10,
    20, 100 and 200.

    Args:
        train_features: features of any norm; they are normalized here.
        train_labels: any integers.
        test_features: features of at least one image.
        test_labels: any integers; a class that no train image has counts as an error.
        ks: the numbers of neighbours that vote. Numbers above N are left out; if all are, k = N is
            used.
        temperature: the temperature of the weights.
        mesh: the devices, over which the train images are split.
        between: called after each CHUNK of test images; it may raise.

    Returns:
        The share of test images that are classified correctly, in [0, 1], by k in ascending order.

    Raises:
        UserError: there are no train or no test images.
        AssertionError: the arrays do not have the shapes above.
    """
    chex.assert_rank([train_features, train_labels, test_features, test_labels], [2, 1, 2, 1])
    chex.assert_equal_shape_prefix([train_features, train_labels], 1)
    chex.assert_equal_shape_prefix([test_features, test_labels], 1)
    chex.assert_equal_shape_suffix([train_features, test_features], 1)
    train_size, test_size = len(train_features), len(test_features)
    if not train_size or not test_size:
        raise UserError(
            f"k-NN needs train and test images, but {train_size} and {test_size} could be read; "
            "check that the data set is complete."
        )
    usable = sorted({k for k in ks if 1 <= k <= train_size}) or [train_size]
    padding = -train_size % mesh.devices.size
    rows = put(np.pad(unit_rows(train_features), ((0, padding), (0, 0))), split(mesh))
    present = put(np.arange(len(rows)) < train_size, split(mesh))
    labels = put(np.asarray(train_labels, np.int32), replicated(mesh))
    test_features = unit_rows(test_features)
    chunk = min(CHUNK, test_size)
    right = np.zeros(len(usable), np.int64)
    for start in range(0, test_size, chunk):
        queries = test_features[start : start + chunk]
        padded = put(np.pad(queries, ((0, chunk - len(queries)), (0, 0))), replicated(mesh))
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
    """Returns the labels that the nearest rows give to queries, for each of the K numbers `ks`.

    Args:
        queries: unit vectors.
        rows: unit vectors, split over the devices.
        present: which rows are images; the others are padding.
        labels: the labels of the n <= N rows that are images.
        ks: the numbers of neighbours that vote.
        temperature: see `knn_top1`.
        mesh: the devices.
    """
    scores, indices = nearest(queries, rows, max(ks), mesh, allowed=present)
    classes = labels[indices]
    # Relative to the nearest row: the winner is the same, and no temperature makes it overflow.
    weights = jnp.exp((scores - scores[:, :1]) / temperature)
    elected = jnp.stack([elect(classes[:, :k], weights[:, :k]) for k in ks])
    return jax.lax.with_sharding_constraint(elected, replicated(mesh))  # every host reads it


def elect(classes: Int[Array, "Q k"], weights: Float[Array, "Q k"]) -> Int[Array, " Q"]:
    """Returns the class with the largest sum of weights; ties go to the nearer neighbour's."""
    # Every neighbour collects the votes of its class, so the cost does not depend on the number of
    # classes.
    same = classes[:, :, None] == classes[:, None, :]
    votes = jnp.sum(jnp.where(same, weights[:, None, :], 0), axis=2)
    best = jnp.argmax(votes, axis=1, keepdims=True)
    return jnp.take_along_axis(classes, best, axis=1)[:, 0]


def unit_rows(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Returns the rows scaled to unit norm in float32; a row of zeros remains zero."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
