"""Diagnoses partial prototype collapse: how many prototypes differ, and how they share the data.

    python -m sop_jax.diagnose --workdir=DIR [--step=N,M|all|recorded] [--eps=0.025,0.1]
    python -m sop_jax.diagnose --workdir=DIR --workdir=OTHER --out=FOLDER
    python -m sop_jax.diagnose --weights=FILE [--layer=NAME] [--data.path=IMAGES]

DIR is a run of any method. FILE is a checkpoint of DINO, iBOT, MSN, SwAV, CARP or CAPI, which is
read without PyTorch. Of SOP and MaSSL, whose prototypes are rows of a memory, the anchors of one
step and the memories are diagnosed. Several runs, files and steps are drawn into the same plots.

Prints tables, with the papers' numbers below, and writes a .json file with all numbers and a folder
of the same name with plots (.png) and diagnosis.html. The last line is the path of the .json file.
By default they are in DIR/evaluations, or in evaluations/ next to FILE.

--step=recorded takes what the run itself counted at its evaluations, with prototypes in
--config.eval.tasks, from metrics.jsonl. docs/diagnosis.md explains every number.

For example, after the quick start:

    python -m sop_jax.diagnose --workdir=runs/digits
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from etils import epath

from sop_jax import cli, paths
from sop_jax import config as config_lib
from sop_jax.data.sources import identity
from sop_jax.diagnosis import embeddings, figures, in_training, subjects
from sop_jax.diagnosis.diagnosis import TEMPERATURE, Result, diagnose
from sop_jax.diagnosis.embeddings import Images
from sop_jax.diagnosis.report import tables
from sop_jax.diagnosis.subjects import Item
from sop_jax.diagnosis.uniqueness import EPS, PAPER, check_eps, covers
from sop_jax.errors import UserError
from sop_jax.evaluation.splits import open_split
from sop_jax.monitor.metrics import read_metrics
from sop_jax.parallel import hosts
from sop_jax.paths import write_whole
from sop_jax.pretrained import settings_of

IMAGES = 10_000
RECORDED = "recorded"
CURVES = 8  # of one run, for recorded counts


class Asked(NamedTuple):
    """What a command asks for.

    Attributes:
        workdirs: the folders of runs.
        weights: files of weights.
        step: steps separated by commas, `all` or `recorded`; the newest by default.
        network: `teacher` or `student`; the teacher by default.
        layer: the name of the only layer or memory to diagnose; all of the network by default.
        eps: the distances for which unique prototypes are counted.
        images: the most images whose embeddings are compared with the prototypes; 0 for none.
        tsne: whether to draw a map of the unique prototypes.
        seed: draws the images, the anchors of SOP, and the points and the start of the map.
        out: the folder of the results, see `place_of`.
        batch_size: the number of images that are embedded at a time; by default as in the run.
        data: data other than the run's, see `data.named.name_data`.
        heads: the number of heads of a ViT in a file whose size has no name.
    """

    workdirs: Sequence[str] = ()
    weights: Sequence[str] = ()
    step: str | None = None
    network: str | None = None
    layer: str | None = None
    eps: Sequence[float] = EPS
    images: int = IMAGES
    tsne: bool = False
    seed: int = 0
    out: str | None = None
    batch_size: int | None = None
    data: Mapping[str, Any] = {}
    heads: int | None = None


def run(asked: Asked) -> epath.Path:
    """Diagnoses what is asked for, prints the tables, and writes the results.

    Returns:
        The path of the `.json` file.

    Raises:
        UserError: something is wrong that the user can fix. What can be checked is, before any
            image is embedded.
    """
    began = time.monotonic()
    check(asked)
    place = place_of(asked)
    paths.check_writable(place.parent, "--out")
    drawn = plots_possible(asked.tsne)
    if asked.step == RECORDED:
        results, knn = recorded(asked.workdirs)
        record = {"subjects": [{"name": name, "result": x} for name, x in results.items()]}
        return finish(asked, place, record, results, knn, {}, drawn, began)
    opened = open_images(asked)
    items = read(asked)
    names = dict(zip(subjects.titles_of(items), items, strict=True))
    networks = embeddings.Networks(opened, asked.network, asked.heads, asked.batch_size, asked.seed)
    results, entries, maps = {}, [], {}
    for name, item in names.items():
        if asked.images:
            found, why = networks.embeddings_of(item, note)
            if why is not None:
                note(f"{name}: no shares of images, because {why}")
        else:
            found, why = None, "--images=0"
        note(f"diagnosing {name}: {len(item.subject.rows)} vectors")
        if not hosts.is_first():
            continue
        subject = item.subject
        result = diagnose(subject.rows, found, asked.eps, TEMPERATURE, subject.images)
        results[name] = result
        if asked.tsne:
            eps = PAPER if PAPER in asked.eps else min(asked.eps)
            (cover,) = covers(subject.rows, [eps])
            drawn_map = figures.map_of(subject.rows, cover, asked.seed)
            if drawn_map is not None:
                maps[name] = drawn_map
            else:
                note(
                    f"{name}: no map, because only {len(cover.representatives)} prototypes are "
                    f"unique at eps {eps:g}, and t-SNE needs {figures.LEAST}"
                )
        entries.append(
            {
                "name": name,
                "of": item.run,
                "step": item.step,
                "layer": subject.layer,
                "compared": subject.compared,
                "knn_top1": item.knn,
                "without_images": why,
                "result": result,
            }
        )
    data = {name: identity(images.source) for name, images in opened.items() if images}
    knn = {name: item.knn for name, item in names.items() if item.knn is not None}
    return finish(
        asked, place, {"subjects": entries, "data": data}, results, knn, maps, drawn, began
    )


def check(asked: Asked) -> None:
    """Checks what can be without opening anything.

    Raises:
        UserError: flags are missing, invalid or without effect.
    """
    if not asked.workdirs and not asked.weights:
        raise UserError("give --workdir=DIR or --weights=FILE; either can be repeated")
    check_eps(asked.eps)
    several = len(asked.workdirs) + len(asked.weights) > 1
    if several and asked.out is None:
        raise UserError(
            "several runs or files are diagnosed together; name the folder of the results with "
            "--out=FOLDER"
        )
    given = (*asked.workdirs, *asked.weights)
    places = [path if "://" in path else str(epath.Path(path).resolve()) for path in given]
    twice = [path for path, place in zip(given, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; give each run and file once")
    for workdir in asked.workdirs:
        if epath.Path(workdir).is_file():
            raise UserError(f"--workdir={workdir} is a file; give it with --weights={workdir}")
    for path in asked.weights:
        if epath.Path(path).is_dir():
            raise UserError(f"--weights={path} is a folder; give --workdir={path}, or a file in it")
    if not asked.workdirs and asked.step is not None:
        raise UserError(f"--step={asked.step} is for --workdir, but only files are given")
    of_images = [f"data.{name}" for name in sorted(asked.data)]
    of_images += ["batch_size"] * (asked.batch_size is not None)
    if of_images and not asked.images:
        raise UserError(
            f"--{of_images[0]} would have no effect, because --images=0 compares no "
            "images; leave one of them out"
        )
    if asked.heads is not None and not (asked.weights and asked.data):
        raise UserError(
            f"--heads={asked.heads} would have no effect: it is for embedding images by --weights; "
            "leave it out, or name images with --data.path"
        )
    if asked.step == RECORDED:
        unused = {
            "weights": bool(asked.weights),
            "network": asked.network is not None,
            "layer": asked.layer is not None,
            "eps": tuple(asked.eps) != EPS,
            "images": asked.images != IMAGES,
            "tsne": asked.tsne,
            "seed": asked.seed != Asked().seed,
            "batch_size": asked.batch_size is not None,
            **{f"data.{name}": True for name in asked.data},
        }
        if idle := [name for name, is_given in unused.items() if is_given]:
            raise UserError(
                f"--{idle[0]} would have no effect: --step=recorded takes the counts that the run "
                "wrote to metrics.jsonl; leave one of them out"
            )


def plots_possible(needed: bool) -> bool:
    """Returns whether plots can be drawn; says so if not.

    Raises:
        UserError: they are needed and cannot be drawn.
    """
    try:
        figures.check_plots()
        return True
    except UserError as error:
        if needed:
            raise
        note(f"no plots are drawn: {error}")
        return False


def open_images(asked: Asked) -> dict[str, Images | None]:
    """Returns the images of each run and file; None for none.

    Raises:
        UserError: something is not the folder of a run, or there is no such data.
    """
    opened: dict[str, Images | None] = {}
    for place in (*asked.workdirs, *asked.weights):
        if place in asked.workdirs:
            config = settings_of(place)
        else:
            config = config_lib.paper()
            config.data.source = "folder"  # with which only --data.path is needed
        opened[place] = None
        if asked.images and (place in asked.workdirs or asked.data):
            try:
                source = open_split(config, asked.data, "train", "the diagnosis")
            except UserError as error:
                raise UserError(
                    f"{error}. --images=0 diagnoses the prototypes without images"
                ) from error
            opened[place] = Images(embeddings.draw(source, asked.images, asked.seed), config.data)
    return opened


def read(asked: Asked) -> list[Item]:
    """Reads all prototypes.

    Raises:
        UserError: some cannot be read.
    """
    network, items = asked.network or "teacher", []
    for workdir in asked.workdirs:
        rows = {row["step"]: row for row in read_metrics(workdir)}
        for step in subjects.steps_of(workdir, asked.step):
            found = subjects.of_run(workdir, step, network, asked.layer, asked.seed)
            knn = rows.get(step, {}).get("knn_top1")
            items += [Item(workdir, step, subject, knn) for subject in found.subjects]
    for path in asked.weights:
        found = subjects.of_file(path, asked.network, asked.layer)
        for line in found.words:
            note(f"{path}: {line}")
        items += [Item(path, None, subject, None) for subject in found.subjects]
    every = []
    for item in items:
        once = subjects.once_per_image(item.subject)
        every += [item] if once is None else [item, item._replace(subject=once)]
    return every


def recorded(workdirs: Sequence[str]) -> tuple[dict[str, Result], dict[str, float]]:
    """Returns the counts that runs wrote to metrics.jsonl, and their k-NN accuracies, by name.

    At most CURVES evaluations of each run are taken, evenly spaced, with the first and the last.

    Raises:
        UserError: a run recorded none.
    """
    found, knn, names = {}, {}, subjects.short_names(workdirs)
    for workdir in workdirs:
        settings_of(workdir)  # raises if this is not the folder of a run
        rows = [x for x in read_metrics(workdir) if x.get("prototypes_share") is not None]
        if not rows:
            raise UserError(
                f"{workdir} recorded no counts of prototypes; expected some in its metrics.jsonl, "
                "which a run writes that is trained with --config.eval.tasks=knn,prototypes. Leave "
                "out --step=recorded to read its checkpoints"
            )
        taken = np.unique(np.linspace(0, len(rows) - 1, CURVES).round().astype(int))
        for row in (rows[i] for i in taken):
            name = f"step {row['step']}"
            if len(workdirs) > 1:
                name = f"{names[workdir]}, {name}"
            found[name] = in_training.result_of(row)
            if row.get("knn_top1") is not None:
                knn[name] = row["knn_top1"]
    return found, knn


# What is printed and written


def finish(
    asked: Asked,
    place: epath.Path,
    record: dict[str, Any],
    results: Mapping[str, Result],
    knn: Mapping[str, float],
    maps: Mapping[str, Any],
    plots: bool,
    began: float,
) -> epath.Path:
    """Prints the tables and writes the files; only the first process does so.

    Returns:
        The path of the `.json` file.

    Raises:
        UserError: the files cannot be written.
    """
    path = epath.Path(f"{place}.json")
    if not hosts.is_first():
        return path
    print(tables(results, knn))
    record |= {
        "settings": {
            "step": asked.step,
            "network": asked.network,
            "layer": asked.layer,
            "eps": list(asked.eps),
            "images": asked.images,
            "seed": asked.seed,
        },
        "versions": hosts.versions(),
        "seconds": round(time.monotonic() - began, 1),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if plots:
            place.mkdir(exist_ok=True)
            record["files"] = figures.draw(results, place, knn, maps)
            note(f"plots: {place / 'diagnosis.html'}")
        write_whole(path, json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"the diagnosis above was not saved, because {error.filename or path} cannot be "
            f"written: {error.strerror or error}; name another folder with --out"
        ) from error
    return path


def place_of(asked: Asked) -> epath.Path:
    """Returns the path of the results without its extension; the same for the same command."""
    workdir, weights = [*asked.workdirs, None][0], [*asked.weights, None][0]
    folder = epath.Path(asked.out or workdir or epath.Path(weights or "").parent)
    if weights and not workdir:
        stem = epath.Path(weights).stem
    elif asked.step is None and workdir:
        stem = str(subjects.steps_of(workdir, None)[0])
    else:
        stem = "steps" if asked.step is None else asked.step.replace(",", "_")
    facts = asked._replace(out=None)._asdict()
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return folder / "evaluations" / f"diagnosis_{stem}_{digest}"


def note(text: str) -> None:
    """Prints a line for people, in the first process."""
    if hosts.is_first():
        print(text, file=sys.stderr)


def main() -> None:
    """Diagnoses the prototypes that the flags name."""
    args = flags.FLAGS
    path = run(
        Asked(
            cli.several_paths(args.workdir),
            cli.several_paths(args.weights),
            args.step,
            args.network,
            args.layer,
            numbers(args.eps) if args.eps is not None else EPS,
            args.images,
            args.tsne,
            args.seed,
            args.out,
            args.batch_size,
            cli.given_data(),
            args.heads,
        )
    )
    if hosts.is_first():
        print(path)


def numbers(text: str) -> tuple[float, ...]:
    """Returns numbers that are separated by commas.

    Raises:
        UserError: some are not numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--eps={text} is not a list of numbers; expected distances 1 - cos between 0 and 2, "
            f"such as --eps={PAPER:g},0.1"
        ) from error


if __name__ == "__main__":
    cli.define_path("workdir", "The folder of a run; can be repeated.", several=True)
    cli.define_path("weights", "A file of weights with prototypes; can be repeated.", several=True)
    flags.DEFINE_string(
        "step", None, "The checkpoints: N, N,M, all or recorded; the newest by default."
    )
    cli.define_path("out", "The folder of the results; by default that of the run or file.")
    cli.define_data(train_split="The split of the images.")
    flags.DEFINE_enum(
        "network", None, list(subjects.NETWORKS), "Whose prototypes; by default the teacher's."
    )
    flags.DEFINE_string("layer", None, "The only layer or memory to diagnose; all by default.")
    flags.DEFINE_string(
        "eps", None, f"Distances 1 - cos; by default {','.join(f'{e:g}' for e in EPS)}."
    )
    flags.DEFINE_integer(
        "images", IMAGES, "The most images to compare with prototypes; 0 for none.", lower_bound=0
    )
    flags.DEFINE_bool("tsne", False, "Draw a map of the unique prototypes.")
    flags.DEFINE_integer(
        "seed", 0, "Draws images, anchors and the map.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer("batch_size", None, "The images per batch.", lower_bound=1)
    flags.DEFINE_integer(
        "heads", None, "The heads of a ViT in --weights whose size has no name.", lower_bound=1
    )
    cli.run(main)
