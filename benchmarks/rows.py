"""Finished measurements as rows of a JSONL file, and the recipes and digests that identify them."""

import hashlib
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from sop_jax.check import without_use
from sop_jax.config import later_settings
from sop_jax.errors import UserError
from sop_jax.paths import check_writable
from sop_jax.settings import flatten

ROOT = Path(__file__).resolve().parent.parent

# The newest version that changed what equal settings compute. Rows are keyed by it, so that they
# count until a later version computes something else; set it to that version then.
COMPUTES = "0.5.0"


def recipe(method: str) -> ml_collections.ConfigDict:
    """Returns the config of a method for the digits."""
    return recipe_of("digits.py" if method == "sop" else f"digits_{method}.py")


def recipe_of(file: str) -> ml_collections.ConfigDict:
    """Returns the config of a file in configs/."""
    return runpy.run_path(str(ROOT / "configs" / file))["get_config"]()


def settings_digest(config: ml_collections.ConfigDict) -> str:
    """Returns a digest of the settings that have an effect on a run, except its seed.

    Settings newer than COMPUTES are not in it as long as runs compute the same as before them.
    """
    idle, newer = without_use(config), later_settings(COMPUTES)
    used = {
        name: value
        for name, value in flatten(config).items()
        if name != "seed" and name not in idle and not (name in newer and newer[name] == value)
    }
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:12]


def read(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows that are finished; none if there is no file.

    Args:
        out: the file.
        names: the values that every row has, by which it is known.

    Raises:
        UserError: it is a folder, or a line is not a row, such as one that was not written to its
            end.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; expected a file of rows, such as {out}/rows.jsonl")
    rows = []
    for i, line in enumerate(out.read_text().splitlines() if out.exists() else (), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= set(names):
            raise UserError(
                f"line {i} of {out} is not a row: expected a JSON object with {', '.join(names)}. "
                "Delete the line, and what it was about is measured again"
            )
        rows.append(row)
    return rows


def check_out(out: Path) -> None:
    """Raises UserError if rows cannot be added to a file, before anything is measured."""
    check_writable(out.parent, "--out")


def append(out: Path, row: Mapping[str, Any]) -> None:
    """Adds a row."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as file:
        file.write(json.dumps(row) + "\n")


def has(rows: list[dict[str, Any]], key: Mapping[str, Any]) -> bool:
    """Returns whether one of the rows has all values of a key."""
    return any(key.items() <= row.items() for row in rows)
