"""Random blocks of MaSSL and CARP give the numbers of the authors' code."""

import itertools
from typing import Any

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import Found, differences, exact, unnoticed

from sop_jax.objectives import memory
from sop_jax.objectives.carp import consistency, inequality
from sop_jax.objectives.losses import cls_loss
from sop_jax.objectives.massl import log_assignment
from sop_jax.objectives.prototypical.blocks import block_log_softmax

pytestmark = pytest.mark.medium

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_numbers.load("family.npz")


def single(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def by_image(x: np.ndarray) -> jax.Array:
    """Returns an array [V B ...] as [B V ...]."""
    return single(x).swapaxes(0, 1)


def massl(golden: dict[str, np.ndarray]) -> dict[str, Found]:
    rows, blocks = single(golden["massl/memory"]), golden["massl/blocks"]
    drawn, size = rows[jnp.asarray(blocks).reshape(-1)], blocks.shape[1]
    targets = jnp.exp(log_assignment(by_image(golden["massl/teacher"]), drawn, size, 0.04))

    def loss(student: jax.Array) -> jax.Array:
        views = student.swapaxes(0, 1)
        summed = cls_loss(views, targets, lambda _, u: log_assignment(u, drawn, size, 0.1))
        return summed / len(blocks)

    value, gradient = jax.value_and_grad(loss)(single(golden["massl/student"]))
    second = single(golden["massl/teacher"])[1]
    bank = memory.init_memory(jax.random.key(0), *rows.shape, lanes=1)  # one lane: a single ring
    bank = bank._replace(rows=rows[None], next=jnp.int32(golden["massl/ptr_before"]))
    bank = memory.push(bank, second, jnp.arange(len(second)))
    return {
        "massl/loss": Found(value, TOLERANCE),
        "massl/grad": Found(gradient, TOLERANCE),
        "massl/memory_after": Found(bank.rows[0], TOLERANCE),
        "massl/ptr_after": exact(bank.next),
    }


def carp(golden: dict[str, np.ndarray]) -> dict[str, Found]:
    blocks = jnp.asarray(golden["carp/blocks"])

    def within(logits: jax.Array) -> jax.Array:
        return block_log_softmax(logits[..., blocks.reshape(-1)], blocks.shape[1])

    teacher = within(single(golden["carp/teacher"]))

    def terms(logits: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        student = within(logits)
        pairs = itertools.product(range(len(student)), range(len(teacher)))
        others = [consistency(student[v], teacher[q]) for v, q in pairs if v != q]
        agreed = jnp.stack(others).mean()
        views = jnp.exp(jnp.concatenate([student, teacher]))
        equal = inequality(views.mean((0, 1)))
        return agreed + equal, (agreed, equal)

    student = single(golden["carp/student"])
    (_, (agreed, equal)), gradient = jax.value_and_grad(terms, has_aux=True)(student)
    return {
        "carp/consistency": Found(agreed, TOLERANCE),
        "carp/entropy": Found(equal, TOLERANCE),
        "carp/grad": Found(gradient, TOLERANCE),
    }


@pytest.fixture(scope="module")
def numbers(golden: dict[str, np.ndarray]) -> dict[str, Found]:
    return massl(golden) | carp(golden)


def test_every_number(golden: dict[str, np.ndarray], numbers: dict[str, Found]) -> None:
    inputs = {f"massl/{name}" for name in ("memory", "student", "teacher", "blocks", "ptr_before")}
    inputs |= {f"carp/{name}" for name in ("student", "teacher", "blocks")}
    computed = {name for name in golden if name.startswith(("massl/", "carp/"))} - inputs
    assert computed == numbers.keys()
    assert differences(golden, numbers) == []


def test_any_changed_number_fails(golden: dict[str, np.ndarray], numbers: dict[str, Found]) -> None:
    assert unnoticed(golden, numbers) == []
