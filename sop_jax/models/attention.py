"""Multi-head attention, by operations of XLA or by fused ones of cuDNN on GPUs."""

import contextlib
from collections.abc import Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from sop_jax.errors import UserError
from sop_jax.models.linear import Precision

Implementation = Literal["xla", "cudnn"]

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def attend(
    q: Float[Array, "B Q N h"],
    k: Float[Array, "B T N h"],
    v: Float[Array, "B T N h"],
    bias: Float[Array, "#B N Q T"] | None = None,
    *,
    implementation: Implementation,
    precision: Precision = None,
    length: int | None = None,
) -> Float[Array, "B Q N h"]:
    """Returns JAX's own attention of Q queries to T tokens in N heads, with its softmax in float32.

    cuDNN's implementation never writes the Q x T weights to memory.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        bias: a bias to add to the products of queries and keys.
        implementation: the implementation to use.
        precision: the precision of both products.
        length: the number of tokens that count, which are the first; all by default. The results
            of other queries are zero, and their gradients too.
    """
    # JAX's function has no argument for the precision. Products keep the default precision under
    # which they are traced, in their gradients too.
    lengths = None if length is None else jnp.full(len(q), length, jnp.int32)
    named = jax.default_matmul_precision(precision.name.lower()) if precision else None
    with named or contextlib.nullcontext():
        return jax.nn.dot_product_attention(
            *(q, k, v, bias),
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )


def padded_length(tokens: int, implementation: Implementation) -> int:
    """Returns the number of tokens, with padding, that an implementation is given.

    JAX does not train with cuDNN's attention if the number of tokens is odd, as it is with [CLS].
    """
    return tokens + tokens % 2 if implementation == "cudnn" else tokens


def choose(
    model: ml_collections.ConfigDict, head: int, device: Any, tokens: Collection[int]
) -> Implementation:
    """Returns the implementation for `model.attention`; `auto` chooses cuDNN's where it works.

    Args:
        model: `config.model` of the run, with `attention` and `dtype`.
        head: the width of a head.
        device: one of the devices of the run.
        tokens: the numbers of tokens of the views.

    Raises:
        UserError: cuDNN's implementation is requested but does not work on the device.
    """
    if model.attention == "xla":
        return "xla"
    refusal = refuses(model.dtype, head, device, tokens)
    if refusal is None:
        return "cudnn"
    if model.attention == "cudnn":
        raise UserError(
            f"model.attention=cudnn does not work here: {refusal}; choose auto or xla, or use "
            "--config.model.dtype=bfloat16 on an NVIDIA GPU"
        )
    return "xla"


def refuses(dtype: str, head: int, device: Any, tokens: Collection[int]) -> str | None:
    """Returns why cuDNN cannot train with heads of this width on a device; None if it can."""
    if device.platform != "gpu":
        return f"the device is {device.device_kind}, not an NVIDIA GPU"
    if dtype == "float32":
        return "cuDNN's attention does not support float32"

    # What works depends on versions, chips and sizes, so it is tried.
    where = SingleDeviceSharding(device)
    for count in set(tokens):

        def loss(x: Array, count: int = count) -> Array:
            return attend(x, x, x, implementation="cudnn", length=count).astype(jnp.float32).sum()

        shape = (1, padded_length(count, "cudnn"), 1, head)
        given = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
        try:
            jax.jit(jax.grad(loss)).lower(given).compile()
        except Exception as error:  # JAX, XLA and cuDNN raise errors of many kinds
            return f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"
    return None
