"""The evaluations by name, and those of a run on the way."""

from typing import Any

import ml_collections

from sop_jax.evaluation import (
    backgrounds,
    cluster,
    fewshot,
    finetune,
    knn,
    linear,
    logistic,
    retrieval,
    segment,
    tsne,
    video,
)
from sop_jax.evaluation.splits import Splits
from sop_jax.evaluation.task import Subject, Task, Tools

TASKS: dict[str, Task] = {
    "knn": knn.TASK,
    "linear": linear.TASK,
    "logistic": logistic.TASK,
    "fewshot": fewshot.TASK,
    "finetune": finetune.TASK,
    "retrieval": retrieval.TASK,
    "video": video.TASK,
    "backgrounds": backgrounds.TASK,
    "segment": segment.TASK,
    "cluster": cluster.TASK,
    "tsne": tsne.TASK,
}

PROTOTYPES = "prototypes"  # are counted in training, by `diagnosis.in_training`

# What a run can measure on the way, by the names in `config.eval.tasks`.
IN_TRAINING = (*(name for name, task in TASKS.items() if task.during_training), PROTOTYPES)


def settings_in_training(
    name: str, eval_config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Returns the settings with which a run does a task: the defaults, and those of the run."""
    settings = TASKS[name].settings()
    if name == "knn":
        settings.update(k=eval_config.knn_k, temperature=eval_config.knn_temperature)
    return settings


def measure(subject: Subject, splits: Splits, tools: Tools) -> dict[str, Any]:
    """Returns the row of an evaluation during training: the results of `config.eval.tasks`.

    The count of prototypes, which needs the whole state, is not among them.

    Args:
        subject: the network; its config is that of the run.
        splits: the images of the run.
        tools: the tools.

    Returns:
        The results by `<task>_<name>`, such as `knn_top1`; None where undefined.
    """
    row: dict[str, Any] = {}
    for name in subject.config.eval.tasks:
        if name == PROTOTYPES:
            continue
        settings = settings_in_training(name, subject.config.eval)
        result = TASKS[name].run(subject, splits, settings, tools)
        row |= {f"{name}_{key}": value for key, value in result.items()}
    return row
