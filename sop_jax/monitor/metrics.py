"""The curves of a run: `metrics.jsonl`, TensorBoard events, and the progress on the screen."""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import tensorboardX
import tqdm
from etils import epath

from sop_jax.paths import write_whole

Scalar = float | int | str | None

_FILE = "metrics.jsonl"
_REMOTE_INTERVAL = 60.0  # seconds
_WORTH_TELLING = 60.0  # seconds left
_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
_BOARD_INTERVAL = 5  # seconds; a killed run loses as much of its TensorBoard curves


class Writer:
    """Writes one row per logged step; only one process of a run makes one.

    Opens the curves of a run that goes on after `resume_step`; 0 starts them anew. Rows of later
    steps, which a killed run may have left, and broken lines are dropped, so that every step has
    one row.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int = 0) -> None:
        self._path = epath.Path(workdir) / _FILE
        self._remote = "://" in str(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = [row for row in read_metrics(workdir) if row["step"] <= resume_step > 0]
        self._last_step = self._rows[-1]["step"] if self._rows else -1
        self._rewrite()
        self._file = None if self._remote else self._path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(self._path.parent / "tensorboard"),
            purge_step=resume_step + 1 if resume_step else 0,
            flush_secs=_BOARD_INTERVAL,
            filename_suffix=f".{resume_step}",  # two runs may start in the same second
        )

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Adds the row of `step`: None and numbers that are not finite become null.

        Raises:
            ValueError: `step` is not later than that of the last row.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}: a step is one row")
        self._last_step = step
        row = {"step": step} | {name: _finite_or_none(value) for name, value in scalars.items()}
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        else:
            self._rows.append(row)
            if time.monotonic() - self._written >= _REMOTE_INTERVAL:
                self._rewrite()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes sure that every row is where a later run finds it."""
        if self._remote:
            self._rewrite()

    def close(self, write: bool = True) -> None:
        """Closes the files; writes what is left, unless the workdir is now another run's."""
        if self._file:
            self._file.close()
        elif write:
            self._rewrite()
        self._board.close()

    def _rewrite(self) -> None:
        """Puts the rows in place of the file."""
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))
        self._written = time.monotonic()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` in the order of their writing, without broken lines."""
    path = epath.Path(workdir) / _FILE
    if not path.exists():
        return []
    rows = (_parse(line) for line in path.read_bytes().split(b"\n"))
    return [row for row in rows if row is not None]


class Progress:
    """The progress of a run on stderr: a bar on a terminal, a line a logged step elsewhere."""

    def __init__(self, step: int, steps: int, shown: bool = True) -> None:
        """Starts at `step` of `steps`; `shown=False` (all processes but the first) is silent."""
        self._first, self._steps, self._start = step, steps, 0.0
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not shown or self._lines,
        )
        self._shown: dict[str, float | str] = {}
        self._done, self._told = step, False  # that the time left was shown

    def advance(self) -> None:
        """Counts one step that has ended; after the second one says how long the rest will take.

        Where lines are shown, that is, and unless one of them has said so.
        """
        self._done += 1
        if not self._start:  # the time left is judged by what comes after the first step
            self._first, self._start = self._done, time.monotonic()
        elif self._lines and not self._told:
            self._told = True
            each = (time.monotonic() - self._start) / (self._done - self._first)
            left = each * (self._steps - self._done)
            if left >= _WORTH_TELLING:
                self._print(
                    f"about {in_words(left)} left, at {in_words(each)} a step and without the "
                    "evaluations"
                )
        self._bar.update()

    def show(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Shows these values, such as the loss and images/s, beside the time left.

        On a terminal they stay until replaced; None is left out.
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
        """Prints a line of its own, above the bar where there is one."""
        if self._lines:
            self._print(text)
        elif not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands and goes to the next line."""
        self._bar.close()

    def _time_left(self, step: int) -> str:
        if step <= self._first:
            return "?"
        each = (time.monotonic() - self._start) / (step - self._first)
        return tqdm.tqdm.format_interval(each * (self._steps - step))

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """A duration in the unit that suits it, such as 3.2 h."""
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
