"""What steps cost: ratios of two steps, and the operations of whole runs.

Nothing is trained. Times are those of this machine. Memory is what the compiler of this machine's
devices reports, so that a CPU's is in float32 and with other fusions than a GPU's. For GPUs that
are only described (`sop_jax.plan --topology`), memory is what their compiler reports, and time is
estimated from the compiled program by roofline.
"""

import functools
import hashlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from rows import COMPUTES, recipe_of, settings_digest
from turns import compiled, in_turns, memory

from sop_jax.compiled.flops import flops
from sop_jax.compiled.gpus import described_gpus
from sop_jax.parallel.mesh import make_mesh
from sop_jax.plan import IMAGES, Plan, estimated, plan
from sop_jax.training.assemble import assemble

ROUNDS = 7  # pairs of turns of five steps, after one that warms up
QUANTITIES = ("time", "memory", "operations", "estimate")
DESCRIBED = ("memory", "estimate")  # what devices have that are only described
H100 = 0.4 * 989e12  # operations per second: 40 % of the peak in bfloat16


class Step(NamedTuple):
    """A train step.

    Attributes:
        file: its recipe in configs/.
        changes: what differs, as pairs of the dotted name of a setting and its value.
    """

    file: str
    changes: tuple[tuple[str, Any], ...] = ()


class Cost(NamedTuple):
    """The ratio of two steps.

    Attributes:
        quantity: one of QUANTITIES.
        words: describes the ratio.
        step: the numerator.
        base: the denominator.
    """

    quantity: str
    words: str
    step: Step
    base: Step


class Size(NamedTuple):
    """A whole run of the papers, for what it would take to repeat it.

    Attributes:
        words: describes it.
        step: its step.
        epochs: its length.
        images: the images of an epoch; those of ImageNet-1k by default.
    """

    words: str
    step: Step
    epochs: float
    images: int = IMAGES


def recipe(step: Step) -> ml_collections.ConfigDict:
    """Returns the config of a step."""
    config = recipe_of(step.file)
    config.update_from_flattened_dict(dict(step.changes))
    return config


def settings(step: Step) -> ml_collections.ConfigDict:
    """Returns the config of a step; on a CPU it computes in float32, because it has no bfloat16."""
    config = recipe(step)
    if jax.default_backend() == "cpu":
        config.model.dtype = "float32"
    return config


def is_measurable(cost: Cost, topology: str) -> bool:
    """Whether a ratio can be had for a topology, or for this machine if it is empty."""
    return cost.quantity in DESCRIBED if topology else cost.quantity != "estimate"


def key_of(measured: Cost | Size, topology: str = "") -> dict[str, Any]:
    """Returns the values that identify the row of a ratio, or of a whole run.

    Args:
        measured: the ratio or the run.
        topology: GPUs that are only described, such as h100:1; by default those of this machine.
    """
    key = {"version": COMPUTES, "settings": digest(measured)}
    if isinstance(measured, Size):
        return {"kind": "size", **key}
    device = f"{topology} by its compiler" if topology else jax.devices()[0].device_kind
    return {"kind": "cost", **key, "device": device}


def digest(measured: Cost | Size) -> str:
    """Returns a digest of what determines a row, except the machine."""
    if isinstance(measured, Size):
        words = [settings_digest(recipe(measured.step)), str(measured.epochs), str(measured.images)]
    else:
        steps = (measured.step, measured.base)
        words = [measured.quantity, *(settings_digest(recipe(step)) for step in steps)]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


def measure(cost: Cost, topology: str = "", rounds: int = ROUNDS) -> dict[str, Any]:
    """Returns a row: the ratio of each round, and the seconds, bytes or operations of both steps.

    Only time has several rounds, because nothing else has a spread.

    Args:
        cost: the ratio, which `is_measurable`.
        topology: see `key_of`.
        rounds: the number of rounds of time.

    Raises:
        UserError: there is no such topology, or its compiler is not installed.
    """
    steps = {"step": cost.step, "base": cost.base}
    if cost.quantity == "time":
        ready = {name: compiled(settings(step), IMAGES) for name, step in steps.items()}
        seconds = in_turns(ready, rounds, repeats=5)
        ratios = [a / b for a, b in zip(seconds["step"], seconds["base"], strict=True)]
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        return {"ratios": ratios, "seconds": medians}
    amounts = {name: amount(cost.quantity, step, topology) for name, step in steps.items()}
    return {"ratios": [amounts["step"] / amounts["base"]], cost.quantity: amounts}


def amount(quantity: str, step: Step, topology: str) -> float:
    """Returns the bytes, the operations or the estimated seconds of a step, see `measure`."""
    if quantity == "estimate":
        return estimated(planned(step, topology))["ms"] / 1000
    if quantity == "operations":
        return operations(settings(step), IMAGES)
    if topology:
        return sum(planned(step, topology).memory.values())
    return memory(settings(step), IMAGES)


@functools.cache
def planned(step: Step, topology: str) -> Plan:
    """Returns what a step costs on GPUs that need not exist."""
    return plan(recipe(step), described_gpus(topology))


def operations(config: ml_collections.ConfigDict, images: int) -> float:
    """Returns the operations of matrix products of a step, which is traced but not compiled.

    Args:
        config: the config.
        images: the number of images of the train split.
    """
    run = assemble(config, make_mesh(1), images)
    step: Callable[..., Any] = run.train_step
    return flops(step, run.abstract, run.batch, jax.ShapeDtypeStruct((), jnp.bool))


def extent(size: Size) -> dict[str, Any]:
    """Returns a row: the operations of a whole run, and its days on one H100."""
    config = settings(size.step)
    whole = operations(config, size.images) * size.epochs * size.images / config.batch_size
    return {"operations": whole, "h100_days": whole / H100 / 86400}
