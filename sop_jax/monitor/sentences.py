"""Sentences and numbers about a run: what it will do, and what it has done."""

import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from sop_jax.data.sources import Source
from sop_jax.schedules import Length


def run_text(
    config: ml_collections.ConfigDict,
    train: Source,
    test: Source | None,
    parameters: int,
    devices: np.ndarray,
    start: int,
    length: Length,
) -> str:
    """Returns a description of a run from step `start` on, in one line for people.

    Args:
        config: the settings.
        train: the images to train on.
        test: the images to classify in evaluations; None if there are none.
        parameters: the number of parameters of the student.
        devices: the devices of the run, see `jax.sharding.Mesh.devices`.
        start: the number of steps that are done.
        length: the length of the run.
    """
    views = f"{config.augment.global_crops}x{config.augment.global_size}"
    if config.augment.local_crops:
        views += f" + {config.augment.local_crops}x{config.augment.local_size}"
    where = f"on {devices.size} {devices.flat[0].device_kind} device{'s' * (devices.size > 1)}"
    if jax.process_count() > 1:
        where += f" of {jax.process_count()} processes"
    if config.accumulate > 1:
        where += f" in {config.accumulate} microbatches"
    if test is None:
        evaluation = f"no k-NN accuracy: there is no split {config.data.test_split!r}"
    elif not (train.has_labels and test.has_labels):
        evaluation = "no k-NN accuracy: the images have no labels"
    else:
        evaluation = f"k-NN on {len(test)} test images"
        if train.class_names is not None:
            evaluation += f" of {len(train.class_names)} classes"
    return (
        f"{len(train)} images, views {views}; {parameters / 1e6:.1f} M parameters; batch "
        f"{config.batch_size} {where}; steps {start} to {length.steps} "
        f"({length.steps / length.epoch:.1f} epochs); {evaluation}."
    )


def warnings_of(config: ml_collections.ConfigDict, images: int, start: int) -> list[str]:
    """Returns warnings about a batch size and a trace that are valid, but probably not intended."""
    words = []
    if images < config.batch_size:
        words.append(
            f"warning: there are only {images} images, fewer than the batch of {config.batch_size},"
            " so that every batch shows some of them more than once. Check data.path; if these are "
            f"all images, set --config.batch_size to {images} or less"
        )
    first, last = config.profile_steps
    if 0 < last <= start:
        words.append(
            f"warning: nothing will be traced, because the steps of profile_steps={first},{last} "
            f"are done: the run continues after step {start}"
        )
    return words


def summarise(rows: Sequence[Mapping[str, Any]], steps: int, compile_s: float) -> dict[str, Any]:
    """Returns the summary of a finished run.

    Args:
        rows: the logged rows.
        steps: the number of steps of the run.
        compile_s: the seconds that compiling took in the last start.
    """
    first, final = (rows[0], rows[-1]) if rows else ({}, {})
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
    return {
        "knn_top1": final.get("knn_top1"),
        "knn_top1_untrained": first.get("knn_top1") if first.get("step") == 0 else None,
        "knn_k": final.get("knn_k"),
        "loss": final.get("loss"),
        "steps": steps,
        "images_per_s": float(np.median(speeds)) if speeds else None,
        "wall_s": final.get("wall_s"),
        "compile_s": compile_s,
    }


def curves_text(tracker: str, workdir: epath.Path) -> str:
    """Returns where the curves of a run are."""
    if tracker == "wandb":
        return f"curves: in Weights & Biases; {workdir / 'wandb.json'} names the run"
    curves = f"curves: tensorboard --logdir {shlex.quote(str(workdir))}"
    if importlib.util.find_spec("tensorboard") is None:
        curves += " (after pip install tensorboard)"
    return curves


def summary_text(summary: dict[str, Any], curves: str) -> str:
    """Returns the summary in words for people, and where the curves are."""
    minutes = f"{summary['steps']} steps in {(summary['wall_s'] or 0) / 60:.1f} minutes"
    before, after = summary["knn_top1_untrained"], summary["knn_top1"]
    if before is None or after is None:
        return f"{minutes}; {curves}"
    accuracy = f"k-NN accuracy {100 * before:.1f} % untrained, {100 * after:.1f} % now"
    return f"{accuracy}; {minutes}; {curves}"
