"""The objectives of MaSSL and CARP give the numbers of the authors' code."""

from typing import Any

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import Found, differences, exact, unnoticed
from small import small_config

from sop_jax.objectives import memory
from sop_jax.objectives.blocks import random_blocks
from sop_jax.objectives.methods import METHODS
from sop_jax.objectives.objective import Outputs
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length

pytestmark = pytest.mark.medium

TOLERANCE = 1e-5
KEY = jax.random.key(7)  # of the step


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_numbers.load("family.npz")


def single(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def outputs(cls: Any) -> Outputs:
    """Returns the outputs of a network for embeddings [V B d], without patches."""
    by_image = single(cls).swapaxes(0, 1)
    none = jnp.zeros((len(by_image), 2, 0, by_image.shape[-1]))
    return Outputs(by_image, none, by_image, none)


def order(blocks: np.ndarray, count: int) -> np.ndarray:
    """Returns the order of golden rows in which the objective's own blocks are the golden ones.

    The objective draws its blocks with KEY. Rows in no golden block take the places that are in
    none of its own.
    """
    drawn = np.asarray(random_blocks(KEY, count, blocks.shape[1]))
    every, rows = np.arange(count), np.empty(count, int)
    rows[drawn] = blocks
    rows[np.setdiff1d(every, drawn)] = np.setdiff1d(every, blocks)
    return rows


def step(
    method: str, section: dict[str, Any], golden: dict[str, np.ndarray], change: Any
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Returns the loss, its terms, and the gradient of the student's embeddings [V B d].

    Args:
        method: `massl` or `carp`.
        section: the settings of the method.
        golden: the golden arrays.
        change: returns the parameters and what is carried, given those of the first step.
    """
    student, teacher = golden[f"{method}/student"], golden[f"{method}/teacher"]
    batch, dim = student.shape[1:]
    augment = dict(local_crops=len(student) - len(teacher))
    config = small_config(method=method, batch_size=batch, augment=augment, **{method: section})
    own = METHODS[method].build(config, dim, make_mesh(1), Length(10, 1.0), (2, 2))
    params, carried = change(*own.init(jax.random.key(0)))
    now = {name: schedule(0) for name, schedule in own.schedules.items()}
    masked = jnp.zeros((batch, 2, 0), bool)
    given = params, params, carried, outputs(teacher), masked, jnp.arange(batch), now, KEY
    shared, targets, _ = own.teach(*given)

    def loss(student: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return own.loss(params, shared, targets, outputs(student), masked, now)

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(single(student))
    return value, terms, gradient


def massl(golden: dict[str, np.ndarray]) -> dict[str, Found]:
    rows, blocks = golden["massl/memory"], golden["massl/blocks"]
    size = dict(memory=len(rows), block=blocks.shape[1])
    temperatures = dict(student_temperature=0.1, teacher_temperature=(0.04, 0.04))

    def change(params: Any, carried: memory.Memory) -> tuple[Any, memory.Memory]:
        lanes, slots, dim = carried.rows.shape
        held = np.zeros((lanes * slots, dim), np.float32)
        places = memory.by_age(carried, len(rows), jnp.arange(len(rows)))
        held[np.asarray(places)] = rows[order(blocks, len(rows))]
        return params, carried._replace(rows=jnp.asarray(held.reshape(lanes, slots, dim)))

    value, _, gradient = step("massl", size | temperatures, golden, change)
    second = single(golden["massl/teacher"])[1]
    bank = memory.init_memory(jax.random.key(0), *rows.shape, lanes=1)  # one lane: a single ring
    bank = bank._replace(rows=single(rows)[None], next=jnp.int32(golden["massl/ptr_before"]))
    bank = memory.push(bank, second, jnp.arange(len(second)))
    return {
        "massl/loss": Found(value, TOLERANCE),
        "massl/grad": Found(gradient, TOLERANCE),
        "massl/memory_after": Found(bank.rows[0], TOLERANCE),
        "massl/ptr_after": exact(bank.next),
    }


def carp(golden: dict[str, np.ndarray]) -> dict[str, Found]:
    blocks, count = golden["carp/blocks"], golden["carp/student"].shape[-1]

    def change(params: Any, carried: Any) -> tuple[Any, Any]:
        """Returns prototypes that are unit vectors of the axes: embeddings are the logits."""
        assert params["prototypes"]["cls"].keys() == {"direction"}
        axes = jnp.eye(count)[order(blocks, count)]
        return {"prototypes": {"cls": {"direction": axes}}}, carried

    size = dict(prototypes=count, block=blocks.shape[1])
    value, terms, gradient = step("carp", size, golden, change)
    np.testing.assert_allclose(value, terms["cls"] + terms["prior"], rtol=1e-6)
    return {
        "carp/consistency": Found(terms["cls"], TOLERANCE),
        "carp/entropy": Found(terms["prior"], TOLERANCE),
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
