"""Logistic regression with a few images per class, MSN's protocol.

For each of several draws of n images per class, features are centred (each vector minus the mean of
its own numbers) and scaled to unit norm, and a classifier without bias is fitted with the strength
0.00025 / n_images (MSN's `logistic_eval.py`). The solver is that of `logistic`, which finds the
optimum.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from sop_jax.data import transfer
from sop_jax.data.subsets import draw_per_class, labels_of
from sop_jax.errors import UserError
from sop_jax.evaluation import accuracy
from sop_jax.evaluation.features import on_devices
from sop_jax.evaluation.logistic import (
    TOLERANCE,
    Problem,
    classify,
    count_outputs,
    mean_per_class,
    minimize,
    open_set,
    prepare,
)
from sop_jax.evaluation.splits import Splits, sources_of
from sop_jax.evaluation.tables import Part, percent
from sop_jax.evaluation.task import Subject, Task, Tools
from sop_jax.evaluation.views import VIEW_RULES, view_of, view_settings
from sop_jax.rules import COUNT, POSITIVE, one_of, some


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of the task `fewshot`."""
    return ml_collections.ConfigDict(
        dict(
            shots=(1, 2, 5),  # images per class
            draws=3,
            strength=0.00025,  # of the regularization, divided by the number of images
            set="",  # the name of a transfer set of the papers, whose splits and metric are used
            iterations=20_000,  # at most
            dtype="float64",  # float64 | float32, of the objective
            **view_settings(interpolation="bilinear"),  # as MSN scales images
        )
    )


RULES = {
    "shots": some(COUNT),
    "draws": COUNT,
    "strength": POSITIVE,
    "set": one_of(("", *transfer.SETS)),
    "iterations": COUNT,
    "dtype": one_of(TOLERANCE),
    **VIEW_RULES,
}


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Splits:
    """Opens the images, see `task.Open`."""
    view_of(config, settings)
    splits = open_set(config, settings.set, data, "few-shot classification")
    _, counts = np.unique(labels_of(splits.train), return_counts=True)
    if max(settings.shots) > counts.min():
        raise UserError(
            f"eval.shots has {max(settings.shots)} images per class, but a class has only "
            f"{counts.min()}; choose at most that"
        )
    return splits


def run(
    subject: Subject, inputs: Splits, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Returns the accuracy of the test images for each number of images per class.

    Returns:
        For each number n of images per class, `top1_<n>`, the mean over the draws;
        `top1_<n>_std`, the standard deviation over them (of a sample; None for one draw); the same
        for `mean_per_class`; `converged`, whether all solutions have; `images`, and `unreadable`,
        the number of images that were left out. Accuracies are shares in [0, 1]. All values are
        None without a test split or without labels.
    """
    names = [
        f"{metric}_{shots}{suffix}"
        for shots in settings.shots
        for metric in ("top1", "mean_per_class")
        for suffix in ("", "_std")
    ]
    result: dict[str, Any] = dict.fromkeys([*names, "converged", "images", "unreadable"])
    if inputs.test is None or not (inputs.train.has_labels and inputs.test.has_labels):
        return result
    view = view_of(subject.config, settings)
    train, test = tools.features(inputs.train, view), tools.features(inputs.test, view)
    rows, labels, index = on_devices(train, tools.mesh)
    classes = count_outputs(train, test)
    problem = Problem(prepare(rows, "centred"), labels, False, classes, settings.dtype)
    labelled = np.where(np.asarray(index) >= 0, labels, -1)
    converged, images = True, 0
    for shots in settings.shots:
        found = []
        for draw in range(settings.draws):
            chosen = np.zeros(len(labelled), bool)
            chosen[draw_per_class(labelled, shots, tools.seed + draw)] = True
            solution = minimize(
                problem,
                chosen,
                settings.strength / chosen.sum(),
                mesh=tools.mesh,
                iterations=settings.iterations,
                between=tools.between,
            )
            counts = classify(solution, test, "centred", tools)
            converged &= solution.converged
            images = int(counts[0].sum())
            found.append(accuracy.summary(counts))
        for name in ("top1", "mean_per_class"):
            values = np.array([one[name] for one in found], float)
            result[f"{name}_{shots}"] = float(values.mean())
            several = len(values) > 1
            result[f"{name}_{shots}_std"] = float(values.std(ddof=1)) if several else None
    unreadable = len(train.corrupt) + len(test.corrupt)
    return result | {"converged": converged, "images": images, "unreadable": unreadable}


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns the accuracies in percent by the number of images per class."""
    rows: list[Sequence[Any]] = [["images per class", "top-1 %", "std", "per class %", "std"]]
    for shots in settings.shots:
        names = [f"top1_{shots}", f"top1_{shots}_std"]
        names += [f"mean_per_class_{shots}", f"mean_per_class_{shots}_std"]
        rows.append([str(shots), *(percent(result[name]) for name in names)])
    parts: list[Part] = [rows, f"mean and standard deviation of {settings.draws} draws"]
    if mean_per_class(settings.set):
        parts.append("the papers report the mean per class for this data set")
    if not result["converged"]:
        parts.append("NOT all converged; allow more iterations with --eval.iterations")
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} images could not be read and were left out")
    return parts


TASK = Task(
    does="accuracy of logistic regression with a few images per class",
    expects=(
        "labelled images in a train split and a test split, as logistic; MSN's numbers are for "
        "ImageNet-1k"
    ),
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="imagenet",
    sources=sources_of,
    during_training=True,
    view=view_of,
)
