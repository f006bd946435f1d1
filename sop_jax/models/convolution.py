"""A convolution whose products may be in bfloat16, with parameter gradients in float32.

XLA's compiler for CPUs calls its fast convolution only for inputs `NHWC` and kernels `HWIO`. Where
the axes have other roles, as in the gradients that JAX derives, it transposes the arrays to that
order, but not inside loops, where it falls back to code that is up to a hundred times slower. On
CPUs the gradients are therefore written as convolutions in that order. Where `linear.group_size`
allows it, that of the kernel is a sum of products of the windows of a few images instead, which
transposes nothing. On other devices they are JAX's, which the libraries of GPUs have kernels for.

The fast convolution is slow where the output or the gradient has only 2 x 2 pixels (4 GFLOP/s on a
core that multiplies matrices at 85, measured with 128 and 256 channels). There a convolution is a
matrix product of its windows, on all devices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sop_jax.models.layers import Start
from sop_jax.models.linear import Precision, group_size, linear, outer, summed

FEW = 2  # the most windows on a side with which a convolution is a matrix product


class Convolution(nnx.Module):
    """A convolution without bias, padded by half the kernel on every side, as in PyTorch."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, start: Start, key: Array):
        self.stride, self.dtype, self.precision = stride, start.dtype, start.precision
        # torchvision's initialization: He's normal one for ReLU, by the fan-out.
        std = (2 / (side * side * outputs)) ** 0.5
        self.kernel = nnx.Param(std * jax.random.normal(key, (side, side, inputs, outputs)))

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        """Returns the convolution in the layer's dtype."""
        x, kernel = x.astype(self.dtype), self.kernel[...]
        side = kernel.shape[0]
        if side == 1 or max(x.shape[1:3]) <= FEW * self.stride:
            rows = kernel.reshape(-1, kernel.shape[-1])
            return linear(windows(x, side, self.stride), rows, None, self.precision)
        return convolve(x, kernel, self.stride, self.precision)


def windows(x: Float[Array, "B H W I"], side: int, stride: int) -> Float[Array, "B h w N"]:
    """Returns the N = side * side * I numbers that a convolution sees at each place, row by row.

    Args:
        x: the images, which are padded by `side // 2` zeros on every side.
        side: the side of the convolution's kernel in pixels.
        stride: the stride of the convolution in pixels.
    """
    pad = side // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = (stride * ((size + 2 * pad - side) // stride) + 1 for size in x.shape[1:3])
    pixels = [
        padded[:, top : top + height : stride, left : left + width : stride]
        for top in range(side)
        for left in range(side)
    ]
    return jnp.concatenate(pixels, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: Float[Array, "B H W I"],
    kernel: Float[Array, "k k I O"],
    stride: int,
    precision: Precision = None,
) -> Float[Array, "B h w O"]:
    """Returns a convolution in the dtype of x; the gradient of the kernel is summed in float32.

    As in `linear`, this gradient is not rounded before the devices add theirs up. For a convolution
    that sums in float32, its factors are converted to float32 first, which does not change their
    products.
    """
    return _convolve(x, kernel, stride, precision)


def _convolve(x: Array, kernel: Array, stride: int, precision: Precision) -> Array:
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=_AXES,
        precision=precision,
    )


_AXES = ("NHWC", "HWIO", "NHWC")


def _forward(
    x: Array, kernel: Array, stride: int, precision: Precision
) -> tuple[Array, tuple[Array, Array]]:
    # Not `convolve` itself, inside which rematerialisation would see no product it can store.
    return _convolve(x, kernel, stride, precision), (x, kernel)


def _backward(
    stride: int, precision: Precision, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    gradients = jax.lax.platform_dependent(
        *(*saved, gradient),
        cpu=functools.partial(_gradients_on_cpu, stride, precision),
        default=functools.partial(_gradients, stride, precision),
    )
    return gradients[0], gradients[1]


def _gradients(
    stride: int, precision: Precision, x: Array, kernel: Array, gradient: Array
) -> tuple[Array, Array]:
    wide, wide_gradient = x.astype(kernel.dtype), gradient.astype(kernel.dtype)
    to_x = jax.linear_transpose(lambda x: _convolve(x, kernel, stride, precision), x)
    to_kernel = jax.linear_transpose(
        lambda kernel: _convolve(wide, kernel, stride, precision), kernel
    )
    return to_x(gradient)[0], to_kernel(wide_gradient)[0]


def _gradients_on_cpu(
    stride: int, precision: Precision, x: Array, kernel: Array, gradient: Array
) -> tuple[Array, Array]:
    """Returns the same as `_gradients`, from convolutions in the fast order or from products."""
    side = kernel.shape[0]
    pad = side // 2
    # The input's pixels between the last window and the padded edge, in height and width.
    left = [
        size + 2 * pad - side - stride * (windows - 1)
        for size, windows in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    ]
    convolution = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        dimension_numbers=_AXES,
        precision=precision,
    )
    to_x = convolution(
        gradient,
        jnp.flip(kernel.astype(gradient.dtype), (0, 1)).swapaxes(2, 3),
        padding=[(side - 1 - pad, side - 1 - pad + more) for more in left],
        lhs_dilation=(stride, stride),
    )
    size = group_size(len(x), math.prod(gradient.shape[1:3]))
    if size:

        def of_images(x: Array, gradient: Array) -> Array:
            return outer(windows(x, side, stride), gradient, kernel.dtype, precision)

        return to_x, summed(of_images, x, gradient, size).reshape(kernel.shape)
    # Images take the role of channels, and the gradient that of a kernel.
    to_kernel = convolution(
        x.astype(kernel.dtype).transpose(3, 1, 2, 0),
        gradient.astype(kernel.dtype).transpose(1, 2, 0, 3),
        padding=[(pad, pad - more) for more in left],
        rhs_dilation=(stride, stride),
    )
    return to_x, to_kernel.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
