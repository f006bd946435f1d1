"""Marginals: what keeps the targets of a batch from falling on a few prototypes.

Each is an offset a per prototype in the targets softmax(u W / τ + a), where u W / τ are the logits:

- centering (DINO): a = -c / τ, with c the running mean of the logits before the temperature;
- probability centering (equations 3 and 4 of "On Partial Prototype Collapse"): a = -c, with c the
  running mean of the logarithm of the batch's mean probabilities;
- Sinkhorn-Knopp of any number of iterations, on exp(u W / τ) (SwAV, DINOv2) or on the
  probabilities softmax(u W / τ) (MSN): every iteration scales prototypes, and then rows, to equal
  sums. Rows have equal sums in the targets anyway, so only the scales of the prototypes remain.

All sums run over all rows given. Under `jax.jit` these are the rows of all devices, and a target is
made before the batch is split into microbatches.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = ("centering", "probability_centering", "sinkhorn", "sinkhorn_probabilities", "none")
CENTERS = KINDS[:2]  # those that average over steps
SINKHORN = KINDS[2:4]


@runtime_checkable
class Logits(Protocol):
    """Computes the logits of embeddings after the temperature."""

    def __call__(self, u: Float[Array, "*B d"]) -> Float[Array, "*B K"]:
        """Returns u W / τ in float32, which is affine in u."""


@runtime_checkable
class Offset(Protocol):
    """Computes the offset of a batch."""

    def __call__(
        self,
        logits: Logits,
        rows: Float[Array, "G B d"],
        weight: Float[Array, "G B"],
        state: Any,
        temperature: Float[Array, ""] | float,
    ) -> tuple[Float[Array, " K"], Any]:
        """Returns a, and the state after this batch.

        Args:
            logits: computes the logits of rows after the temperature.
            rows: the teacher's embeddings, in G groups such as views.
            weight: how much each row counts, such as 0 for a patch that is not masked.
            state: what the step before returned, or `Marginal.init`.
            temperature: τ, the teacher's temperature.
        """


class Marginal(NamedTuple):
    """A marginal.

    Attributes:
        init: the state before the first step.
        offset: see `Offset`.
    """

    init: Any
    offset: Offset


def marginal(kind: str, count: int, momentum: float, iterations: int) -> Marginal:
    """Returns the marginal of a kind in KINDS.

    Args:
        kind: its name.
        count: K, the number of prototypes.
        momentum: the share of a center that remains at each step.
        iterations: the number of iterations of Sinkhorn-Knopp.
    """
    if kind == "centering":
        return centering(count, momentum)
    if kind == "probability_centering":
        return probability_centering(count, momentum)
    if kind == "none":
        return Marginal({}, lambda *_: (jnp.zeros(count), {}))
    return sinkhorn(iterations, of_probabilities=kind == "sinkhorn_probabilities")


def centering(count: int, momentum: float) -> Marginal:
    """Returns DINO's centering, whose center is updated after it was used."""

    def offset(logits, rows, weight, state, temperature):
        mean = jnp.einsum("gb,gbd->d", weight, rows) / jnp.maximum(weight.sum(), 1e-6)
        # Logits are affine, so that their mean is the logit of the mean row.
        new = jnp.where(weight.sum() > 0, temperature * logits(mean), state["center"])
        center = momentum * state["center"] + (1 - momentum) * new
        return -state["center"] / temperature, {"center": center}

    return Marginal({"center": jnp.zeros(count)}, offset)


def probability_centering(count: int, momentum: float) -> Marginal:
    """Returns probability centering, whose center is updated after it was used."""

    def offset(logits, rows, weight, state, temperature):
        def add(total, group):
            rows, weight = group
            return total + weight @ jax.nn.softmax(logits(rows)), None

        total, _ = jax.lax.scan(add, jnp.zeros(count), (rows, weight))
        mean = total / jnp.maximum(weight.sum(), 1e-6)
        tiny = jnp.finfo(jnp.float32).tiny
        new = jnp.where(weight.sum() > 0, jnp.log(jnp.maximum(mean, tiny)), state["center"])
        center = momentum * state["center"] + (1 - momentum) * new
        return -state["center"], {"center": center}

    return Marginal({"center": jnp.zeros(count)}, offset)


def sinkhorn(iterations: int, of_probabilities: bool) -> Marginal:
    """Returns Sinkhorn-Knopp over the rows of a batch."""

    def offset(logits, rows, weight, state, temperature):
        del temperature
        of_rows, each = logits(rows.reshape(-1, rows.shape[-1])), weight.reshape(-1)
        return sinkhorn_offset(of_rows, each, iterations, of_probabilities), state

    return Marginal({}, offset)


def sinkhorn_offset(
    logits: Float[Array, "N K"],
    weight: Float[Array, " N"],
    iterations: int,
    of_probabilities: bool = False,
) -> Float[Array, " K"]:
    """Returns the logarithm of the scales of the prototypes after some iterations.

    Args:
        logits: logits after the temperature.
        weight: how much each row counts; rows of weight 0 have no effect.
        iterations: the number of iterations.
        of_probabilities: whether to start from softmax(logits) instead of exp(logits).
    """
    start = -jax.nn.logsumexp(logits, axis=1) if of_probabilities else jnp.zeros(len(logits))

    def iterate(_: Any, scales: tuple[Array, Array]) -> tuple[Array, Array]:
        of_rows = scales[1]
        of_prototypes = -jax.nn.logsumexp(logits + of_rows[:, None], axis=0, b=weight[:, None])
        return of_prototypes, -jax.nn.logsumexp(logits + of_prototypes, axis=1)

    offset, _ = jax.lax.fori_loop(0, iterations, iterate, (jnp.zeros(logits.shape[1]), start))
    return jnp.where(weight.sum() > 0, offset, 0)
