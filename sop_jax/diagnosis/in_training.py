"""The count of unique prototypes that a run records at its evaluations, cheaply."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from sop_jax.diagnosis import uniqueness
from sop_jax.diagnosis.diagnosis import Result
from sop_jax.diagnosis.spread import Spread
from sop_jax.diagnosis.subjects import make_reader, names_of
from sop_jax.training.assemble import Run
from sop_jax.training.state import OWN, TrainState


def make_counter(
    config: ml_collections.ConfigDict, run: Run
) -> Callable[[TrainState], dict[str, Any]]:
    """Returns a function that counts the unique prototypes of a state; all processes call it.

    It counts those of the targets of [CLS] only: the anchors of one task for SOP, and the memory
    for MaSSL. The values of its result are None where some have no direction, as the means of
    decoupled prototypes before the first step:

        prototypes_count: K.
        prototypes_unique: M at the paper's eps, 0.025.
        prototypes_share: M / K.
        prototypes_share_eps<eps>: the same for each eps of `uniqueness.EPS`.

    Args:
        config: the config of the run.
        run: the run, whose objective has prototypes.
    """
    first = names_of(config, run.objective, taught=True)[:1]
    read = make_reader(run.objective, run.mesh, config.seed, True, first)

    def count(state: TrainState) -> dict[str, Any]:
        (subject,) = read(state.student.get(OWN, {}), state.teacher.get(OWN, {}), state.carried)
        return counts(subject.rows)

    return count


def counts(rows: np.ndarray) -> dict[str, Any]:
    """Returns the row of an evaluation for prototypes [K, d], see `make_counter`."""
    names = [key_of(eps) for eps in uniqueness.EPS]
    row: dict[str, Any] = dict.fromkeys([*FIRST, *names])
    squares = np.square(rows, dtype=np.float64).sum(axis=1)
    if not (np.isfinite(squares).all() and squares.all()):
        return row
    covers = {cover.eps: cover for cover in uniqueness.covers(rows, uniqueness.EPS)}
    unique = len(covers[uniqueness.PAPER].representatives)
    row |= dict(zip(FIRST, (len(rows), unique, unique / len(rows)), strict=True))
    return row | {
        key_of(eps): len(cover.representatives) / len(rows) for eps, cover in covers.items()
    }


FIRST = ("prototypes_count", "prototypes_unique", "prototypes_share")


def key_of(eps: float) -> str:
    """Returns the name of the share of unique prototypes at some eps."""
    return f"prototypes_share_eps{eps:g}"


def sentence(row: Mapping[str, Any]) -> str | None:
    """Returns the count in words; None for a row without one."""
    if row.get("prototypes_unique") is None:
        return None
    return (
        f"{row['prototypes_unique']} of {row['prototypes_count']} prototypes are unique "
        f"({100 * row['prototypes_share']:.1f} %) at eps {uniqueness.PAPER:g}"
    )


def result_of(row: Mapping[str, Any]) -> Result:
    """Returns the counts of a row of metrics.jsonl in the form of `diagnosis.diagnose`.

    All other values are None.
    """
    count = row["prototypes_count"]
    found = {eps: row[key_of(eps)] for eps in uniqueness.EPS}
    entries = [
        dict.fromkeys(OF_EPS) | {"eps": eps, "unique": round(share * count), "share": share}
        for eps, share in found.items()
    ]
    return dict.fromkeys(WITHOUT) | {"prototypes": count, "eps": entries}


# The values of a diagnosis that are not counted in training.
WITHOUT = (
    *("dimensions", "images", "temperature", *Spread._fields, "features", "marginal"),
    *("marginal_entropy", "marginal_kl_uniform", "marginal_perplexity", "sample_entropy"),
    *("images_per_class", "dead"),
)
OF_EPS = (
    *("same_image", "factors", "representatives", "share_total", "share_total_soft"),
    *("share_mean", "share_mean_soft", "images_per_class", "dead"),
)
