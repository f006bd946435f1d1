"""A linear layer whose products may be in bfloat16, with parameter gradients in float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Precision = jax.lax.Precision | None  # None for the fastest one of the device

# The precision of products of float32 numbers, by `config.model.precision`. By default, JAX rounds
# their factors to TF32 on GPUs and to bfloat16 on TPUs.
PRECISIONS: dict[str, Precision] = {
    "float32": jax.lax.Precision.HIGHEST,
    "high": jax.lax.Precision.HIGH,  # TF32 on GPUs, three bfloat16 passes on TPUs
    "default": None,
}


def precision_of(config: ml_collections.ConfigDict) -> Precision:
    """Returns the precision of a network's products; `config.precision` affects float32 only."""
    return PRECISIONS[config.precision] if config.dtype == "float32" else None


PRODUCT = "product"  # the checkpoint name of the outputs of linear layers, with their bias


class Linear(nnx.Linear):
    """A linear layer that multiplies in its dtype and sums the gradients of W and b in float32.

    Flax's own layer rounds the gradient of each device to the dtype of the computation, and the
    devices add theirs up in that dtype, so that the error grows with the number of devices.
    """

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: None = None) -> Array:
        """Returns the outputs [*B, O], in the dtype of the layer."""
        bias = None if self.bias is None else self.bias[...]
        return linear(inputs.astype(self.dtype), self.kernel[...], bias, self.precision)

    def parts(self, inputs: Float[Array, "*B I"], count: int) -> list[Float[Array, "*B o"]]:
        """Returns the outputs in equal parts, each from a product of its own.

        Where parts are used one by one, nothing has to be cut, nor their gradients joined.
        """
        inputs, kernels = inputs.astype(self.dtype), jnp.split(self.kernel[...], count, axis=-1)
        biases = [None] * count if self.bias is None else jnp.split(self.bias[...], count)
        return [
            linear(inputs, kernel, bias, self.precision)
            for kernel, bias in zip(kernels, biases, strict=True)
        ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(
    x: Float[Array, "*B I"],
    kernel: Float[Array, "I O"],
    bias: Float[Array, " O"] | None,
    precision: Precision = None,
) -> Float[Array, "*B O"]:
    """Returns the product of x and the kernel in the dtype of x, plus any bias."""
    return _linear(x, kernel, bias, precision)


def _linear(x: Array, kernel: Array, bias: Array | None, precision: Precision) -> Array:
    product = jnp.matmul(x, kernel.astype(x.dtype), precision=precision)
    return product if bias is None else product + bias.astype(x.dtype)


def _forward(
    x: Array, kernel: Array, bias: Array | None, precision: Precision
) -> tuple[Array, tuple]:
    # Not `linear` itself, inside which rematerialisation would see nothing that it can store.
    outputs = checkpoint_name(_linear(x, kernel, bias, precision), PRODUCT)
    return outputs, (x, kernel, None if bias is None else ())


def _backward(
    precision: Precision, saved: tuple[Array, Array, tuple | None], gradient: Array
) -> tuple:
    x, kernel, biased = saved  # `biased` is () if there is a bias and None otherwise
    to_kernel = functools.partial(outer, dtype=kernel.dtype, precision=precision)
    return (
        jnp.matmul(gradient, kernel.astype(gradient.dtype).T, precision=precision),
        jax.lax.platform_dependent(
            x,
            gradient,
            cpu=functools.partial(_outer_on_cpu, to_kernel),
            default=to_kernel,
        ),
        gradient.astype(kernel.dtype).sum(range(x.ndim - 1)) if biased is not None else None,
    )


linear.defvjp(_forward, _backward)


def _outer_on_cpu(to_kernel: Callable[[Array, Array], Array], x: Array, gradient: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    size = group_size(len(rows[0]))
    return summed(to_kernel, *rows, size) if size else to_kernel(x, gradient)


def outer(
    x: Float[Array, "*B I"], y: Float[Array, "*B O"], dtype: Any, precision: Precision
) -> Float[Array, "I O"]:
    """Returns the sum of the outer products over the batch axes, in a dtype."""
    batch = tuple(range(x.ndim - 1))
    axes = ((batch, batch), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision, preferred_element_type=dtype)


ROWS = 4096  # the most rows of a product on CPUs whose left factor has to be transposed


def group_size(count: int, rows: int = 1) -> int | None:
    """Returns how many entries at a time a gradient is summed over on CPUs; None for all at once.

    XLA's compiler for CPUs transposes the left factor of a gradient's product as a whole. It
    computes the operations that lead to this factor again, in the order of the transposed array,
    in which they are several times slower. A loop takes the factor as it is in memory.

    There is no loop unless the mesh in context has one device: several would have to exchange the
    groups. The train step sets it.

    Args:
        count: the number of entries.
        rows: the rows of the product for each entry.
    """
    mesh, most = jax.sharding.get_abstract_mesh(), max(1, ROWS // rows)
    if mesh.empty or mesh.size > 1 or count * rows <= ROWS:
        return None
    size = max(n for n in range(1, min(most, count) + 1) if count % n == 0)
    return size if size >= most // 4 else None  # many small groups would be slow, too


def summed(
    summand: Callable[[Array, Array], Array],
    x: Float[Array, "B ..."],
    y: Float[Array, "B ..."],
    size: int,
) -> Array:
    """Returns what `summand` returns for x and y, as a sum over groups of `size` entries.

    Args:
        summand: adds up the entries that it is given.
        x: an array, which is split along its first axis.
        y: another one.
        size: the entries of a group, a divisor of B.
    """
    groups = tuple(a.reshape(-1, size, *a.shape[1:]) for a in (x, y))
    zeros = jnp.zeros_like(jax.eval_shape(summand, x, y))
    return jax.lax.scan(lambda sum, group: (sum + summand(*group), None), zeros, groups)[0]
