"""The operations, the time and the memory of a run, by formula: nothing is compiled."""

import time
from types import SimpleNamespace
from typing import NamedTuple

import ml_collections
import numpy as np

from sop_jax.compiled.device_memory import GIB
from sop_jax.data.augment import multi_crop
from sop_jax.models import size_of
from sop_jax.monitor.metrics import time_text
from sop_jax.own_images.machine import Machine
from sop_jax.own_images.survey import Survey
from sop_jax.schedules import run_length

# A training step does the forward pass, and twice its operations for the gradients.
TRAINED = 3
# The share of the measured rate that steps reach on CPUs: 0.55 to 0.78 for six sizes of the network
# and the views. It is unknown for accelerators.
REACHED_ON_CPUS = 0.65
# The numbers that a layer keeps for the gradients, as a multiple of the width, for each token.
KEPT = {"none": 34, "products": 14, "dots": 12, "full": 1}
LOGITS = 2**28  # the most bytes that a loss takes at a time, see `objectives.losses`
SHARE = 0.85  # of the memory of a device that a run is planned to use


class Estimate(NamedTuple):
    """What a run takes.

    Attributes:
        steps: the number of steps.
        operations: of matrix products, per step.
        compute: the seconds that the devices compute per step.
        input: the seconds that all cores together need to make the images of a step.
        seconds: of the whole run, without its start.
        memory: the bytes per device; None if no formula is known for the network.
    """

    steps: int
    operations: float
    compute: float
    input: float
    seconds: float
    memory: float | None


def estimate(
    config: ml_collections.ConfigDict,
    survey: Survey,
    machine: Machine,
    operations: float | None = None,
) -> Estimate:
    """Returns what a run takes, within a factor of about two.

    Args:
        config: the settings.
        survey: the images.
        machine: the devices.
        operations: of matrix products per step; by default those of the formula for a ViT.
    """
    steps = run_length(config, survey.images).steps
    if operations is None:
        operations = step_operations(config)
    compute = operations / (machine.rate * (REACHED_ON_CPUS if machine.shares_cores else 1.0))
    makers = machine.cores if machine.shares_cores else max(1, config.data.workers)
    each = survey.seconds + views_seconds(config.augment, survey)
    of_input = config.batch_size * each / min(machine.cores, makers)
    step = compute + of_input if machine.shares_cores else max(compute, of_input)
    return Estimate(
        steps=steps,
        operations=operations,
        compute=compute,
        input=of_input,
        seconds=steps * step,
        memory=memory(config, machine.devices) if config.model.family == "vit" else None,
    )


def words(found: Estimate, machine: Machine) -> list[str]:
    """Returns an estimate in words for people, one line each."""
    slow = "the images" if found.input > found.compute else "the steps"
    lines = [
        f"time: about {time_text(found.seconds)}, within a factor of two: {found.steps:,} steps, "
        f"each {time_text(found.compute)} for {found.operations / 1e12:.3g} TFLOP and "
        f"{time_text(found.input)} for its images; {slow} take longest"
    ]
    if found.memory is None:
        lines.append("memory: no formula for this network; sop_jax.plan compiles it")
    else:
        of = "" if machine.memory is None else f" of {machine.memory / GIB:.2f} GiB"
        lines.append(f"memory: about {found.memory / GIB:.2f} GiB{of} per device")
    return lines


def step_operations(config: ml_collections.ConfigDict) -> float:
    """Returns the operations of matrix products of a step, over all devices."""
    augment, head = config.augment, config.head
    network = {size: _network(config, size) for size in (augment.global_size, augment.local_size)}
    of_globals = augment.global_crops * network[augment.global_size]
    of_locals = augment.local_crops * network[augment.local_size]
    patches = (augment.global_size // config.model.patch) ** 2
    masked = patches * (1 - config.mask.none) * sum(config.mask.ratio) / 2
    width = size_of(config.model).width
    sides = [width, *[head.hidden] * (head.layers - 1), head.dim] if head.layers else []
    token = sum(2 * a * b for a, b in zip(sides, sides[1:], strict=False))
    views = augment.global_crops + augment.local_crops
    heads = TRAINED * token * (views + augment.global_crops * masked)
    heads += token * augment.global_crops * (1 + masked)
    images = TRAINED * (of_globals + of_locals) + of_globals + heads
    return config.batch_size * images + _method_operations(config, views, masked)


def _network(config: ml_collections.ConfigDict, size: int) -> int:
    """Returns the operations of the network for one view."""
    model, dimensions = config.model, size_of(config.model)
    patches, width = (size // model.patch) ** 2, dimensions.width
    tokens = patches + 1 + model.registers
    layer = 24 * tokens * width**2 + 4 * tokens**2 * width
    return dimensions.depth * layer + 2 * patches * 3 * model.patch**2 * width


def _method_operations(config: ml_collections.ConfigDict, views: int, masked: float) -> float:
    """Returns the operations of SOP's search and votes; those of other methods count as none."""
    if config.method != "sop":
        return 0.0
    total, dim = 0.0, config.head.dim
    votes = {"cls": views, "patch": config.augment.global_crops * masked}
    for name, level in config["sop"].items():
        if name not in votes:
            continue
        search = 2 * level.anchors * level.memory * dim * (level.supports > 0)
        rows = level.anchors * (level.supports + 1)
        total += level.tasks * (search + 4 * 2 * config.batch_size * votes[name] * rows * dim)
    return total


def parameters(config: ml_collections.ConfigDict) -> int:
    """Returns the number of parameters of the network and its head, without biases and norms."""
    model, head, size = config.model, config.head, size_of(config.model)
    tokens = (config.augment.global_size // model.patch) ** 2
    network = 12 * size.depth * size.width**2 + (tokens + 3 * model.patch**2) * size.width
    sides = [size.width, *[head.hidden] * (head.layers - 1), head.dim] if head.layers else []
    return network + sum(a * b for a, b in zip(sides, sides[1:], strict=False))


def memory(config: ml_collections.ConfigDict, devices: int) -> float:
    """Returns the bytes per device: networks, optimizer, memories and what gradients keep."""
    augment, size = config.augment, size_of(config.model)
    images = config.batch_size / devices / config.accumulate
    sides = {augment.global_size: augment.global_crops, augment.local_size: augment.local_crops}
    tokens = sum(n * ((side // config.model.patch) ** 2 + 1) for side, n in sides.items())
    number = 4 if config.model.dtype == "float32" else 2
    kept = images * tokens * size.depth * KEPT[config.model.remat] * size.width * number
    # What one layer computes again, or attention keeps: scores of all heads in float32.
    longest = (augment.global_size // config.model.patch) ** 2 + 1
    layer = images * augment.global_crops * longest * (24 * size.width * number)
    layer += images * augment.global_crops * size.heads * longest**2 * 8
    # Student, teacher, gradients, and two moments, all in float32.
    state = 5 * 4 * parameters(config)
    rows = 0
    if config.method == "sop":
        rows = sum(level.memory for level in config["sop"].values() if hasattr(level, "memory"))
    batch = config.batch_size / devices * 3 * sum(n * side**2 for side, n in sides.items())
    return state + 4 * rows * config.head.dim + batch + kept + layer + LOGITS / 2


def views_seconds(augment: ml_collections.ConfigDict, survey: Survey) -> float:
    """Returns the seconds of a thread for all views of an image of the usual size."""
    short = survey.short_side
    if not short:
        return 0.0
    ratios = [max(h.width, h.height) / min(h.width, h.height) for h in survey.headers.values()]
    shape = (short, round(short * float(np.median(ratios))), 3)
    rng = np.random.default_rng(0)
    image = np.zeros(shape, np.uint8)  # what it shows does not matter
    plain = SimpleNamespace(**augment.to_dict())
    times = []
    for _ in range(2):  # the first call is slower
        began = time.thread_time()
        multi_crop(image, rng, plain)
        times.append(time.thread_time() - began)
    return min(times)


def fits(config: ml_collections.ConfigDict, machine: Machine) -> bool:
    """Returns whether a run is expected to fit its devices; True if their memory is unknown."""
    if machine.memory is None:
        return True
    return memory(config, machine.devices) <= SHARE * machine.memory


def least_accumulate(config: ml_collections.ConfigDict, machine: Machine) -> int:
    """Returns the smallest number of microbatches that fits; that of one image each if none."""
    most = max(1, config.batch_size // machine.devices)
    trial = config.copy_and_resolve_references()
    for parts in (n for n in range(1, most + 1) if most % n == 0):
        trial.accumulate = parts
        if fits(trial, machine):
            return parts
    return most
