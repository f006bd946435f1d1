"""Trains a run and measures its network: one row per run and seed."""

import statistics
import time
from pathlib import Path
from typing import Any

import ml_collections
from rows import COMPUTES
from turns import size_of

from paper_claims.runs import STEPS, Run, digest, label, prepared
from sop_jax.data.sources import open_source
from sop_jax.diagnosis.in_training import key_of as key_of_eps
from sop_jax.diagnosis.uniqueness import EPS
from sop_jax.evaluation.task import Subject
from sop_jax.evaluation.tasks import TASKS
from sop_jax.evaluation.tools import Toolbox
from sop_jax.monitor.metrics import read_metrics
from sop_jax.parallel.interruption import Interruption
from sop_jax.parallel.mesh import make_mesh
from sop_jax.pretrained import load_network, settings_of
from sop_jax.train import train
from sop_jax.training.assemble import assemble, traced_step

SIGNS = ("log_k", "entropy", "entropy_of_mean", "embedding_std", "effective_rank", "agreement")
STRENGTHS = tuple(float(10.0**power) for power in range(-3, 4))  # in the range of the protocol's
ITERATIONS = 500  # of a classifier at most, to save time


def key_of(run: Run, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Returns the values that identify the row of a run."""
    return {
        "kind": "run",
        "settings": digest(run, steps),
        "seed": seed,
        "version": COMPUTES,
    }


def workdir_of(run: Run, seed: int, steps: int, workdirs: Path) -> Path:
    """Returns the folder of a run in that of all runs."""
    return workdirs / f"{run.recipe}_{digest(run, steps)}_{seed}"


def measure(run: Run, seed: int, steps: int, workdirs: Path) -> dict[str, Any]:
    """Trains a run, or resumes it, and returns its row.

    Args:
        run: the run.
        seed: its seed.
        steps: the number of steps.
        workdirs: the folder of the workdirs.
    """
    key, workdir = key_of(run, seed, steps), workdir_of(run, seed, steps, workdirs)
    began = time.monotonic()
    config = prepared(run, steps, seed, workdirs / "images")
    summary = train(config, str(workdir))
    row = key | {"run": label(run), "steps": steps} | curves(workdir)
    row |= {"images_per_s": summary["images_per_s"], "train_s": summary["wall_s"]}
    trained = time.monotonic()
    row |= evaluations(workdir, run.images == "half")
    row["evaluate_s"] = time.monotonic() - trained
    row |= step_of(config)
    row["command_s"] = time.monotonic() - began
    return rounded(row)


def rounded(value: Any) -> Any:
    """Returns a value with six significant digits of every number, so that rows stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def curves(workdir: Path) -> dict[str, Any]:
    """Returns what a run recorded on the way.

    Returns:
        `knn`: pairs of a step and the accuracy; `prototypes`: their number; `unique`: by eps, pairs
        of a step and the share that is unique; `signs`: the medians of the signs of health over the
        last three logged steps that have them.
    """
    rows = read_metrics(workdir)
    counted = [row for row in rows if row.get("prototypes_count") is not None]
    return {
        "knn": points(rows, "knn_top1"),
        "prototypes": counted[-1]["prototypes_count"] if counted else None,
        "unique": {str(eps): points(counted, key_of_eps(eps)) for eps in EPS},
        "signs": {name: last(rows, name) for name in SIGNS},
    }


def points(rows: list[dict[str, Any]], name: str) -> list[list[float]]:
    """Returns pairs of a step and a number that was recorded there."""
    return [[row["step"], row[name]] for row in rows if row.get(name) is not None]


def last(rows: list[dict[str, Any]], name: str) -> float | None:
    """Returns the median of the last three records of a number; None if there are none."""
    values = [row[name] for row in rows if row.get(name) is not None][-3:]
    return statistics.median(values) if values else None


def evaluations(workdir: Path, transfer: bool) -> dict[str, Any]:
    """Returns the accuracies of classifiers of the features of the trained network.

    Args:
        workdir: the folder of the run.
        transfer: whether its images have other classes, which are classified as well.
    """
    config, model, params, step = load_network(workdir)
    subject = Subject("teacher", config, model, params, "", step)

    def result(name: str, others: bool = False) -> dict[str, Any]:
        task, run_config = TASKS[name], settings_of(workdir)
        settings = task.settings()
        settings.iterations = ITERATIONS
        if name == "logistic":
            settings.strengths = STRENGTHS
        if others:
            run_config.data.update(train_split="train_others", test_split="test_others")
        inputs = task.open(run_config, settings, {})
        with Interruption() as interruption:
            interruption.starting = None
            tools = Toolbox(
                subject,
                make_mesh(),
                seed=config.seed,
                interruption=interruption,
                kept={},
                shown=False,
            )
            return task.run(subject, inputs, settings, tools)

    few = result("fewshot")
    logistic = result("logistic")
    names = ("top1", "mean_per_class", "head", "middle", "tail")
    others = result("logistic", others=True)["top1"] if transfer else None
    return {
        "fewshot": {str(shots): few[f"top1_{shots}"] for shots in (1, 2, 5)},
        "logistic": {name: logistic[name] for name in names},
        "transfer": others,
    }


def step_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the steps per epoch, and the bytes that the compiler reports for a step."""
    train = open_source(config.data, "train")
    assert train is not None
    run = assemble(config, make_mesh(), len(train))
    program = traced_step(run).lower().compile()
    return {"epoch": run.epoch, "step_bytes": size_of(program)}
