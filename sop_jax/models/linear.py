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
        assert self.bias is not None
        return linear(inputs.astype(self.dtype), self.kernel[...], self.bias[...])


@jax.custom_vjp
def linear(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"]
) -> Float[Array, "*B O"]:
    """The product in the dtype of x, plus the bias."""
    return _linear(x, kernel, bias)


def _linear(x: Array, kernel: Array, bias: Array) -> Array:
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    # Not by way of `linear`, inside which rematerialisation sees no product that it could store.
    return _linear(x, kernel, bias), (x, kernel)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, kernel = saved
    batch = tuple(range(x.ndim - 1))
    return (
        gradient @ kernel.astype(gradient.dtype).T,
        jax.lax.dot_general(
            x, gradient, ((batch, batch), ((), ())), preferred_element_type=kernel.dtype
        ),
        gradient.astype(kernel.dtype).sum(batch),
    )


linear.defvjp(_forward, _backward)
