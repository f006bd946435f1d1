"""Counted operations, compared with numbers computed by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sop_jax.compiled import flops

X, W = jnp.ones((8, 16)), jnp.ones((16, 16))
PRODUCT = 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: a @ b, ((3, 5), (5, 7)), 2 * 3 * 5 * 7),
        (lambda a, b: jnp.einsum("hqd,hkd->hqk", a, b), ((4, 3, 5), (4, 7, 5)), 2 * 4 * 3 * 7 * 5),
        (lambda a, b: jnp.exp(a) + b.sum(), ((9, 9), (9, 9)), 0),
        (
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            ((1, 8, 8, 3), (2, 2, 3, 5)),
            2 * (4 * 4 * 5) * (2 * 2 * 3),
        ),
    ],
    ids=["product", "batched", "elementwise", "convolution"],
)
def test_products_and_nothing_else(
    function: Callable, shapes: tuple[tuple[int, ...], ...], expected: int
) -> None:
    assert (
        flops.flops(function, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)) == expected
    )


def chain(x: jax.Array, w: jax.Array, length: int) -> jax.Array:
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=length)[0]


def test_a_loop_counts_as_often_as_it_runs() -> None:
    assert flops.flops(lambda x: chain(x, W, 7), X) == 7 * PRODUCT

    def nested(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, c: chain(c, W, 5), x)

    assert flops.flops(nested, X) == 15 * PRODUCT


def test_the_backward_pass_costs_twice_the_forward_and_remat_a_forward_more() -> None:
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return chain(x, w, 4).sum()

    def loss_remat(x: jax.Array, w: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda c, _: (jnp.tanh(c @ w), None))
        return jax.lax.scan(layer, x, None, length=4)[0].sum()

    assert flops.flops(jax.grad(loss, (0, 1)), X, W) == 3 * 4 * PRODUCT
    assert flops.flops(jax.grad(loss_remat, (0, 1)), X, W) == 4 * 4 * PRODUCT


def test_the_most_expensive_branch_counts() -> None:
    def either(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ W, lambda: chain(x, W, 3))

    assert flops.flops(either, X) == 3 * PRODUCT


@jax.custom_vjp
def with_own_gradient(x: jax.Array) -> jax.Array:
    return x @ W


with_own_gradient.defvjp(lambda x: (x @ W, None), lambda _, g: (g @ W.T @ W,))


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (jax.jit(lambda x: x @ W), 1),
        (with_own_gradient, 1),
        (jax.grad(lambda x: with_own_gradient(x).sum()), 3),
        (jax.vmap(lambda row: row @ W), 1),
    ],
    ids=["jit", "custom", "custom gradient", "vmap"],
)
def test_calls_are_looked_into(function: Callable, products: int) -> None:
    assert flops.flops(function, X) == products * PRODUCT


def test_every_device_of_a_shard_map_counts() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def product(spec: P) -> Any:
        return jax.shard_map(lambda x: x @ W, mesh=mesh, in_specs=spec, out_specs=spec)

    assert flops.flops(product(P(("data", "fsdp"))), X) == PRODUCT  # an eighth per device
    assert flops.flops(product(P("data")), X) == 2 * PRODUCT
    assert flops.flops(product(P()), X) == 8 * PRODUCT
    data_alone = jax.shard_map(
        lambda x: x @ W, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"}
    )
    assert flops.flops(jax.jit(data_alone), X) == 4 * PRODUCT


def test_a_loop_of_unknown_length_is_refused_if_it_multiplies() -> None:
    def until(step: Callable) -> Callable:
        return lambda x: jax.lax.while_loop(lambda c: c.sum() < 1e9, step, x)

    assert flops.flops(until(lambda c: c * 2), X) == 0
    with pytest.raises(ValueError, match=r"while loop in search .*use lax\.scan"):
        flops.flops(jax.named_scope("search")(until(lambda c: c @ W)), X)


def test_scopes_add_up_to_all_operations() -> None:
    def loss(w: jax.Array) -> jax.Array:
        with jax.named_scope("student"):
            y = chain(X, w, 5)
            with jax.named_scope("losses"):
                y = y @ w
        with jax.named_scope("losses"):
            y = jax.jit(lambda y: y @ w)(y)
        return (y @ W).sum()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(W)
    shares = flops.by_scope(jaxpr, ("student", "losses", "teacher"))
    # Each has a forward pass and two gradients; X needs no gradient, and the last product has one.
    assert shares == {
        "student": 3 * 5 * PRODUCT,
        "losses": (3 + 3) * PRODUCT,
        "teacher": 0,
        "": 2 * PRODUCT,
    }
    assert flops.count(jaxpr) == sum(shares.values())


def test_attention_by_cudnn_counts_as_its_products() -> None:
    """Its primitives are traced here without cuDNN, which JAX asks for its version."""

    def attention(name: str, outputs: int) -> jax.extend.core.Primitive:
        primitive = jax.extend.core.Primitive(f"dot_product_attention_{name}_wrapper")
        primitive.multiple_results = True
        primitive.def_abstract_eval(lambda q, *_: [q] * outputs)
        return primitive

    def step(q: jax.Array, k: jax.Array) -> Any:
        (mixed,) = attention("fwd", 1).bind(q, k, k)
        with jax.named_scope("student"):
            return attention("bwd", 3).bind(q, k, k, mixed)

    q = jax.ShapeDtypeStruct((2, 6, 3, 8), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 10, 3, 8), jnp.bfloat16)
    product = 2 * 2 * 3 * 6 * 10 * 8
    found = flops.by_scope(jax.make_jaxpr(step)(q, k), ["student"])
    assert found == {"": 2 * product, "student": 4 * product}
