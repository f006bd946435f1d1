"""Balanced assignments and the loss of the layer that learns them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sop_jax.objectives.capi.clustering import (
    assign,
    balance,
    cluster_logits,
    clustering_loss,
    clustering_optimizer,
    init_clustering,
)
from sop_jax.parallel.mesh import make_mesh, put, replicated, split

SAMPLES, CLUSTERS, DIM = 64, 16, 8


@pytest.fixture(scope="module")
def scores() -> jax.Array:
    """Returns scores of samples, by which some clusters are preferred by all."""
    of_samples, of_all = jax.random.split(jax.random.key(0))
    scores = jax.random.normal(of_samples, (SAMPLES, CLUSTERS))
    return scores + 2 * jax.random.normal(of_all, (CLUSTERS,))


def assigned(scores: jax.Array) -> jax.Array:
    return assign(scores, balance(scores))


def test_assignments_are_balanced(scores: jax.Array) -> None:
    """Each sample has a weight of 1, and every cluster nearly the same share of the samples."""
    found = np.asarray(assigned(scores))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    unbalanced = np.asarray(jax.nn.softmax(scores)).sum(0)
    share = SAMPLES / CLUSTERS
    assert np.abs(found.sum(0) - share).max() < 0.1 * np.abs(unbalanced - share).max()


def test_what_all_samples_of_a_position_share_changes_nothing(scores: jax.Array) -> None:
    """A cluster that scores a position highly in every image is no better there than others."""
    shifted = scores + 5 * jax.random.normal(jax.random.key(1), (CLUSTERS,))
    np.testing.assert_allclose(assigned(shifted), assigned(scores), atol=2e-6)


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(jnp.zeros((4, 3)), id="zeros"),
        pytest.param(jnp.ones((1, 3)), id="one sample"),
        pytest.param(jnp.tile(jnp.array([[40.0, -40.0, 0.0]]), (4, 1)), id="equal samples"),
        pytest.param(jnp.array([[100.0, 0.0], [-100.0, 0.0]]), id="far apart"),
    ],
)
def test_the_edges_are_finite(scores: jax.Array) -> None:
    found = np.asarray(assigned(scores))
    assert np.isfinite(found).all()
    assert (found.sum(1) <= 1 + 1e-5).all()


def test_eight_devices_balance_as_one_does(scores: jax.Array) -> None:
    expected = assigned(scores)
    sharded = put(np.asarray(scores), split(make_mesh(8)))
    np.testing.assert_allclose(jax.jit(assigned)(sharded), expected, atol=1e-6)
    halves = jnp.concatenate([assigned(half) for half in jnp.split(scores, 2)])
    assert np.abs(np.asarray(halves - expected)).max() > 0.01  # what forgetting the sums would give
    found = jax.jit(balance, out_shardings=replicated(make_mesh(8)))(sharded)
    assert found.samples.shape == (SAMPLES,)


@pytest.mark.medium
def test_the_layer_learns_the_clusters_of_its_samples() -> None:
    """Samples around a few centers each find a cluster, and the loss falls towards zero."""
    keys = jax.random.split(jax.random.key(2), 3)
    centers = jax.random.normal(keys[0], (4, DIM))
    labels = jnp.arange(SAMPLES) % 4
    x = centers[labels] + 0.1 * jax.random.normal(keys[1], (SAMPLES, DIM))
    clustering = init_clustering(keys[2], DIM, 4)
    tx = clustering_optimizer(0.005)

    def loss(clustering: dict[str, jax.Array]) -> jax.Array:
        balanced = balance(cluster_logits(jax.lax.stop_gradient(clustering), x) / 0.06)
        return clustering_loss(clustering, x, balanced, 0.06, 0.12).mean()

    @jax.jit
    def step(clustering: dict[str, jax.Array], state: optax.OptState) -> tuple:
        value, gradient = jax.value_and_grad(loss)(clustering)
        updates, state = tx.update(gradient, state, clustering)
        return optax.apply_updates(clustering, updates), state, value

    state, losses = tx.init(clustering), []
    for _ in range(100):
        clustering, state, value = step(clustering, state)
        losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]
    chosen = np.asarray(cluster_logits(clustering, x).argmax(1))
    assert len({*zip(chosen.tolist(), labels.tolist(), strict=True)}) == 4


def test_features_receive_no_gradient() -> None:
    clustering = init_clustering(jax.random.key(0), DIM, CLUSTERS)
    x = jax.random.normal(jax.random.key(1), (SAMPLES, DIM))
    balanced = balance(cluster_logits(clustering, x) / 0.06)
    gradient = jax.grad(lambda x: clustering_loss(clustering, x, balanced, 0.06, 0.12).sum())(x)
    assert not gradient.any()
