"""The parts of a run that follow from its config and mesh: the step, and all shardings."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key

from sop_jax.compiled.device_memory import Fit, compile_and_compare, in_gib
from sop_jax.compiled.flops import count
from sop_jax.errors import UserError
from sop_jax.models import FAMILIES, Model, build, has_batch_norm, size_of, token_side
from sop_jax.models.attention import Implementation, choose
from sop_jax.objectives.methods import method_of
from sop_jax.objectives.objective import Objective
from sop_jax.parallel.mesh import (
    check_split,
    gatherer,
    replicated,
    shardings,
    split,
    with_shardings,
)
from sop_jax.rules import MAX_STEPS
from sop_jax.schedules import Schedule, run_length
from sop_jax.training import optim
from sop_jax.training.state import TrainState, init_state
from sop_jax.training.step import Batch, make_train_step

TRIES = 4  # the number of steps that are compiled to find one that fits


class Run(NamedTuple):
    """The parts of a run that are known before any array is allocated.

    Attributes:
        mesh: the devices.
        model: the network of student and teacher.
        objective: the targets, losses and signs of health.
        schedules: the schedules of the optimizer and the teacher, see `optim.schedules`.
        steps: the number of steps to train for.
        epoch: the number of steps per epoch.
        init: maps a key to the state before the first step, sharded as `abstract` is.
        abstract: the shapes and shardings of the state.
        batch: the shapes and shardings of a global batch.
        train_step: the jitted step, see `make_train_step`; it donates the state.
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
    train_step: jax.stages.Wrapped


def assemble(config: ml_collections.ConfigDict, mesh: Mesh, images: int) -> Run:
    """Returns the parts of the run of a config on a mesh.

    Args:
        config: the config of the run, see `sop_jax.config`.
        mesh: the devices, which may be descriptions of absent ones.
        images: the number of images in the training set.

    Raises:
        UserError: the devices do not divide the batch, or do not support the chosen attention.
    """
    check_split(mesh, config.batch_size, config.accumulate)
    length = run_length(config, images)
    if length.steps > MAX_STEPS:
        raise UserError(
            f"the run has {length.steps:.3g} steps; expected at most {MAX_STEPS}, because a state "
            "counts them in int32; choose fewer with --config.epochs or --config.steps"
        )
    device, implementation = mesh.devices.flat[0], attention_of(config, mesh.devices.flat[0])
    unroll = unrolls(config.model, device)
    model = build(config, config.augment.global_size, gatherer(mesh), implementation, unroll)
    batch = abstract_batch(config, mesh, model.patch)
    grid = batch["mask"].shape[2:]
    objective = method_of(config).build(config, model.dim, mesh, length, grid)
    schedules = optim.schedules(config, length)
    tx = optim.optimizer(config.optim, schedules, objective.optimizers)

    def init(key: Key[Array, ""]) -> TrainState:
        return init_state(key, model, objective, tx)

    abstract = with_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    where = shardings(abstract)
    step = make_train_step(model, objective, tx, schedules, config.accumulate)

    def train_step(
        state: TrainState, batch: Batch, measure: Bool[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        # Layers are told how many devices there are, see `linear.group_size`.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, batch, measure)

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
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(where, replicated(mesh))),
    )


def attention_of(config: ml_collections.ConfigDict, device: Any) -> Implementation:
    """Returns the implementation of attention that a run uses on its devices.

    Raises:
        UserError: cuDNN's implementation is requested but does not work on the device.
    """
    if not FAMILIES[config.model.family].cudnn:
        return "xla"
    size, patch, augment = size_of(config.model), token_side(config.model), config.augment
    tokens = [
        1 + config.model.registers + (side // patch) ** 2
        for side in (augment.global_size, augment.local_size)
    ]
    return choose(config.model, size.width // size.heads, device, tokens)


def unrolls(model: ml_collections.ConfigDict, device: Any) -> bool:
    """Whether the layers of a run's network are unrolled; `auto` does so on GPUs."""
    if model.unroll == "auto":
        return device.platform == "gpu" and model.remat != "full"
    return model.unroll == "yes"


def traced_step(run: Run) -> Any:
    """Returns the step traced for the shapes of the run, not yet compiled."""
    measure = jax.ShapeDtypeStruct((), jnp.bool, sharding=replicated(run.mesh))
    return run.train_step.trace(run.abstract, run.batch, measure)


def model_flops(config: ml_collections.ConfigDict, run: Run) -> float:
    """Returns the operations of a step's matrix products, without those that are done twice.

    The backward pass repeats some of the forward pass to save memory (`model.remat`), which is no
    progress. Utilisation is the share of a device's peak that the other operations take.
    """
    whole = config.copy_and_resolve_references()
    whole.model.remat, whole.model.attention = "none", "xla"
    images = round(run.epoch * config.batch_size)
    return count(traced_step(assemble(whole, run.mesh, images)).jaxpr)


def compiled_step(
    config: ml_collections.ConfigDict, run: Run, note: Callable[[str], Any]
) -> Callable[..., Any]:
    """Returns the compiled step, which needs no batch to be compiled.

    Args:
        config: the config of the run.
        run: the run, assembled from it.
        note: shows a message about work that takes long.

    Raises:
        UserError: the step needs more memory than the devices have; the message names settings
            that would fit.
    """
    fit = fit_of_step(run)
    if fit.fits is False:
        raise UserError(too_large(config, run, fit, note))
    assert fit.compiled is not None
    return fit.compiled


def fit_of_step(run: Run) -> Fit:
    """Compiles the step, and compares the memory that it needs with that of the devices."""
    return compile_and_compare(traced_step(run).lower(), list(run.mesh.devices.flat))


def too_large(
    config: ml_collections.ConfigDict, run: Run, fit: Fit, note: Callable[[str], Any]
) -> str:
    """Returns a message that the step does not fit, which names settings that would."""
    limit = "" if fit.limit is None else f", more than the {in_gib(fit.limit)} available"
    words = f"the train step needs {in_gib(fit.wanted)} of memory per device{limit}"
    note(f"{words}; looking for a smaller one that fits ...")
    parts, found = smaller_step(config, run, fit)
    remat = [] if config.model.remat == "full" else ["--config.model.remat=full"]
    if parts is None:
        return (
            f"{words}, and it would not fit with one image per device at a time either. Try "
            + ", ".join([*remat, "a smaller model", "smaller images"])
            + ", or more devices with --config.mesh.fsdp"
        )
    smaller = config.batch_size * config.accumulate // parts
    sure = f"{in_gib(found.wanted)} when compiled" if found else "by estimate"
    changes = ", each normalized by itself" if has_batch_norm(config) else ""
    return (
        f"{words}. These would fit ({sure}): --config.accumulate={parts}, which splits the same "
        f"batch of {config.batch_size} into {parts} microbatches{changes}, or "
        f"--config.batch_size={smaller}, which learns from fewer images per step"
        + "".join(f". {setting} also needs less memory" for setting in remat)
    )


def smaller_step(
    config: ml_collections.ConfigDict, run: Run, fit: Fit
) -> tuple[int | None, Fit | None]:
    """Returns the smallest number of microbatches whose step fits, and its memory if compiled.

    The estimate assumes that only temporary arrays grow with the images of a microbatch. A run of
    several processes returns the first estimate without compiling it, which might wait for the
    other processes.

    Args:
        config: the config of the run.
        run: the run, assembled from it.
        fit: the memory of its step, which does not fit.

    Returns:
        The number of microbatches, None if nothing was found that fits; and the memory of the step
        with that number, None if it was not compiled.
    """
    most = config.batch_size // run.mesh.devices.size
    choices = [n for n in range(config.accumulate + 1, most + 1) if most % n == 0]
    parts = config.accumulate
    for attempt in range(TRIES):
        excess = 2.0  # a guess, for when the compiler names too few numbers
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
    """Returns the shapes and shardings of a global batch, see `data.pipeline.train_batches`.

    Args:
        config: the config of the run.
        mesh: the devices, over which images are split.
        patch: the pixels on each side of a patch, for which a token stands.
    """
    augment = config.augment
    side, count = augment.global_size // patch, augment.global_crops
    images = {
        "global_views": ((count, augment.global_size, augment.global_size, 3), jnp.uint8),
        "local_views": ((augment.local_crops, *(augment.local_size,) * 2, 3), jnp.uint8),
        "mask": ((count, side, side), jnp.bool),
        "index": ((), jnp.int32),
        "corrupt": ((), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=split(mesh))
        for name, (shape, dtype) in images.items()
    }
