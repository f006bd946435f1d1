"""A linear layer whose products may be bfloat16 and whose parameters' gradients never are."""

import jax
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Linear):
    """Products in the layer's dtype, with gradients of W and b summed in float32.

    Flax's own layer rounds a device's gradient to the dtype of the computation before the devices
    add theirs up in that dtype, so that the error grows with their number.
    """

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: None = None) -> Array:
        """The layer's outputs [*B, O]."""
        bias = None if self.bias is None else self.bias[...]
        return linear(inputs.astype(self.dtype), self.kernel[...], bias)


@jax.custom_vjp
def linear(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None
) -> Float[Array, "*B O"]:
    """The product in the dtype of x, plus the bias where there is one."""
    return _linear(x, kernel, bias)


def _linear(x: Array, kernel: Array, bias: Array | None) -> Array:
    product = x @ kernel.astype(x.dtype)
    return product if bias is None else product + bias.astype(x.dtype)


def _forward(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, tuple]:
    # Not by way of `linear`, inside which rematerialisation sees no product that it could store.
    return _linear(x, kernel, bias), (x, kernel, None if bias is None else ())


def _backward(saved: tuple[Array, Array, tuple | None], gradient: Array) -> tuple:
    x, kernel, biased = saved  # the last of them is no array, and () where there is a bias
    batch = tuple(range(x.ndim - 1))
    return (
        gradient @ kernel.astype(gradient.dtype).T,
        jax.lax.dot_general(
            x, gradient, ((batch, batch), ((), ())), preferred_element_type=kernel.dtype
        ),
        gradient.astype(kernel.dtype).sum(batch) if biased is not None else None,
    )


linear.defvjp(_forward, _backward)
