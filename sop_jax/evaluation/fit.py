"""Supervised training for evaluations: one loop, which resumes exactly where it was interrupted.

A fit is a function of its problem and its seed only. Its state is saved to `unfinished/` in the
folder of the evaluation when it is interrupted, before the last validation, and every MINUTES
minutes, and the folder is removed when the evaluation is finished. With one process it is also
saved when images cannot be read or a validation fails.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float, Int, Key

from sop_jax.data.pipeline import Batches
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluation.task import Tools
from sop_jax.models import Params
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import check_split, host_rows, replicated, to_devices
from sop_jax.paths import write_whole
from sop_jax.training import checkpoint
from sop_jax.training.step import with_statistics

UNFINISHED = "unfinished"
MINUTES = 15.0  # between two saves
MAX_PENDING = 100  # the most steps whose losses are kept on the devices
IN_FLIGHT = 2  # the most steps that the host may be ahead of the devices
HOST_ONLY = ("index", "corrupt")  # the parts of a batch that the devices do not need
_NOTES = "notes.json"


@runtime_checkable
class Loss(Protocol):
    """The loss of a batch, which is one global array over all devices."""

    def __call__(
        self, params: Params, frozen: Params, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Params]:
        """Returns the loss, and parameters that are replaced instead of learnt.

        Args:
            params: the parameters that are learnt.
            frozen: the parameters that are not.
            batch: the arrays of a batch, images on the leading axis.
            key: the key of all draws of this step.

        Returns:
            The loss in float32, and the running statistics after the pass, nested as in `params`;
            {} if there are none.
        """


@runtime_checkable
class Validate(Protocol):
    """Measures parameters; all processes call it."""

    def __call__(
        self, params: Params, step: int, rows: Sequence[Mapping[str, Any]], /
    ) -> Mapping[str, Any]:
        """Returns numbers that JSON can hold, the same on all processes.

        Args:
            params: the parameters that are learnt, after `step` steps.
            step: the number of steps.
            rows: the rows of earlier validations.
        """


class Problem(NamedTuple):
    """What is learnt, and how.

    Attributes:
        init: maps a key to the initial parameters, except those that are pretrained.
        frozen: parameters that the loss uses and that do not change, replicated over the devices.
        loss: the loss.
        optimizer: the optimizer, with its schedules.
        steps: the number of steps.
        batch_size: the number of images per step, over all devices.
        batches: maps the step to start with and the rows of the global batch that this process
            makes to endless batches, as `data.labelled.labelled_batches` does.
        pretrained: initial parameters that exist already, replicated over the devices; they are
            copied.
        parts: the number of losses that `loss` is the sum of; rows have their mean.
    """

    init: Callable[[Key[Array, ""]], Params]
    frozen: Params
    loss: Loss
    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int
    batches: Callable[[int, list[int]], Batches]
    pretrained: Params = {}
    parts: int = 1


class FitState(NamedTuple):
    """The state that a step maps to the next one.

    Attributes:
        step: the number of steps done.
        params: the parameters that are learnt.
        opt_state: the state of the optimizer.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any


class Fitted(NamedTuple):
    """The result of a fit.

    Attributes:
        params: the final parameters.
        rows: a row for each validation: `step`; `loss`, the mean since the row before; and what the
            validation returned.
        corrupt: the records of all processes that could not be read.
    """

    params: Params
    rows: list[dict[str, Any]]
    corrupt: list[int]


class Notes(NamedTuple):
    """What is saved beside a state.

    Attributes:
        rows: the rows so far, see `Fitted`.
        corrupt: the records of all processes that could not be read.
        loss: the sum of the losses since the last row.
        losses: the number of these losses.
    """

    rows: list[dict[str, Any]]
    corrupt: list[int]
    loss: float
    losses: int


def fit(
    problem: Problem,
    tools: Tools,
    seed: int,
    every: int,
    validate: Validate,
    name: str = "",
) -> Fitted:
    """Trains to the end of a problem, from the saved state if there is one.

    All processes call it.

    Args:
        problem: what is learnt, and how.
        tools: the tools of the evaluation.
        seed: the seed of the initial parameters and of the draws of each step.
        every: the number of steps between two validations; the last step is always validated.
        validate: measures the parameters; it may raise Interrupted.
        name: distinguishes the fits of an evaluation that has several. A fit with a name is saved
            when it is finished, so that it is not repeated if a later one is interrupted.

    Raises:
        UserError: the devices do not divide the batch, or the loss is not finite.
        Interrupted: the command was asked to stop; the state is saved.
    """
    mesh = tools.mesh
    check_split(mesh, problem.batch_size)
    key = jax.random.key(seed)
    everywhere = replicated(mesh)

    def init(key: Key[Array, ""], pretrained: Params) -> FitState:
        # Copies, because a step reuses the memory of the parameters that it is given.
        params = {**jax.tree.map(jnp.copy, pretrained), **problem.init(key)}
        return FitState(jnp.zeros((), jnp.int32), params, problem.optimizer.init(params))

    def step(
        state: FitState, frozen: Params, batch: Mapping[str, Array]
    ) -> tuple[FitState, Float[Array, ""]]:
        own = jax.random.fold_in(key, state.step)
        (loss, statistics), gradients = jax.value_and_grad(problem.loss, has_aux=True)(
            state.params, frozen, batch, own
        )
        updates, opt_state = problem.optimizer.update(gradients, state.opt_state, state.params)
        params = with_statistics(optax.apply_updates(state.params, updates), statistics)
        return FitState(state.step + 1, params, opt_state), loss

    compiled = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    saver = Saver(tools.folder / UNFINISHED / name if tools.folder else None)
    state, notes = saver.restore(jax.jit(init, out_shardings=everywhere), key, problem.pretrained)
    start = number = int(state.step)
    rows, corrupt = [*notes.rows], set(notes.corrupt)
    total, count = notes.loss, notes.losses
    losses: list[jax.Array] = []  # those that are not in the total

    def is_due(number: int) -> bool:
        """Whether a step is validated, and has not been."""
        due = number > 0 and (number % every == 0 or number == problem.steps)
        return due and (not rows or rows[-1]["step"] < number)

    def add_losses(number: int) -> None:
        """Adds the losses to the total, one by one, so that saving does not change the rounding."""
        nonlocal total, count
        for loss in _finite(losses, number):
            total += loss
        count += len(losses)
        losses.clear()

    def save(number: int) -> None:
        add_losses(number)
        saver.save(state, Notes(rows, _of_all(corrupt), total, count))

    @contextlib.contextmanager
    def saving(number: int) -> Iterator[None]:
        """Saves the state if there is an error; only with one process, because all have to save."""
        try:
            yield
        except Interrupted:
            raise
        except Exception:
            if number and tools.folder and jax.process_count() == 1:
                save(number)
                tools.note(f"step {number} of {problem.steps} is saved")
            raise

    def measure(number: int) -> None:
        nonlocal total, count
        add_losses(number)
        if number == problem.steps:
            save(number)
        with saving(number):
            scores = validate(state.params, number, rows)
        rows.append({"step": number, "loss": total / count / problem.parts, **scores})
        total, count = 0.0, 0
        tools.note(_row_text(rows[-1], problem.steps))

    if start == problem.steps and not is_due(start):
        saver.close()
        return Fitted(state.params, rows, notes.corrupt)
    if start:
        tools.note(f"continues after step {start} of {problem.steps}")
    batches = problem.batches(start, host_rows(mesh, problem.batch_size))
    try:
        with tools.progress(problem.steps, "step") as bar:
            bar.update(start)
            if is_due(start):  # its validation was interrupted
                measure(start)
            for number in range(start + 1, problem.steps + 1):
                with saving(number - 1):
                    made = next(batches)
                corrupt |= set(made["corrupt"][made["corrupt"] >= 0].tolist())
                batch = to_devices(
                    mesh, {name: x for name, x in made.items() if name not in HOST_ONLY}
                )
                state, loss = compiled(state, problem.frozen, batch)
                losses.append(loss)
                if len(losses) > IN_FLIGHT:
                    jax.block_until_ready(losses[-1 - IN_FLIGHT])
                bar.update(1)
                if len(losses) == MAX_PENDING:
                    add_losses(number)
                if is_due(number):
                    measure(number)
                if number < problem.steps and tools.between(saver.due()):
                    save(number)
            if name:
                save(number)
    except Interrupted as error:
        save(number)
        raise Interrupted(
            f"interrupted; step {number} of {problem.steps} is saved, and the same command "
            "resumes from there"
            if tools.folder
            else "interrupted; nothing is saved, because nothing can be written"
        ) from error
    finally:
        batches.close()
        saver.close()
    return Fitted(state.params, rows, _of_all(corrupt))


class Saver:
    """Saves the state of a fit; without a folder it does nothing."""

    def __init__(self, folder: epath.Path | None) -> None:
        self.folder, self.checkpoints = folder, None
        self._saved, self._newest = time.monotonic(), 0
        self._notes: dict[str, Any] = {}  # of the newest checkpoint and of the one being written
        if folder is not None:
            self.checkpoints = checkpoint.Checkpoints(folder, keep_last=1)

    def restore(self, init: Any, key: Key[Array, ""], pretrained: Params) -> tuple[FitState, Notes]:
        """Returns the saved state and its notes, or a new state."""
        newest = checkpoint.latest_step(self.folder) if self.folder else None
        self._newest = newest = hosts.agree(newest or 0)
        if not newest or self.folder is None:
            return init(key, pretrained), Notes([], [], 0.0, 0)
        shapes = jax.eval_shape(init, key, pretrained)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            shapes,
        )
        self._notes = json.loads((self.folder / _NOTES).read_text())
        state = checkpoint.restore(self.folder, abstract, newest)
        return state, Notes(**self._notes[str(newest)])

    def due(self) -> bool:
        """Returns whether it is time to save; always False in processes other than the first."""
        return hosts.is_first() and time.monotonic() - self._saved > 60 * MINUTES

    def save(self, state: FitState, notes: Notes) -> None:
        """Saves the state, after its notes."""
        if self.checkpoints is None or self.folder is None:
            return
        step, newest = int(state.step), str(self._newest)
        kept = {newest: self._notes[newest]} if newest in self._notes else {}
        self._notes = kept | {str(step): {**notes._asdict(), "rows": [*notes.rows]}}
        if hosts.is_first():
            write_whole(self.folder / _NOTES, json.dumps(self._notes) + "\n")
        if step > self._newest:
            self._newest = step
            self.checkpoints.save(step, state)
            self.checkpoints.wait()
        self._saved = time.monotonic()

    def close(self) -> None:
        """Frees what the checkpoints use."""
        if self.checkpoints is not None:
            self.checkpoints.close()


def _of_all(records: set[int]) -> list[int]:
    """Returns the records that any of the processes has, ascending."""
    found = hosts.gather(json.dumps(sorted(records)))
    return sorted({record for text in found for record in json.loads(text)})


def _finite(losses: list[jax.Array], step: int) -> list[float]:
    """Returns the losses, after checking that they are finite."""
    values = np.array(jax.device_get(losses), np.float64)
    if not np.isfinite(values).all():
        raise UserError(
            f"the loss is not finite at or before step {step}; try a lower learning rate"
        )
    return values.tolist()


def _row_text(row: Mapping[str, Any], steps: int) -> str:
    numbers = [
        f"{name} {value:.4g}"
        for name, value in row.items()
        if isinstance(value, float) and math.isfinite(value)
    ]
    return f"step {row['step']}/{steps}  " + "  ".join(numbers)
