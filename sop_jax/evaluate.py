"""Measures how good the features of a run are.

    python -m sop_jax.evaluate --workdir=DIR --task=knn [--step=N] [--data.path=PATH]

Prints a table, then one line of JSON, which it also writes to DIR/knn_<step>.json.

Without flags the data is the run's. --data.path names other data: a folder of images, a packed
.npz or a TFDS data set, which --data.source, --data.name, --data.train_split and --data.test_split
describe where it is not plain. What is used is printed.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from absl import flags
from etils import epath
from jax.sharding import Mesh

from sop_jax import cli, paths
from sop_jax.data import sources
from sop_jax.data.decode import decoding
from sop_jax.data.named import LOOKED_AT, describe, name_data, splits_of
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError
from sop_jax.evaluation.features import Extract, make_extractor
from sop_jax.evaluation.knn import knn_top1
from sop_jax.models import Params
from sop_jax.monitor.corrupt import print_corrupt
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import make_mesh
from sop_jax.paths import write_whole
from sop_jax.pretrained import load_network, settings_of
from sop_jax.training import resume


def knn_evaluation(
    extract: Extract,
    params: Params,
    train: Source,
    test: Source | None,
    eval_config: ml_collections.ConfigDict,
    mesh: Mesh,
    between: Callable[[], Any] | None = None,
    unreadable: Callable[[Source, list[int]], Any] | None = None,
) -> dict[str, float | int | None]:
    """Weighted k-NN accuracy of the test images among the train images, as DINO measures it.

    Args:
        extract: from `features.make_extractor`.
        params: of the network to judge, the teacher's as a rule.
        train: images that vote.
        test: images to classify. Without a test split nothing is measured: there is no
            leave-one-out on the train images.
        eval_config: has `knn_k` and `knn_temperature`.
        mesh: devices that share the train images among them.
        between: called after each batch of images and chunk of the search; it may raise.
        unreadable: called with each source and its records that cannot be read.

    Returns:
        `knn_top1`, the best over k, `knn_k`, the k that gave it, and `knn_top1_k<k>` for each k,
        all shares in [0, 1]; None for a k above the number of train images. `knn_unreadable`
        counts images left out. All are None without a test split or without labels.
    """
    ks = tuple(eval_config.knn_k)
    names = ["knn_top1", "knn_k", *(f"knn_top1_k{k}" for k in ks), "knn_unreadable"]
    result: dict[str, float | int | None] = dict.fromkeys(names)
    if test is None or not (train.has_labels and test.has_labels):
        return result
    known, asked = (extract(params, source, between=between) for source in (train, test))
    if unreadable:
        unreadable(train, known.corrupt)
        unreadable(test, asked.corrupt)
    top1 = knn_top1(
        known.vectors,
        known.labels,
        asked.vectors,
        asked.labels,
        ks,
        eval_config.knn_temperature,
        mesh=mesh,
        between=between,
    )
    best = max(top1, key=lambda k: top1[k])  # the smallest k of equals
    return result | {
        "knn_top1": top1[best],
        "knn_k": best,
        **{f"knn_top1_k{k}": share for k, share in top1.items()},
        "knn_unreadable": len(known.corrupt) + len(asked.corrupt),
    }


def knn(
    workdir: epath.PathLike,
    step: int | None = None,
    data: Mapping[str, str] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run with k-NN, prints the table and writes the JSON file.

    Args:
        workdir: of the run.
        step: of which checkpoint; the newest by default.
        data: other data than the run's, see `data.named.name_data`.
        batch_size: images at a time, for memory; `eval.batch_size` of the run by default.

    Returns:
        What `knn_evaluation` returns, and `task`, `step` and `data`.

    Raises:
        UserError: no run, no checkpoint, no data, or data without labels or test split.
    """
    config = settings_of(workdir)
    config.eval.batch_size = batch_size or config.eval.batch_size
    try:
        train, test = open_labelled(config.data, data or {})
    except UserError as error:  # whose flags are those of a training
        raise UserError(str(error).replace("--config.data.", "--data.")) from error
    now = resume.data_of(train, test)
    hosts.check_agreement(resume.facts(now))
    began = None if data else resume.recorded(epath.Path(workdir))
    if began and hosts.is_first():
        for line in resume.differences(began, now):
            print(f"the data is not what the run was trained with: {line}", file=sys.stderr)
    try:
        paths.check_writable(workdir, "--workdir")
    except UserError as error:  # no reason not to measure
        if hosts.is_first():
            print(f"the accuracy will be printed only, not saved: {error}", file=sys.stderr)
        saved = False
    else:
        saved = True
    _, model, teacher, step = load_network(workdir, step)
    mesh = make_mesh()
    extract = make_extractor(model, config, mesh)

    def unreadable(source: Source, corrupt: list[int]) -> None:
        if hosts.is_first():
            print_corrupt(source, corrupt, decoding(config.data, source))

    result = knn_evaluation(extract, teacher, train, test, config.eval, mesh, unreadable=unreadable)
    kept = {name: config.data[name] for name in ("source", *LOOKED_AT[config.data.source])}
    record = {"task": "knn", "step": step, "data": kept | resume.facts(now), **result}
    if not hosts.is_first():
        return record  # the first process speaks and writes
    print(f"k-NN of {workdir}, step {step}: {len(test)} images among {len(train)}")
    print(f"of {describe(config.data)}")
    print(table(result))
    if not saved:
        return record
    other = f"_{test.digest}" if data else ""  # not in place of the numbers of the run's own data
    path = epath.Path(workdir) / f"knn_{step}{other}.json"
    try:
        write_whole(path, json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"the accuracy above was not saved, because {path} cannot be written: {error}; make "
            "the workdir writable or copy it, and run the same command again"
        ) from error
    return record


def open_labelled(data_config: Any, given: Mapping[str, str]) -> tuple[Source, Source]:
    """The train and the test split of a run's data, or of the data that flags name.

    Args:
        data_config: `config.data` of the run; changed to what is opened.
        given: see `data.named.name_data`.

    Raises:
        UserError: there is no such data, or it lacks the split to classify or labels.
    """
    name_data(data_config, given)
    train = open_source(data_config, "train")
    assert train is not None  # only a test split may be missing
    test = open_source(data_config, "test", train)
    if hosts.is_first():
        for note in sources.notes(train, test):
            print(note, file=sys.stderr)
    if test is None:
        there = ", ".join(sorted(splits_of(data_config).values()))
        remedy = "name it with --data.test_split" if there else "put it into a folder called val"
        raise UserError(
            f"there is no split {data_config.test_split!r} to classify in {describe(data_config)}"
            f"{f', but there are {there}' * bool(there)}. k-NN needs one beside the train split: "
            f"{remedy}, or name other data that has both with --data.path"
        )
    if not (train.has_labels and test.has_labels):
        raise UserError(
            f"the images have no labels ({describe(data_config)}), and k-NN needs them. Sort them "
            "into one folder per class, in the train and in the test split, or name other data "
            "that has labels with --data.path"
        )
    return train, test


def table(result: dict[str, float | int | None]) -> str:
    """Accuracy by k in percent, a line each, the best one marked."""
    lines = [f"{'k':>5}  top-1 %"]
    for name, share in result.items():
        k = name.removeprefix("knn_top1_k")
        if k == name:
            continue
        mark = "  best" if int(k) == result["knn_k"] else ""
        value = "  (fewer train images)" if share is None else f"{100 * share:7.2f}{mark}"
        lines.append(f"{k:>5}  {value}")
    if result["knn_unreadable"]:
        lines.append(f"{result['knn_unreadable']} images could not be read and were left out")
    return "\n".join(lines)


TASKS = {"knn": knn}


def main() -> None:
    """Evaluates what the flags name."""
    args = flags.FLAGS
    if args.task not in TASKS:
        raise UserError(f"unknown --task={args.task}; expected one of: {', '.join(TASKS)}")
    record = TASKS[args.task](args.workdir, args.step, cli.given_data(), args.batch_size)
    if hosts.is_first():
        print(json.dumps(record))


if __name__ == "__main__":
    cli.define_path("workdir", "The folder of the run.", required=True)
    flags.DEFINE_string("task", "knn", f"What to measure: {', '.join(TASKS)}.")
    flags.DEFINE_integer("step", None, "The checkpoint to evaluate; the newest by default.")
    flags.DEFINE_integer(
        "batch_size", None, "Images at a time; by default as in the run.", lower_bound=1
    )
    cli.define_data(
        train_split="The split of images whose labels are known.",
        test_split="The split of images to classify.",
    )
    cli.run(main)
