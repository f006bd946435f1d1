"""Compares what the evaluations compute with the golden numbers, at the tolerance of each array.

A part of the tests computes the expected arrays of its sections by their golden names, and asserts
that `differences` and `unnoticed` are empty.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(os.environ.get("SOP_GOLDEN_DIR", Path(__file__).parent / "golden"))


class Found(NamedTuple):
    """A computed array, and how far it may be from the expected one.

    Attributes:
        array: the numbers.
        tolerance: the largest difference that is allowed.
        absolute: whether the tolerance is absolute; it is relative to the largest magnitude of the
            expected array otherwise.
        share: the share of entries that may differ by more.
    """

    array: Any
    tolerance: float = 1e-4
    absolute: bool = False
    share: float = 0.0


def exact(array: Any) -> Found:
    """Returns a computed array that must be equal to the expected one."""
    return Found(array, 0.0, absolute=True)


def load(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a golden file by their names."""
    with np.load(FOLDER / name) as arrays:
        return dict(arrays)


def allowed(expected: np.ndarray, found: Found) -> float:
    """Returns the largest difference from the expected array that is allowed."""
    magnitude = 1.0 if found.absolute else float(np.abs(expected.astype(np.float64)).max())
    return found.tolerance * magnitude


def difference(key: str, expected: np.ndarray, found: Found) -> str | None:
    """Returns a message if a computed array is not as expected, or None."""
    got = np.asarray(found.array)
    if expected.shape != got.shape:
        return f"{key}: shape {got.shape}, expected {expected.shape}"
    if expected.dtype.kind in "US":
        return None if np.array_equal(expected, got) else f"{key}: {got}, expected {expected}"
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    wrong = int(np.sum(~(error <= allowed(expected, found))))  # NaN is wrong
    if wrong <= math.floor(found.share * error.size):
        return None
    return (
        f"{key}: {wrong} of {error.size} entries are off, by up to {np.nanmax(error):.2e}; allowed "
        f"{allowed(expected, found):.2e}"
    )


def differences(golden: Mapping[str, np.ndarray], numbers: Mapping[str, Found]) -> list[str]:
    """Returns a message for each computed array that is not as expected."""
    found = (difference(key, golden[key], numbers[key]) for key in numbers)
    return [message for message in found if message]


def moved(expected: np.ndarray, found: Found) -> np.ndarray:
    """Returns the expected array with one entry, or ten times the allowed share, off.

    Each is off by ten tolerances, or by at least 1 where the numbers must be equal.
    """
    if expected.dtype.kind in "US":
        return np.concatenate([expected[:-1], np.array(["another"])])
    changed = np.array(expected, np.float64)
    count = min(changed.size, max(1, math.ceil(10 * found.share * changed.size)))
    changed.reshape(-1)[-count:] += 10 * allowed(expected, found) or 1.0
    return changed


def unnoticed(golden: Mapping[str, np.ndarray], numbers: Mapping[str, Found]) -> list[str]:
    """Returns the names of the arrays where `moved` numbers pass as the expected ones."""
    return [
        key
        for key, found in numbers.items()
        if difference(key, moved(golden[key], found), found) is None
    ]
