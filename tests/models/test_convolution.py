"""Convolutions: their values and gradients, and the order of their axes on CPUs."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sop_jax.models import linear
from sop_jax.models.convolution import Convolution, _gradients, _gradients_on_cpu, convolve
from sop_jax.models.layers import Start

SHAPES = [(1, 2), (3, 1), (3, 2), (7, 2)]
SIZES = [(8, 8), (7, 10)]
FEW_WINDOWS = [(3, 4), (2, 1)]  # with a stride of 2, and with any


def taps(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns a convolution by its definition: a sum over the taps of the kernel."""
    side, size = len(kernel), x.shape[1:3]
    pad = side // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    h, w = ((length - 1) // stride + 1 for length in size)
    return sum(
        padded[:, i : i + stride * h : stride, j : j + stride * w : stride][:, :h, :w]
        @ kernel[i, j]
        for i in range(side)
        for j in range(side)
    )


def inputs(side: int, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    return x, jax.random.normal(jax.random.key(1), (side, side, 3, 4))


def values(function: Any, x: jax.Array, kernel: jax.Array) -> Any:
    """Returns the output of a function and the gradients of some sum of it."""
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape))


@pytest.mark.medium
@pytest.mark.parametrize(("side", "stride"), SHAPES)
@pytest.mark.parametrize("size", SIZES + FEW_WINDOWS)
def test_a_convolution_has_the_gradients_of_its_definition(
    side: int, stride: int, size: tuple[int, int]
) -> None:
    """Those that a layer computes as a matrix product too."""
    x, kernel = inputs(side, size)
    start = Start(jnp.dtype("float32"))
    graph, params = nnx.split(Convolution(3, 4, side, stride, start, jax.random.key(0)))

    def applied(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return nnx.merge(graph, jax.tree.map(lambda _: kernel, params))(x)

    found, of_layer, expected = jax.jit(
        lambda: [
            values(function, x, kernel)
            for function in (
                lambda x, kernel: convolve(x, kernel, stride),
                applied,
                lambda x, kernel: taps(x, kernel, stride),
            )
        ]
    )()
    chex.assert_trees_all_close(found, expected, atol=1e-4)
    chex.assert_trees_all_close(of_layer, expected, atol=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize(("side", "stride"), SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_the_same_on_all_devices(
    side: int, stride: int, size: tuple[int, int]
) -> None:
    x, kernel = inputs(side, size)
    gradient = jnp.cos(convolve(x, kernel, stride))
    on_cpus, elsewhere = jax.jit(
        lambda: [f(stride, None, x, kernel, gradient) for f in (_gradients_on_cpu, _gradients)]
    )()
    chex.assert_trees_all_close(on_cpus, elsewhere, atol=1e-5, rtol=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize(("side", "stride"), SHAPES)
def test_one_device_sums_the_gradient_over_groups_of_images(
    side: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = inputs(side, (7, 10))[1]
    x = jax.random.normal(jax.random.key(2), (6, 7, 10, 3))
    y = jnp.cos(convolve(x, kernel, stride))
    expected = _gradients(stride, None, x, kernel, y)
    monkeypatch.setattr(linear, "ROWS", 3 * y[0, ..., 0].size)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",))):
        traced = jax.jit(lambda x, y: _gradients_on_cpu(stride, None, x, kernel, y)).trace(x, y)
    assert "length=2" in str(traced.jaxpr)
    whole = jax.make_jaxpr(lambda x, y: _gradients_on_cpu(stride, None, x, kernel, y))(x, y)
    assert "scan" not in str(whole) and "concatenate" not in str(whole)  # windows take memory
    chex.assert_trees_all_close(traced.lower().compile()(x, y), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_few_windows_is_a_matrix_product(stride: int) -> None:
    """CPUs take ten to twenty times as long for the convolution."""
    layer = Convolution(4, 4, 3, stride, Start(jnp.dtype("float32")), jax.random.key(0))
    for more, convolves in ((0, False), (1, True)):
        operations = str(jax.make_jaxpr(layer)(jnp.ones((1, 2 * stride + more, 2 * stride, 4))))
        assert ("conv_general_dilated" in operations) == convolves


@pytest.mark.medium
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_in_loops_have_their_axes_in_the_fast_order(stride: int) -> None:
    """In another order, a CPU takes up to a hundred times as long for all but the smallest maps."""

    def loss(weights: tuple[jax.Array, jax.Array], images: jax.Array) -> jax.Array:
        def add(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            for kernel in weights:
                x = convolve(x, kernel, stride)
            return total + jnp.sum(x**2), None

        return jax.lax.scan(add, 0.0, images)[0]

    weights = (jnp.ones((3, 3, 4, 8)), jnp.ones((3, 3, 8, 8)))
    images = jnp.ones((2, 4, 16, 16, 4))
    on_cpu = functools.partial(jax.device_put, device=jax.devices("cpu")[0])
    text = jax.jit(jax.grad(loss)).lower(*on_cpu((weights, images))).compile().as_text()
    assert set(re.findall(r"dim_labels=([^,\s]*)", text)) == {"b01f_01io->b01f"}
