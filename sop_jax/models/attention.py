"""Multi-head attention, by XLA's operations or by cuDNN's fused ones on GPUs."""

import contextlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from sop_jax.errors import UserError
from sop_jax.models.linear import Precision

Implementation = Literal["xla", "cudnn"]

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def attend(
    q: Float[Array, "B T N h"],
    k: Float[Array, "B T N h"],
    v: Float[Array, "B T N h"],
    bias: Float[Array, "#B N T T"] | None = None,
    *,
    implementation: Implementation,
    precision: Precision = None,
) -> Float[Array, "B T N h"]:
    """JAX's own attention over T tokens in N heads, its softmax in float32.

    cuDNN's never writes the T x T weights to memory.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the products of queries and keys.
        implementation: by whom.
        precision: of both products.
    """
    # It takes no precision of its own; the products keep the one that they are made under, in
    # their gradients too.
    named = jax.default_matmul_precision(precision.name.lower()) if precision else None
    with named or contextlib.nullcontext():
        return jax.nn.dot_product_attention(q, k, v, bias, implementation=implementation)


def choose(model: ml_collections.ConfigDict, head: int, device: Any) -> Implementation:
    """The implementation that `model.attention` asks for: with `auto` cuDNN's where it works.

    Args:
        model: the config's, with `attention` and `dtype`.
        head: width of a head.
        device: one of those that compute.

    Raises:
        UserError: cuDNN's is asked for and does not work there.
    """
    if model.attention == "xla":
        return "xla"
    refusal = refuses(model.dtype, head, device)
    if refusal is None:
        return "cudnn"
    if model.attention == "cudnn":
        raise UserError(
            f"model.attention=cudnn does not work here: {refusal}; choose auto or xla, or "
            "--config.model.dtype=bfloat16 on an NVIDIA GPU"
        )
    return "xla"


def refuses(dtype: str, head: int, device: Any) -> str | None:
    """Why cuDNN cannot train with heads of this width on a device; None if it can."""
    if device.platform != "gpu":
        return f"the device is {device.device_kind}, not an NVIDIA GPU"
    if dtype == "float32":
        return "it has no float32"

    def loss(x: Array) -> Array:
        return attend(x, x, x, implementation="cudnn").astype(jnp.float32).sum()

    # Versions and chips differ in what they can do, so it is tried; an odd number of tokens, as
    # [CLS] makes it.
    tokens = jax.ShapeDtypeStruct((1, 5, 1, head), jnp.dtype(dtype))
    try:
        jax.jit(jax.grad(loss)).lower(tokens).compile()
    except Exception as error:  # of whatever kind JAX, XLA and cuDNN raise
        return f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"
    return None
