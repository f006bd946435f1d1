"""Exceptions that the commands report without a traceback, and suggestions for mistyped names."""

import difflib
import errno
from collections.abc import Iterator, Sequence

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
    """A process or storage that the run needs fails. A restart may succeed; the code is LOST."""


class Unreachable(Lost):
    """Data that existed when the run started can no longer be reached."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, and those that led to it."""
    yield error
    following = error.__cause__ or error.__context__
    if following is not None:
        yield from chain(following)


def is_full_disk(error: BaseException) -> bool:
    """Returns whether an error is due to a full disk or a quota that is used up."""
    words = ("no space left on device", "disk quota exceeded")  # as TensorStore reports it
    return any(
        (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(text in str(link).lower() for text in words)
        for link in chain(error)
    )


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
