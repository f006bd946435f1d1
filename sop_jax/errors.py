"""The exceptions that the commands show to people without a traceback, and a word of help."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    The message says what was wrong, what was expected and what to do.
    """


class Interrupted(UserError):
    """A run that was asked to stop has saved its state and stopped."""


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
