"""Exceptions that the commands report without a traceback, and suggestions for mistyped names."""

import difflib
from collections.abc import Sequence

LOST = 75  # exit code when a process or the data is lost; the same command resumes the run


class UserError(Exception):
    """An error that the user can fix.

    The message says what was wrong, what was expected and what to do.
    """


class Interrupted(UserError):
    """A run was asked to stop and has stopped, with its state saved if anything was trained.

    Attributes:
        together: whether all processes of the run stop at the same point; if not, the others must
            be notified.
    """

    def __init__(self, message: str, together: bool = True) -> None:
        super().__init__(message)
        self.together = together


class Lost(UserError):
    """A process that the run needs is gone. A restart may succeed; the exit code is LOST."""


class Unreachable(Lost):
    """Data that existed when the run started can no longer be reached."""


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Suggests what a mistyped name was probably meant to be.

    Names are compared as a whole and by their last dotted part.

    Args:
        name: the name that was given.
        known: the valid names.
        prefix: put before the suggested name.

    Returns:
        A question to append to a message, or an empty string if no valid name is similar.
    """

    def likeness(candidate: str) -> tuple[float, float]:
        whole = _ratio(name, candidate)
        return max(whole, _ratio(name.split(".")[-1], candidate.split(".")[-1])), whole

    best = max(known, key=likeness, default="")
    return f"; did you mean {prefix}{best}?" if best and likeness(best)[0] >= 0.6 else ""


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
