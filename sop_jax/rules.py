"""Rules for single settings: the values that a setting can have, and how messages describe them."""

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

FLOAT32 = np.finfo(np.float32)  # the type with which settings are used
MAX_STEPS = 2**31 - 1  # a state counts its steps in int32
LARGEST, SMALLEST = float(FLOAT32.max), float(FLOAT32.tiny)


class Rule(NamedTuple):
    """The values that a setting can have.

    Attributes:
        fits: maps a value to whether the setting can have it. Several values are a list.
        expected: describes these values in a sentence after the word "expected".
    """

    fits: Callable[[Any], bool]
    expected: str


def _is(value: Any, kind: type) -> bool:
    """Whether a value is a number of a kind, other than a truth value."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _between(least: int | float, most: int | float) -> str:
    return f"from {least:g} to {most}" if math.isfinite(most) else f"of {least:g} or more"


def whole(least: int, most: int | float = math.inf) -> Rule:
    """Returns the rule for whole numbers from `least` to `most`."""
    return Rule(
        lambda value: _is(value, Integral) and least <= value <= most,
        f"a whole number {_between(least, most)}",
    )


def number(least: int | float, most: int | float = math.inf) -> Rule:
    """Returns the rule for finite numbers from `least` to `most`."""
    return Rule(
        lambda value: _is(value, Real) and least <= value <= min(most, LARGEST),
        f"a finite number {_between(least, most)}",
    )


def positive(most: int | float = math.inf) -> Rule:
    """Returns the rule for numbers that are more than 0, in float32 too, and at most `most`."""
    return Rule(
        number(SMALLEST, most).fits,
        "a finite number greater than 0" + f" and at most {most:g}" * math.isfinite(most),
    )


def less_than(limit: int | float) -> Rule:
    """Returns the rule for numbers that are at least 0 and less than `limit`, in float32 too."""
    most = float(np.nextafter(np.float32(limit), np.float32(0)))
    return Rule(number(0, most).fits, f"a number of 0 or more and less than {limit:g}")


def one_of(choices: Iterable[str]) -> Rule:
    """Returns the rule for a choice among words."""
    known = tuple(choices)
    return Rule(lambda value: value in known, f"one of {', '.join(known)}")


def unset_or(rule: Rule) -> Rule:
    """Returns the rule for a setting that is unset or has a value that `rule` allows."""
    return Rule(lambda value: value is None or rule.fits(value), rule.expected)


def each(rule: Rule, count: int) -> Rule:
    """Returns the rule for exactly `count` values that `rule` allows."""
    return Rule(
        lambda values: (
            isinstance(values, list) and len(values) == count and all(map(rule.fits, values))
        ),
        f"{count} values, each {rule.expected}",
    )


def any_number_of(rule: Rule) -> Rule:
    """Returns the rule for no value, or values that `rule` allows."""
    return Rule(
        lambda values: isinstance(values, list) and all(map(rule.fits, values)),
        f"values, each {rule.expected}, or none",
    )


def some(rule: Rule) -> Rule:
    """Returns the rule for one or more values that `rule` allows."""
    return Rule(
        lambda values: isinstance(values, list) and len(values) > 0 and all(map(rule.fits, values)),
        f"one or more values, each {rule.expected}",
    )


def ascending(rule: Rule) -> Rule:
    """Returns the rule for the two ends of a range, the lower one first, that `rule` allows."""
    pair = each(rule, 2)
    return Rule(
        lambda values: pair.fits(values) and values[0] <= values[1],
        f"the lower and the upper end of a range, in that order, each {rule.expected}",
    )


TRUTH = Rule(lambda value: isinstance(value, bool), "true or false")
TEXT = Rule(lambda value: isinstance(value, str), "a string")
COUNT = whole(1)
COUNT_OR_ZERO = whole(0)
POSITIVE = positive()
NOT_NEGATIVE = number(0)
SHARE = number(0, 1)
STEPS = whole(0, MAX_STEPS)
