"""Layers of prototypes: the logits that embeddings have for K prototypes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from sop_jax.models.head import unit
from sop_jax.objectives.prototypical.vmf import vmf_logits

KINDS = ("weight_norm", "unit", "vmf", "normalized")

Prototypes = dict[str, Any]


def init_prototypes(key: Key[Array, ""], kind: str, count: int, dim: int) -> Prototypes:
    """Returns the parameters of a layer, which start as PyTorch's linear layers do.

    Rows of `direction` [K, d] are normalized before use. With `weight_norm` and `vmf`, their
    lengths [K] learn as well, starting at 1; those of `unit` are 1. The rows `normalized` [K, d]
    are scaled to unit length before each step, without a gradient of the scaling, see
    `scaled_before`.

    Args:
        key: draws the directions.
        kind: one of KINDS.
        count: K.
        dim: d.
    """
    bound = dim**-0.5
    drawn = jax.random.uniform(key, (count, dim), minval=-bound, maxval=bound)
    if kind == "normalized":
        return {"normalized": drawn}
    lengths = {} if kind == "unit" else {"length": jnp.ones(count)}
    return {"direction": drawn, **lengths}


def rows(prototypes: Prototypes) -> Float[Array, "K d"]:
    """Returns the prototypes as rows of their lengths, in float32."""
    if "normalized" in prototypes:
        given = prototypes["normalized"]
        return given + jax.lax.stop_gradient(unit(given) - given)
    directions = unit(prototypes["direction"])
    return directions * prototypes["length"][:, None] if "length" in prototypes else directions


def scaled_before(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer of the rows `normalized`, whose steps start from rows of unit length.

    SwAV's code scales its prototypes in place before each step, also in steps that do not change
    them otherwise. They are not scaled after a step.
    """

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scaled = jax.tree.map(unit, params)
        updates, state = optimizer.update(gradients, state, scaled)
        return jax.tree.map(lambda x, to, by: to - x + by, params, scaled, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def logits(
    kind: str,
    prototypes: Prototypes,
    u: Float[Array, "*B d"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "*B K"]:
    """Returns the logits u W / τ in float32.

    With `vmf` they are the logarithms of von Mises-Fisher densities of concentration |w| / τ
    (equation 1 of "On Partial Prototype Collapse"), see `vmf_logits`.

    Args:
        kind: one of KINDS.
        prototypes: the parameters of the layer.
        u: embeddings.
        temperature: τ.
    """
    weight = rows(prototypes)
    if kind == "vmf":
        return vmf_logits(u, weight, temperature)
    products = jnp.einsum(
        "...d,kd->...k", u.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST
    )
    return products / temperature
