"""The parts of a run that follow from its config: the step, and where each array lies."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Key

from sop_jax import optim
from sop_jax.data.masks import most_masked
from sop_jax.mesh import check_split, gatherer, placed, replicated, shardings, split
from sop_jax.models import Model, build, size_of
from sop_jax.models.attention import Implementation, choose
from sop_jax.sop.objective import Objective, sop
from sop_jax.state import TrainState, init_state
from sop_jax.step import make_train_step


class Run(NamedTuple):
    """What is known of a run before anything is allocated.

    Attributes:
        mesh: the devices.
        model: the network of student and teacher.
        objective: memories, prototypes, losses.
        schedules: everything that changes with the step, see `optim.schedules`.
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
    schedules: dict[str, optim.Schedule]
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
    steps, epoch = optim.run_length(config, images)
    schedules = optim.schedules(config, steps, epoch)
    tx = optim.optimizer(config.optim, schedules)
    implementation: Implementation = "xla"
    if config.model.family == "vit":
        width, _, heads = size_of(config.model)
        implementation = choose(config.model, width // heads, mesh.devices.flat[0])
    model = build(config, config.augment.global_size, gatherer(mesh), implementation)
    objective = sop(config, model.dim, mesh)

    def init(key: Key[Array, ""]) -> TrainState:
        return init_state(key, model, objective, tx)

    abstract = placed(jax.eval_shape(init, jax.random.key(0)), mesh)
    where = shardings(abstract)
    batch = abstract_batch(config, mesh, model.patch)
    most = most_masked(batch["mask"].shape[2:], config.mask) if config.sop.patch.tasks else 0
    step = make_train_step(model, objective, tx, schedules, config.accumulate, most)
    return Run(
        mesh=mesh,
        model=model,
        objective=objective,
        schedules=schedules,
        steps=steps,
        epoch=epoch,
        init=jax.jit(init, out_shardings=where),
        abstract=abstract,
        batch=batch,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(where, replicated(mesh))),
    )


def compiled_step(run: Run) -> Callable[..., Any]:
    """The step, compiled before there is a state: what does not fit is said at once."""
    measure = jax.ShapeDtypeStruct((), jnp.bool, sharding=replicated(run.mesh))
    step: Any = run.train_step
    return step.lower(run.abstract, run.batch, measure).compile()


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
