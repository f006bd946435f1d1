"""The exceptions that the commands show to people without a traceback, and a word of help."""

import difflib
from collections.abc import Sequence

LOST = 75  # the exit code where a process or the data is gone: the same command goes on


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    The message says what was wrong, what was expected and what to do.
    """


class Interrupted(UserError):
    """A run that was asked to stop has stopped, with its state saved if anything was trained.

    Attributes:
        together: whether all processes of the run stop at the same place; else they must be told.
    """

    def __init__(self, message: str, together: bool = True) -> None:
        super().__init__(message)
        self.together = together


class Lost(UserError):
    """A process that a run needs is gone. A new start may do better: the exit code is LOST."""


class Unreachable(Lost):
    """Data that was there cannot be reached."""


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """A question naming what was probably meant, by the whole name or by its last part.

    Args:
        name: what was given.
        known: what it could have been.
        prefix: put before the known name in the question.

    Returns:
        The question, to be appended to a message; empty if nothing known is similar.
    """

    def likeness(candidate: str) -> tuple[float, float]:
        whole = _ratio(name, candidate)
        return max(whole, _ratio(name.split(".")[-1], candidate.split(".")[-1])), whole

    best = max(known, key=likeness, default="")
    return f"; did you mean {prefix}{best}?" if best and likeness(best)[0] >= 0.6 else ""


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
