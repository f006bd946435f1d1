"""Train steps on a batch that stays in memory: their time, measured in turns, and their memory."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from sop_jax.parallel.mesh import make_mesh, put, replicated, split
from sop_jax.training.assemble import assemble, traced_step


class Step(NamedTuple):
    """A compiled step.

    Attributes:
        call: the compiled step.
        given: its arguments; the first is the state, which a call donates.
        size: the bytes of its arguments and temporary arrays, as the compiler reports them.
    """

    call: Any
    given: list[Any]
    size: int


def size_of(program: Any) -> int:
    """Returns the bytes of the arguments and temporary arrays of a compiled program."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes


def compiled(config: ml_collections.ConfigDict, images: int) -> Step:
    """Compiles the step of a config for one device.

    Args:
        config: the config.
        images: the number of images of the train split.
    """
    run = assemble(config, make_mesh(1), images)
    step = traced_step(run).lower().compile()
    rng = np.random.default_rng(0)
    batch = {}
    for name, shape in run.batch.items():
        if name == "mask":
            array = rng.random(shape.shape) < 0.3
        elif name in ("index", "corrupt"):
            array = np.arange(len(rng.random(shape.shape)), dtype=np.int32)
        else:
            array = rng.integers(0, 256, shape.shape).astype(np.uint8)
        batch[name] = put(array, split(run.mesh))
    measure = put(np.array(False), replicated(run.mesh))
    return Step(step, [run.init(jax.random.key(0)), batch, measure], size_of(step))


def in_turns(steps: Mapping[str, Step], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of one step in each round, in which all steps take their turn.

    Args:
        steps: the steps by name.
        rounds: the number of rounds, after one that warms up.
        repeats: the calls per turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, (step, given, _) in steps.items():
            began = time.perf_counter()
            for _ in range(repeats):
                given[0], metrics = step(*given)
            jax.block_until_ready(metrics)
            if turn:
                seconds[name].append((time.perf_counter() - began) / repeats)
    return seconds


def memory(config: ml_collections.ConfigDict, images: int) -> int:
    """Returns the bytes of the step of a config for one device, which is compiled but not run.

    Args:
        config: the config.
        images: the number of images of the train split.
    """
    return size_of(traced_step(assemble(config, make_mesh(1), images)).lower().compile())
