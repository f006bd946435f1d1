"""Measures the quality of the features of a run.

    python -m sop_jax.evaluate --workdir=DIR --task=knn [--step=N] [--data.path=PATH]

Prints a table, then one line of JSON, which it also writes to DIR/knn_<step>.json.

By default the data is that of the run. --data.path names other data: a folder of images, a packed
.npz file or a TFDS data set. If the path does not determine which data to use, --data.source,
--data.name, --data.train_split and --data.test_split do. The command prints which data it uses.
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
    """Returns the weighted k-NN accuracy of the test images among the train images, as in DINO.

    Args:
        extract: the function that `features.make_extractor` returns.
        params: the parameters of the network to evaluate, usually the teacher's.
        train: the images that vote.
        test: the images to classify. Without a test split nothing is measured: the train images
            are not classified by leave-one-out.
        eval_config: a config with `knn_k` and `knn_temperature`.
        mesh: the devices, over which the train images are sharded.
        between: called after each batch of images and each chunk of the search; it may raise.
        unreadable: called with each source and its records that cannot be read.

    Returns:
        `knn_top1`, the best accuracy over k; `knn_k`, the k that reached it; `knn_top1_k<k>` for
        each k, None if there are fewer train images than k; and `knn_unreadable`, the number of
        images that were left out. Accuracies are shares in [0, 1]. All values are None without a
        test split or without labels.
    """
    ks = tuple(eval_config.knn_k)
    names = ["knn_top1", "knn_k", *(f"knn_top1_k{k}" for k in ks), "knn_unreadable"]
    result: dict[str, float | int | None] = dict.fromkeys(names)
    if test is None or not (train.has_labels and test.has_labels):
        return result
    known, queries = (extract(params, source, between=between) for source in (train, test))
    if unreadable:
        unreadable(train, known.corrupt)
        unreadable(test, queries.corrupt)
    top1 = knn_top1(
        known.vectors,
        known.labels,
        queries.vectors,
        queries.labels,
        ks,
        eval_config.knn_temperature,
        mesh=mesh,
        between=between,
    )
    best = max(top1, key=lambda k: top1[k])  # the first k of those with the same accuracy
    return result | {
        "knn_top1": top1[best],
        "knn_k": best,
        **{f"knn_top1_k{k}": share for k, share in top1.items()},
        "knn_unreadable": len(known.corrupt) + len(queries.corrupt),
    }


def knn(
    workdir: epath.PathLike,
    step: int | None = None,
    data: Mapping[str, str] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run with k-NN, prints the table and writes the JSON file.

    Args:
        workdir: the folder of the run.
        step: the step of the checkpoint; the newest by default.
        data: data other than the run's, see `data.named.name_data`.
        batch_size: the number of images that are computed at a time, which bounds the memory;
            `eval.batch_size` of the run by default.

    Returns:
        The result of `knn_evaluation`, and `task`, `step` and `data`.

    Raises:
        UserError: there is no run, checkpoint or data, or the data has no labels or test split.
    """
    config = settings_of(workdir)
    config.eval.batch_size = batch_size or config.eval.batch_size
    try:
        train, test = open_labelled(config.data, data or {})
    except UserError as error:  # its message names the flags of `sop_jax.train`
        raise UserError(str(error).replace("--config.data.", "--data.")) from error
    now = resume.data_of(train, test)
    hosts.check_agreement(resume.facts(now))
    began = None if data else resume.recorded(epath.Path(workdir))
    if began and hosts.is_first():
        for line in resume.differences(began, now):
            print(f"the data is not the data of the run: {line}", file=sys.stderr)
    try:
        paths.check_writable(workdir, "--workdir")
    except UserError as error:  # the accuracy can still be measured and printed
        if hosts.is_first():
            print(f"the accuracy will only be printed, not saved: {error}", file=sys.stderr)
        writable = False
    else:
        writable = True
    _, model, teacher, step = load_network(workdir, step)
    mesh = make_mesh()
    extract = make_extractor(model, config, mesh)

    def unreadable(source: Source, corrupt: list[int]) -> None:
        if hosts.is_first():
            print_corrupt(source, corrupt, decoding(config.data, source))

    result = knn_evaluation(extract, teacher, train, test, config.eval, mesh, unreadable=unreadable)
    names = ("source", *LOOKED_AT[config.data.source])
    settings = {name: config.data[name] for name in names}
    record = {"task": "knn", "step": step, "data": settings | resume.facts(now), **result}
    if not hosts.is_first():
        return record  # only the first process prints and writes
    print(f"k-NN of {workdir}, step {step}: {len(test)} images among {len(train)}")
    print(f"of {describe(config.data)}")
    print(table(result))
    if not writable:
        return record
    other = f"_{test.digest}" if data else ""  # the results on the run's own data are kept
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
    """Returns the train and the test split of the data of a run, or of the data that flags name.

    Args:
        data_config: `config.data` of the run; updated to the data that is opened.
        given: the flags that were given, see `data.named.name_data`.

    Raises:
        UserError: the data does not exist, or it has no labels or no split to classify.
    """
    name_data(data_config, given)
    train = open_source(data_config, "train")
    assert train is not None  # only the test split may be missing
    test = open_source(data_config, "test", train)
    if hosts.is_first():
        for note in sources.notes(train, test):
            print(note, file=sys.stderr)
    if test is None:
        found = ", ".join(sorted(splits_of(data_config).values()))
        remedy = "name it with --data.test_split" if found else "put it into a folder called val"
        raise UserError(
            f"there is no split {data_config.test_split!r} to classify in {describe(data_config)}"
            f"{f', but there are {found}' * bool(found)}. k-NN needs one besides the train split: "
            f"{remedy}, or use --data.path to name other data that has both"
        )
    if not (train.has_labels and test.has_labels):
        raise UserError(
            f"the images have no labels ({describe(data_config)}), and k-NN needs them. Sort them "
            "into one folder per class, in the train and in the test split, or use --data.path to "
            "name other data that has labels"
        )
    return train, test


def table(result: dict[str, float | int | None]) -> str:
    """Returns the accuracy by k in percent, one line for each k, with the best one marked."""
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
    """Evaluates the run that the flags name."""
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
        "batch_size", None, "The images per batch; by default as in the run.", lower_bound=1
    )
    cli.define_data(
        train_split="The split of images whose labels are known.",
        test_split="The split of images to classify.",
    )
    cli.run(main)
