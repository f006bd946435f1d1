"""The parts of a run that follow from its config: the step, and where each array lies."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Key

from sop_jax.compiled.device_memory import Fit, compile_and_compare, in_gib
from sop_jax.errors import UserError
from sop_jax.models import Model, build, size_of
from sop_jax.models.attention import Implementation, choose
from sop_jax.objectives.methods import method_of
from sop_jax.objectives.objective import Objective
from sop_jax.parallel.mesh import check_split, gatherer, placed, replicated, shardings, split
from sop_jax.schedules import Schedule, run_length
from sop_jax.training import optim
from sop_jax.training.state import TrainState, init_state
from sop_jax.training.step import make_train_step

TRIES = 4  # steps that are compiled to find one that fits


class Run(NamedTuple):
    """What is known of a run before anything is allocated.

    Attributes:
        mesh: the devices.
        model: the network of student and teacher.
        objective: targets, losses and signs of health.
        schedules: of the optimizer and the teacher, see `optim.schedules`.
        steps: to train for.
        epoch: steps an epoch.
        init: key -> the state before the first step, compiled to lie where it belongs.
        abstract: the state's shapes and shardings.
        batch: shapes and shardings of a global batch.
        train_step: the step, to be compiled; the state given to it is donated.
    """

    mesh: Mesh
    model: Model
    objective: Objective
    schedules: dict[str, Schedule]
    steps: int
    epoch: float
    init: Callable[[Key[Array, ""]], TrainState]
    abstract: Any
    batch: dict[str, Any]
    train_step: Callable[..., Any]


def assemble(config: ml_collections.ConfigDict, mesh: Mesh, images: int) -> Run:
    """The run of a config on a mesh.

    Args:
        config: see `sop_jax.config`.
        mesh: devices, present or described.
        images: of the training set.

    Raises:
        UserError: the devices do not divide the batch, or cannot compute what is asked for.
    """
    check_split(mesh, config.batch_size, config.accumulate)
    length = run_length(config, images)
    implementation: Implementation = "xla"
    if config.model.family == "vit":
        width, _, heads = size_of(config.model)
        implementation = choose(config.model, width // heads, mesh.devices.flat[0])
    model = build(config, config.augment.global_size, gatherer(mesh), implementation)
    batch = abstract_batch(config, mesh, model.patch)
    grid = batch["mask"].shape[2:]
    objective = method_of(config).build(config, model.dim, mesh, length, grid)
    schedules = optim.schedules(config, length)
    tx = optim.optimizer(config.optim, schedules, objective.optimizers)

    def init(key: Key[Array, ""]) -> TrainState:
        return init_state(key, model, objective, tx)

    abstract = placed(jax.eval_shape(init, jax.random.key(0)), mesh)
    where = shardings(abstract)
    step = make_train_step(model, objective, tx, schedules, config.accumulate)
    return Run(
        mesh=mesh,
        model=model,
        objective=objective,
        schedules=schedules,
        steps=length.steps,
        epoch=length.epoch,
        init=jax.jit(init, out_shardings=where),
        abstract=abstract,
        batch=batch,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(where, replicated(mesh))),
    )


def traced_step(run: Run) -> Any:
    """The step for what a run gives it, traced and not yet compiled."""
    measure = jax.ShapeDtypeStruct((), jnp.bool, sharding=replicated(run.mesh))
    step: Any = run.train_step  # compiled by jax.jit, so that it can be traced too
    return step.trace(run.abstract, run.batch, measure)


def compiled_step(
    config: ml_collections.ConfigDict, run: Run, note: Callable[[str], Any]
) -> Callable[..., Any]:
    """The step, compiled before the first batch is there.

    Args:
        config: of the run.
        run: assembled from it.
        note: tells a person about work that takes long.

    Raises:
        UserError: the step takes more memory than the devices have; says what would fit.
    """
    fit = fit_of_step(run)
    if fit.fits is False:
        raise UserError(too_large(config, run, fit, note))
    assert fit.compiled is not None
    return fit.compiled


def fit_of_step(run: Run) -> Fit:
    """The compiled step beside the memory of the run's devices."""
    return compile_and_compare(traced_step(run).lower(), list(run.mesh.devices.flat))


def too_large(
    config: ml_collections.ConfigDict, run: Run, fit: Fit, note: Callable[[str], Any]
) -> str:
    """That the step does not fit, and what would, for a person."""
    there = "" if fit.limit is None else f", more than the {in_gib(fit.limit)} there are"
    words = f"the train step takes {in_gib(fit.wanted)} of memory per device{there}"
    note(f"{words}; looking for a smaller one that fits ...")
    parts, found = smaller_step(config, run, fit)
    remat = [] if config.model.remat == "full" else ["--config.model.remat=full"]
    if parts is None:
        return (
            f"{words}, and with one image per device at a time it would not fit either. Try "
            + ", ".join([*remat, "a smaller model", "smaller images"])
            + ", or more devices with --config.mesh.fsdp"
        )
    smaller = config.batch_size * config.accumulate // parts
    sure = f"{in_gib(found.wanted)} when compiled" if found else "by estimate"
    changes = ", each normed by itself" if config.model.family == "resnet" else ""
    return (
        f"{words}. These would fit ({sure}): --config.accumulate={parts}, which takes the same "
        f"batch of {config.batch_size} in {parts} microbatches{changes}, or "
        f"--config.batch_size={smaller}, which learns from fewer images a step"
        + "".join(f". {setting} takes less memory too" for setting in remat)
    )


def smaller_step(
    config: ml_collections.ConfigDict, run: Run, fit: Fit
) -> tuple[int | None, Fit | None]:
    """The fewest microbatches whose step probably fits, and what it takes if it was compiled.

    Temporary arrays are taken to grow with the images of a microbatch, and the rest to stay. A
    process that is one of several does not compile, which might wait for the others.
    """
    most = config.batch_size // run.mesh.devices.size
    choices = [n for n in range(config.accumulate + 1, most + 1) if most % n == 0]
    parts = config.accumulate
    for attempt in range(TRIES):
        excess = 2.0  # where the compiler told too little
        if isinstance(fit.wanted, int) and fit.temporary and fit.limit:
            room = fit.limit - (fit.wanted - fit.temporary)
            excess = fit.temporary / room if room > 0 else math.inf
        larger = [n for n in choices if n > parts]
        if not larger or math.isinf(excess):
            return None, None
        enough = [n for n in larger if n >= parts * excess]
        parts = enough[0] if enough and attempt < TRIES - 1 else larger[-1]
        if jax.process_count() > 1:
            return parts, None
        trial = config.copy_and_resolve_references()
        trial.accumulate = parts
        images = round(run.epoch * config.batch_size)
        fit = fit_of_step(assemble(trial, run.mesh, images))
        if fit.fits:
            return parts, fit
    return None, None


def abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh, patch: int) -> dict[str, Any]:
    """Shapes of what `data.pipeline.train_batches` makes on all hosts together, split by image.

    A token stands for `patch` x `patch` pixels.
    """
    augment = config.augment
    side = augment.global_size // patch
    images = {
        "global_views": ((2, augment.global_size, augment.global_size, 3), jnp.uint8),
        "local_views": ((augment.local_crops, *(augment.local_size,) * 2, 3), jnp.uint8),
        "mask": ((2, side, side), jnp.bool),
        "index": ((), jnp.int32),
        "corrupt": ((), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=split(mesh))
        for name, (shape, dtype) in images.items()
    }
