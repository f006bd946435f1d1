"""Layers of prototypes: the logits that embeddings have for K prototypes."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sop_jax.models.head import unit
from sop_jax.objectives.prototypical.vmf import vmf_logits

KINDS = ("weight_norm", "unit", "vmf")

Prototypes = dict[str, Any]


def init_prototypes(key: Key[Array, ""], kind: str, count: int, dim: int) -> Prototypes:
    """Returns the parameters of a layer, which start as PyTorch's linear layers do.

    Rows of `direction` [K, d] are normalized before use. With `weight_norm` and `vmf`, their
    lengths [K] learn as well, starting at 1; those of `unit` are 1.

    Args:
        key: draws the directions.
        kind: one of KINDS.
        count: K.
        dim: d.
    """
    bound = dim**-0.5
    params = {"direction": jax.random.uniform(key, (count, dim), minval=-bound, maxval=bound)}
    return params if kind == "unit" else params | {"length": jnp.ones(count)}


def rows(prototypes: Prototypes) -> Float[Array, "K d"]:
    """Returns the prototypes as rows of their lengths, in float32."""
    directions = unit(prototypes["direction"])
    return directions * prototypes["length"][:, None] if "length" in prototypes else directions


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
