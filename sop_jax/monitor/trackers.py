"""Where the curves of a run are drawn: TensorBoard, or Weights & Biases."""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from etils import epath

from sop_jax.errors import UserError
from sop_jax.paths import write_whole

_BOARD_INTERVAL = 5  # seconds of TensorBoard curves that a killed run loses at most
_FILE = "wandb.json"


@runtime_checkable
class Tracker(Protocol):
    """Curves of a run; only the first process of a run has one.

    Attributes:
        has: the last step that it has from earlier; -1 if it has none. Rows up to that step must
            not be logged again.
    """

    has: int

    def log(self, step: int, scalars: Mapping[str, int | float]) -> None:
        """Adds the numbers of a step; steps ascend."""

    def close(self) -> None:
        """Stores what remains."""


@runtime_checkable
class Open(Protocol):
    """Opens a tracker."""

    def __call__(self, workdir: epath.Path, resume_step: int, last_step: int) -> Tracker:
        """Returns the tracker of a run.

        Args:
            workdir: the folder of the run.
            resume_step: the step from which the run resumes; 0 starts the curves anew.
            last_step: the last step that an earlier process of the run has logged, which can be
                later than `resume_step`; -1 if there is none.

        Raises:
            UserError: it cannot be opened.
        """


class Board:
    """Event files for TensorBoard, in `tensorboard/`."""

    def __init__(self, workdir: epath.Path, resume_step: int, last_step: int) -> None:
        import tensorboardX  # this module is also imported by commands that draw no curves

        folder = workdir / "tensorboard"
        # Later steps than `resume_step` are purged, and then logged again.
        self.has = resume_step if resume_step and any(folder.glob("events.*")) else -1
        self._board = tensorboardX.SummaryWriter(
            str(folder),
            purge_step=resume_step + 1 if resume_step else 0,
            flush_secs=_BOARD_INTERVAL,
            filename_suffix=f".{resume_step}",  # two runs may start in the same second
        )
        events: Any = self._board.file_writer.event_writer
        self._events = _Events(events._ev_writer)
        events._ev_writer = events._worker._record_writer = self._events

    def log(self, step: int, scalars: Mapping[str, int | float]) -> None:
        """Adds one event per number; raises the error of an earlier one that was not written."""
        if self._events.error:
            raise self._events.error
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file; raises the error of an event that was not written."""
        self._board.close()
        if self._events.error:
            raise self._events.error


class _Events:
    """Event files that keep their first error, after which they write no more.

    tensorboardX writes in a thread. If the disk is full, that would end, and the thread that adds
    events would wait for it for ever.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.error: Exception | None = None

    def write_event(self, event: Any) -> None:
        self._try(lambda: self._writer.write_event(event))

    def flush(self) -> None:
        self._try(self._writer.flush)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, act: Callable[[], object]) -> None:
        if self.error is None:
            try:
                act()
            except Exception as error:  # each kind of storage raises its own
                self.error = error


class Wandb:
    """A run of Weights & Biases, which wandb.json in the workdir names.

    Its project is `sop_jax`, and its name that of the workdir, unless the environment variables
    WANDB_PROJECT and WANDB_NAME say otherwise; wandb reads other variables, such as WANDB_MODE.
    """

    def __init__(
        self, workdir: epath.Path, resume_step: int, last_step: int, settings: Mapping[str, Any]
    ) -> None:
        wandb: Any = importlib.import_module("wandb")
        known = _run_id(workdir) if resume_step else None
        # A run cannot go back: what it has of steps after `resume_step` stays.
        self.has = -1 if known is None else last_step
        own = {} if "://" in str(workdir) else {"dir": str(workdir)}
        try:
            self._run = wandb.init(
                id=known,
                resume="allow" if known else None,
                project=os.environ.get("WANDB_PROJECT", "sop_jax"),
                name=os.environ.get("WANDB_NAME", workdir.name),
                config=dict(settings),
                **own,
            )
        except Exception as error:  # wandb has many of its own, such as for a missing key
            raise UserError(
                f"Weights & Biases cannot start: {error}. Run wandb login, set WANDB_MODE=offline, "
                "or use --config.tracker=tensorboard"
            ) from error
        content = {"id": self._run.id, "project": self._run.project, "url": self._run.url}
        write_whole(workdir / _FILE, json.dumps(content) + "\n")

    def log(self, step: int, scalars: Mapping[str, int | float]) -> None:
        """Adds the numbers as one row of the run."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Waits until everything is sent, or stored if wandb is offline."""
        self._run.finish()


def _run_id(workdir: epath.Path) -> str | None:
    """Returns the id of the run that an earlier process began; None if there is none."""
    try:
        found = json.loads((workdir / _FILE).read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


# By the name that `config.tracker` has, what opens a tracker with the settings of a run.
TRACKERS: dict[str, Callable[[Mapping[str, Any]], Open]] = {
    "tensorboard": lambda settings: Board,
    "wandb": lambda settings: (
        lambda workdir, resume_step, last_step: Wandb(workdir, resume_step, last_step, settings)
    ),
}


def check_tracker(name: str) -> None:
    """Checks that the package of a tracker is installed.

    Raises:
        UserError: it is not.
    """
    if name == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "tracker=wandb needs wandb, which is not installed; run: pip install wandb (or pip "
            "install -e '.[wandb]'), or use --config.tracker=tensorboard"
        )
