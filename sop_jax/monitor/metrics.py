"""The curves of a run: `metrics.jsonl`, a tracker, and the progress on the screen."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import tqdm
from etils import epath

from sop_jax.monitor.trackers import Board, Open, Tracker
from sop_jax.paths import write_whole

Scalar = float | int | str | None

_FILE = "metrics.jsonl"
_REMOTE_INTERVAL = 60.0  # seconds between two writes of a remote file
_WORTH_TELLING = 60.0  # seconds; a shorter time left is not announced
_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))


class Writer:
    """Writes one row per logged step; only the first process of a run creates one."""

    def __init__(
        self,
        workdir: epath.PathLike,
        resume_step: int = 0,
        tracker: Open = Board,
        note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        """Opens the files of a run, and its tracker.

        Rows of later steps than `resume_step`, which a killed run may have left, and incomplete
        lines are dropped, so that every step has only one row.

        Args:
            workdir: the folder of the run, local or remote (`gs://`).
            resume_step: the step from which the run resumes; 0 starts the files anew.
            tracker: opens the tracker. If it lacks steps before `resume_step`, it gets them.
            note: reports that the tracker has failed, which does not end the run.

        Raises:
            UserError: the tracker cannot be opened.
        """
        self._path = epath.Path(workdir) / _FILE
        self._remote = "://" in str(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        before = read_metrics(workdir)
        logged = max((row["step"] for row in before), default=-1)
        self._note = note
        self._tracker: Tracker | None = tracker(self._path.parent, resume_step, logged)
        self._tracked = self._tracker.has
        self._rows = [row for row in before if row["step"] <= resume_step > 0]
        self._last_step = self._rows[-1]["step"] if self._rows else -1
        self._rewrite()
        self._file = None if self._remote else self._path.open("a")
        for row in self._rows:
            self._track(row)

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Adds a row.

        Args:
            step: the step, which must be later than that of the last row.
            scalars: the values by name; None and numbers that are not finite become null.

        Raises:
            ValueError: `step` is not later than that of the last row.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step {step} cannot be written after step {self._last_step}: expected a later "
                "step, since each step has one row"
            )
        self._last_step = step
        row = {"step": step} | {name: _finite_or_none(value) for name, value in scalars.items()}
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        else:
            self._rows.append(row)
            if time.monotonic() - self._written >= _REMOTE_INTERVAL:
                self._rewrite()
        self._track(row)

    def flush(self) -> None:
        """Makes sure that all rows are stored where a later run finds them."""
        if self._remote:
            self._rewrite()

    def close(self, write: bool = True) -> None:
        """Closes the files.

        Args:
            write: whether to write what remains; False if another run now owns the workdir.
        """
        if self._file:
            self._file.close()
        elif write:
            self._rewrite()
        if self._tracker is not None:
            self._guard(self._tracker.close)

    def _track(self, row: Mapping[str, Any]) -> None:
        """Passes a row on to the tracker, unless the tracker has it or has failed."""
        step, tracker = row["step"], self._tracker
        if tracker is None or step <= self._tracked:
            return
        numbers = {k: x for k, x in row.items() if k != "step" and isinstance(x, int | float)}
        self._guard(lambda: tracker.log(step, numbers))

    def _guard(self, act: Callable[[], None]) -> None:
        """Does something with the tracker, which is not used any more if that fails."""
        try:
            act()
        except Exception as error:  # of any library; metrics.jsonl has the rows
            self._tracker = None
            self._note(
                f"the tracker has failed and gets no more rows, {self._path} does: "
                f"{type(error).__name__}: {error}"
            )

    def _rewrite(self) -> None:
        """Puts the rows in place of the file."""
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))
        self._written = time.monotonic()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of `metrics.jsonl` in the order of the file, without incomplete lines."""
    path = epath.Path(workdir) / _FILE
    if not path.exists():
        return []
    rows = (_parse(line) for line in path.read_bytes().split(b"\n"))
    return [row for row in rows if row is not None]


class Progress:
    """The progress of a run on stderr: a bar on a terminal, else a line per logged step."""

    def __init__(self, step: int, steps: int, shown: bool = True) -> None:
        """Starts to show the progress.

        Args:
            step: the number of steps done.
            steps: the number of steps of the run.
            shown: False shows nothing, for all processes except the first.
        """
        self._first, self._steps, self._start = step, steps, 0.0
        self._lines = shown and not sys.stderr.isatty()
        self._on_bar = shown and not self._lines
        self._bar = tqdm.tqdm(
            total=steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not shown or self._lines,
        )
        self._shown: dict[str, float | str] = {}
        self._done, self._told = step, False  # whether the time left has been shown

    def advance(self) -> None:
        """Counts a step that has ended.

        Where there is no bar, the second step shows the time left, unless a line has shown it.
        """
        self._done += 1
        if not self._start:  # the first step, which compiles, does not count for the time left
            self._first, self._start = self._done, time.monotonic()
        elif self._lines and not self._told:
            self._told = True
            each = (time.monotonic() - self._start) / (self._done - self._first)
            left = each * (self._steps - self._done)
            if left >= _WORTH_TELLING:
                self._print(
                    f"about {time_text(left)} left, at {time_text(each)} per step, not counting "
                    "evaluations"
                )
        self._bar.update()

    def show(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Shows values, such as the loss and images/s, beside the time left.

        On a terminal, values stay until they are replaced. Values of None are left out.
        """
        fresh = {
            name: value if isinstance(value, str) else f"{value:.4g}"
            for name, value in scalars.items()
            if value is not None
        }
        self._shown.update(fresh)
        self._bar.set_postfix(self._shown, refresh=False)
        if self._lines:
            self._told = self._told or step > self._first
            values = "  ".join(f"{name} {value}" for name, value in fresh.items())
            self._print(f"step {step}/{self._steps}  {values}  {self._time_left(step)} left")

    def note(self, text: str) -> None:
        """Prints a message on a line of its own, above the bar if there is one."""
        if self._lines:
            self._print(text)
        elif self._on_bar:
            self._bar.write(text, file=sys.stderr)  # also after `close`

    def close(self) -> None:
        """Leaves the bar as it is and moves to the next line."""
        self._bar.close()

    def _time_left(self, step: int) -> str:
        if step <= self._first:
            return "?"
        each = (time.monotonic() - self._start) / (step - self._first)
        return tqdm.tqdm.format_interval(each * (self._steps - step))

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def time_text(seconds: float) -> str:
    """Returns a duration in a suitable unit, such as "3.2 h"."""
    unit, size = next((pair for pair in _UNITS if seconds >= pair[1]), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _finite_or_none(value: Scalar) -> Scalar:
    return None if isinstance(value, float) and not math.isfinite(value) else value
