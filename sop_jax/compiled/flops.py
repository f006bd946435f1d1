"""Counts the floating-point operations of a function from its jaxpr.

As is usual, only matrix products and convolutions are counted: 2mnk for m x k times k x n; those of
cuDNN's attention are the two of its forward pass and the four of its backward pass, which also
computes the weights again. Elementwise operations, reductions, sorts and decompositions count as
zero.
"""

import math
import re
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params


def flops(function: Callable, *args: Any) -> float:
    """Returns the operations of one call of a function.

    Args:
        function: any function, transformed by `jax.jit` or not; it is traced, not run.
        *args: arrays, or `jax.ShapeDtypeStruct`s in their place.

    Returns:
        The operations of all devices together. Work that XLA chooses to repeat on several devices
        is counted once; work that a `shard_map` repeats is counted as often as it is done.

    Raises:
        ValueError: see `count`.
    """
    return count(jax.make_jaxpr(function)(*args))


def count(jaxpr: ClosedJaxpr) -> float:
    """Returns the operations of a jaxpr.

    The body of a loop counts as often as it runs, and of several branches the most expensive
    counts.

    Raises:
        ValueError: a `while` loop multiplies matrices, and a jaxpr does not say how often it runs.
    """
    return _total(by_scope(jaxpr, ()))


def by_scope(jaxpr: ClosedJaxpr, scopes: Sequence[str]) -> dict[str, float]:
    """Returns the operations by `jax.named_scope`, including the backward pass of each scope.

    Args:
        jaxpr: the jaxpr of the whole function.
        scopes: the names to tell apart; of nested scopes, the innermost counts.

    Returns:
        The operations by name, 0 for a name that does not occur, and those of the rest under "".

    Raises:
        ValueError: see `count`.
    """
    return _count(jaxpr.jaxpr, "", dict.fromkeys(("", *scopes), 0.0))


def scope(path: str, scopes: Container[str]) -> str:
    """Returns the innermost of `scopes` in an operation's path of names, or "" if none is."""
    # Transformations wrap names: transpose(jvp(student)).
    return next((word for word in reversed(re.findall(r"\w+", path)) if word in scopes), "")


def _count(jaxpr: Jaxpr, path: str, zeros: dict[str, float]) -> dict[str, float]:
    total = dict(zeros)
    for eqn in jaxpr.eqns:
        for name, value in _count_eqn(eqn, f"{path}/{eqn.source_info.name_stack}", zeros).items():
            total[name] += value
    return total


def _count_eqn(eqn: JaxprEqn, path: str, zeros: dict[str, float]) -> dict[str, float]:
    primitive, params = eqn.primitive.name, eqn.params
    if primitive in ("dot_general", "conv_general_dilated"):
        product = _dot(eqn) if primitive == "dot_general" else _convolution(eqn)
        return zeros | {scope(path, zeros): product}
    if primitive.startswith("dot_product_attention_"):
        return zeros | {scope(path, zeros): _attention(eqn)}
    bodies = [_count(body, path, zeros) for body in jaxprs_in_params(params)]
    if not bodies:
        return zeros
    if primitive == "cond":
        return max(bodies, key=_total)
    total = {name: sum(body[name] for body in bodies) for name in zeros}
    if primitive == "while" and _total(total):
        raise ValueError(
            f"a while loop in {path.strip('/') or 'the function'} multiplies matrices, but its "
            "operations can only be counted if the number of its iterations is known; use lax.scan"
        )
    times = params["length"] if primitive == "scan" else 1
    if primitive == "shard_map":
        times = _devices(params)
    return {name: times * value for name, value in total.items()}


def _total(counts: dict[str, float]) -> float:
    return sum(counts.values())


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed


def _convolution(eqn: Any) -> float:
    kernel, output_axis = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
    summed = math.prod(kernel) // kernel[output_axis]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed


def _attention(eqn: Any) -> float:
    """Returns the operations of cuDNN's attention, of queries [B Q N h] and keys [B T N h]."""
    query, key = (variable.aval.shape for variable in eqn.invars[:2])
    return (2 if "_fwd" in eqn.primitive.name else 4) * 2.0 * math.prod(query) * key[1]


def _devices(params: dict[str, Any]) -> int:
    """Returns the number of devices that run the body of a `shard_map`, each for its own part."""
    mesh = params["mesh"]
    axes = params.get("newly_manual_axes", params.get("manual_axes", mesh.axis_names))
    return math.prod(mesh.shape[axis] for axis in axes)
