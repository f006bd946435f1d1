"""CAPI's online clustering of the teacher's patches (Darcet et al., 2025).

A linear layer scores unit features of patches. Sinkhorn-Knopp iterations balance the scores over
the clusters, and the layer learns to predict the balanced assignments. The iterations are run for
each position of the grid by itself, over the images of the batch, so that a cluster cannot stand
for a position. Where the paper leaves a detail open, it is that of the authors' code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from sop_jax.models.head import unit
from sop_jax.objectives.losses import cross_entropy
from sop_jax.objectives.objective import Params
from sop_jax.schedules import Schedule

ITERATIONS = 3
EPS = 1e-8  # added to every sum of the iterations
PEAK = 50.0  # the exponent to which the largest score of each cluster is shifted


class Balance(NamedTuple):
    """What Sinkhorn-Knopp iterations did to the scores of N samples for K clusters.

    The assignment of a sample to a cluster is exp(score - peak + PEAK) times the factor of the
    cluster and that of the sample. Keeping the factors takes far less memory than keeping the
    assignments, and any of these can be computed again from its sample's features.

    Attributes:
        peaks: the largest score of each cluster.
        clusters: the factor of each cluster.
        samples: the factor of each sample.
    """

    peaks: Float[Array, "*#B K"]
    clusters: Float[Array, "*#B K"]
    samples: Float[Array, "*B"]


def init_clustering(key: Key[Array, ""], dim: int, count: int) -> Params:
    """Returns `kernel` [dim, count], drawn from the unit normal, and `bias` [count] of zeros."""
    return {"kernel": jax.random.normal(key, (dim, count)), "bias": jnp.zeros(count)}


def cluster_logits(clustering: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B K"]:
    """Returns the logits of features for the clusters, which depend on their direction only."""
    product = jnp.matmul(unit(x), clustering["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + clustering["bias"]


def balance(scores: Float[Array, "N K"]) -> Balance:
    """Balances scores over the clusters by Sinkhorn-Knopp iterations.

    Args:
        scores: the logits of all samples of a position, divided by the temperature of the targets.
    """
    peaks = scores.max(0)
    exponentials = jnp.exp(scores - peaks + PEAK)
    clusters, samples = jnp.ones(scores.shape[1]), jnp.ones(scores.shape[0])
    for _ in range(ITERATIONS):
        of_cluster = (exponentials * clusters * samples[:, None]).sum(0)
        clusters = clusters / (of_cluster + EPS)
        of_sample = (exponentials * clusters * samples[:, None]).sum(1)
        samples = samples / (of_sample + EPS)
    return Balance(peaks, clusters, samples)


def assign(scores: Float[Array, "*B K"], balanced: Balance) -> Float[Array, "*B K"]:
    """Returns the balanced assignments of samples from their scores; see `Balance`.

    They sum to 1 less what EPS takes, which is much for a sample that no cluster scores highly.
    """
    factors = balanced.clusters * balanced.samples[..., None]
    return jnp.exp(scores - balanced.peaks + PEAK) * factors


def clustering_loss(
    clustering: Params,
    x: Float[Array, "*B D"],
    balanced: Balance,
    target_temperature: float,
    temperature: float,
) -> Float[Array, "*B"]:
    """Returns the loss of each sample in nats: the layer predicts the balanced assignments.

    Only the layer receives a gradient.

    Args:
        clustering: the parameters of the layer.
        x: the features of patches, by the teacher.
        balanced: what `balance` returned for their scores.
        target_temperature: the temperature by which their scores were divided.
        temperature: the temperature of the prediction.
    """
    logits = cluster_logits(clustering, jax.lax.stop_gradient(x))
    target = assign(jax.lax.stop_gradient(logits) / target_temperature, balanced)
    return cross_entropy(target, jax.nn.log_softmax(logits / temperature))


def clustering_optimizer(lr: Schedule | float) -> optax.GradientTransformation:
    """Returns the layer's own AdamW, which decays the bias as well.

    The decay is PyTorch's default, which the authors' settings do not change.
    """
    return optax.adamw(lr, b1=0.9, b2=0.95, weight_decay=0.01)
