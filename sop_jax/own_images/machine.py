"""What the devices of this machine can do: their memory, and their speed, as measured."""

import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sop_jax.compiled import flops
from sop_jax.compiled.device_memory import GIB, bytes_limit
from sop_jax.config import paper
from sop_jax.models import build

ROUNDS = 20  # timed calls, of which the fastest counts: what else runs only makes them slower
SECONDS = 3.0  # after which no further call is timed


class Probe(NamedTuple):
    """A small network whose gradient is timed.

    Attributes:
        width: of its tokens.
        depth: its layers.
        size: of its images, in pixels.
        images: per call.
        dtype: of the computation.
    """

    width: int
    depth: int
    size: int
    images: int
    dtype: str


PROBES = {"cpu": Probe(192, 4, 96, 16, "float32")}
ACCELERATOR = Probe(384, 12, 224, 64, "bfloat16")


class Machine(NamedTuple):
    """The devices that a run uses.

    Attributes:
        platform: cpu, gpu or tpu.
        kind: the name of a device.
        devices: the number of devices, over all processes.
        memory: the bytes that a program may use on each device; None if they do not report it.
        cores: the number of processors that this process may use.
        rate: operations of matrix products per second in training, over all devices.
    """

    platform: str
    kind: str
    devices: int
    memory: float | None
    cores: int
    rate: float

    @property
    def shares_cores(self) -> bool:
        """Whether the steps are computed by the processors that also read the images."""
        return self.platform == "cpu"


def measure() -> Machine:
    """Returns what the devices of this machine can do; takes seconds, mostly to compile."""
    device = jax.local_devices()[0]
    rate = training_rate(PROBES.get(device.platform, ACCELERATOR))
    # Virtual devices of a CPU share its cores, so that together they are no faster than one.
    times = 1 if device.platform == "cpu" else jax.device_count()
    return Machine(
        platform=device.platform,
        kind=device.device_kind,
        devices=jax.device_count(),
        memory=bytes_limit(jax.local_devices()),
        cores=cores(),
        rate=times * rate,
    )


def cores() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def training_rate(probe: Probe) -> float:
    """Returns the operations per second of the gradient of a small network on one device."""
    config = paper()
    config.model.update(size="custom", width=probe.width, depth=probe.depth, dtype=probe.dtype)
    config.model.update(heads=probe.width // 64)
    config.head.update(hidden=256, dim=64)
    model = build(config, probe.size)

    def gradient(params: Any, images: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            cls, _ = model.embed(params, images, None, None, False)
            return jnp.sum(cls)

        return jax.grad(loss)(params)

    with jax.default_device(jax.local_devices()[0]):
        # Values of their own kind, but not those of `model.init`, which takes longer to compile.
        params = jax.tree.map(
            lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype),
            jax.eval_shape(model.init, jax.random.key(0)),
        )
        images = np.zeros((probe.images, probe.size, probe.size, 3), np.uint8)
        compiled = jax.jit(gradient).lower(params, images).compile()
        jax.block_until_ready(compiled(params, images))
        times: list[float] = []
        while len(times) < ROUNDS and sum(times) < SECONDS:
            began = time.monotonic()
            jax.block_until_ready(compiled(params, images))
            times.append(time.monotonic() - began)
    return flops.flops(gradient, params, images) / min(times)


def words(machine: Machine) -> str:
    """Returns what a machine can do in one line for people."""
    memory = "unknown memory" if machine.memory is None else f"{machine.memory / GIB:.1f} GiB"
    devices = f"{machine.devices} {machine.kind} device{'s' * (machine.devices > 1)}"
    each = " each" if machine.devices > 1 else " free" if machine.platform == "cpu" else ""
    return (
        f"{devices} with {memory}{each}, {machine.cores} cores; a small network trains at "
        f"{machine.rate / 1e12:.3g} TFLOP/s"
    )
