"""How well clusters of images agree with their classes: of k-means, or of given assignments.

iBOT's `unsupervised/unsup_cls.py` takes the largest output of a head for the cluster of an image.
SOP has no such head, so that clusters are found by k-means on features of unit norm, or read from a
file. See `agreement` for what that script does wrong.
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import broadcast_one_to_all
from jaxtyping import Float, Int
from ml_collections import config_dict

from sop_jax.data.folders import FolderSource, printable
from sop_jax.data.sources import Source
from sop_jax.data.subsets import Subset, labels_of
from sop_jax.errors import UserError
from sop_jax.evaluation.agreement import agreement
from sop_jax.evaluation.splits import open_split
from sop_jax.evaluation.tables import Part, percent
from sop_jax.evaluation.task import Subject, Task, Tools, check_unused
from sop_jax.evaluation.views import VIEW_RULES, view_of, view_settings
from sop_jax.parallel import hosts
from sop_jax.rules import COUNT, TEXT, one_of, unset_or

SPLITS = ("test", "train")
SHOWN = 3  # names in a message

RULES = VIEW_RULES | {
    "split": one_of(SPLITS),
    "clusters": unset_or(COUNT),
    "starts": COUNT,
    "iterations": COUNT,
    "assignments": TEXT,
}

EXPECTED = (
    "a .csv file with a line `name,cluster` for each image, or an .npz file with `names` and "
    "`clusters`, in which a cluster is a whole number"
)


class Inputs(NamedTuple):
    """The data of the task.

    Attributes:
        images: the images, with labels.
        clusters: the number of clusters of k-means.
        assignments: the given cluster of each image; None for k-means.
    """

    images: Source
    clusters: int
    assignments: np.ndarray | None


def settings() -> ml_collections.ConfigDict:
    """Returns the defaults.

    `split` is "test" or "train". `clusters` is the number of clusters, by default that of the
    classes; k-means keeps the best of `starts` runs of at most `iterations` each. `assignments` is
    a file with clusters to measure instead. The others say what the features are.
    """
    own = dict(split="test", clusters=config_dict.placeholder(int), starts=10, iterations=300)
    return ml_collections.ConfigDict({**own, "assignments": "", **view_settings()})


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Inputs:
    """Opens the images, and the assignments if there are some; see `task.Open`."""
    view_of(config, settings)
    images = open_split(config, data, settings.split, "cluster")
    if not images.has_labels:
        raise UserError(
            "the images have no labels, with which clusters are compared. Sort them into one "
            "folder per class, or use --data.path to name other data that has labels"
        )
    if settings.assignments:
        unused = set(RULES) - {"split", "assignments"}
        check_unused(TASK, settings, sorted(unused), "--eval.assignments is measured instead")
        return Inputs(images, 0, read_assignments(settings.assignments, images))
    clusters = settings.clusters or len(np.unique(labels_of(images)))
    if clusters > len(images):
        raise UserError(
            f"eval.clusters is {clusters}, but there are only {len(images)} images. Expected at "
            "most one cluster per image. Choose fewer clusters or more images"
        )
    return Inputs(images, clusters, None)


def run(
    subject: Subject, inputs: Inputs, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Returns the scores of `agreement`, and the numbers of images, clusters and classes.

    Images that cannot be read are left out, and counted as `unreadable`.
    """
    if inputs.assignments is not None:
        labels, assignments, unreadable = labels_of(inputs.images), inputs.assignments, 0
    else:
        view = view_of(subject.config, settings)
        features = tools.whole(tools.features(inputs.images, view))
        labels, unreadable = features.labels, len(features.corrupt)
        if inputs.clusters > len(labels):
            raise UserError(
                f"only {len(labels)} images can be read, too few for {inputs.clusters} clusters. "
                "Copy the images again, or choose fewer with --eval.clusters"
            )
        norms = np.linalg.norm(features.vectors, axis=1, keepdims=True)
        rows = features.vectors / np.maximum(norms, 1e-12)
        assignments = k_means(rows, inputs.clusters, settings.starts, settings.iterations, tools)
    return {
        **agreement(labels, assignments),
        "images": len(labels),
        "unreadable": unreadable,
        "clusters": len(np.unique(assignments)),
        "classes": len(np.unique(labels)),
    }


def k_means(
    rows: Float[np.ndarray, "n D"], clusters: int, starts: int, iterations: int, tools: Tools
) -> Int[np.ndarray, " n"]:
    """Returns the cluster of each row, of the best of several runs of scikit-learn's k-means.

    All processes do the same, and take the result of the first, so that rounding cannot make them
    differ.
    """
    from sklearn.cluster import KMeans  # takes a second, as in `agreement`

    best, least = np.zeros(len(rows), np.int32), np.inf
    with tools.progress(starts, "start") as bar:
        for start in range(starts):
            if start:
                tools.between()
            seed = (tools.seed + start) % 2**32
            with tools.at_once():
                found = KMeans(clusters, n_init=1, max_iter=iterations, random_state=seed).fit(rows)
            if found.inertia_ < least:
                best, least = found.labels_.astype(np.int32), found.inertia_
            bar.update(1)
    return np.asarray(broadcast_one_to_all(best)) if hosts.several() else best


# Assignments


def read_assignments(path: epath.PathLike, images: Source) -> Int[np.ndarray, " n"]:
    """Returns the cluster of each image, from a file.

    Args:
        path: the file, see EXPECTED. Names are those of the files below the folder of the split,
            such as `n01440764/1.JPEG`, or of the records, such as `digits:test[3]`.
        images: the images.

    Raises:
        UserError: the file cannot be read, or its names are not those of the images.
    """
    path = epath.Path(path)
    try:
        pairs = _read_npz(path) if path.suffix == ".npz" else _read_csv(path)
    except UserError:
        raise
    except Exception as error:  # system, zip, pickle, key and value errors, depending on the file
        what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise UserError(
            f"--eval.assignments={path} {what}. Expected {EXPECTED}. Correct the file"
        ) from error
    names = [name_of(images, record) for record in range(len(images))]
    clusters = dict(pairs)
    if len(clusters) < len(pairs):
        twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        raise UserError(_wrong(path, f"assigns {_some(twice)} more than once"))
    if missing := [name for name in names if name not in clusters]:
        raise UserError(_wrong(path, f"does not assign {_some(missing)}"))
    if unknown := sorted(clusters.keys() - set(names)):
        raise UserError(
            _wrong(path, f"assigns {_some(unknown)}, which is not among the images", names[0])
        )
    return np.array([clusters[name] for name in names], np.int64)


def name_of(images: Source, record: int) -> str:
    """Returns the name of a record in files of assignments and in maps."""
    if isinstance(images, Subset):
        return name_of(images.source, int(images.records[record]))
    return (
        printable(images.files[record]) if isinstance(images, FolderSource) else images.name(record)
    )


def _read_npz(path: epath.Path) -> list[tuple[str, int]]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names, clusters = arrays["names"], arrays["clusters"]
    if names.dtype.kind != "U" or names.ndim != 1:
        raise ValueError("`names` is not a list of texts")
    if clusters.dtype.kind not in "iu" or clusters.shape != names.shape:
        raise ValueError("`clusters` is not a list of as many whole numbers as there are names")
    return list(zip(names.tolist(), clusters.tolist(), strict=True))


def _read_csv(path: epath.Path) -> list[tuple[str, int]]:
    rows = [row for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8"))) if row]
    pairs = []
    for number, row in enumerate(rows, start=1):
        if number == 1 and len(row) == 2 and not row[1].strip().lstrip("-").isdigit():
            continue  # the names of the columns
        if len(row) != 2 or not row[1].strip().lstrip("-").isdigit():
            raise ValueError(f"line {number} is {','.join(row)!r}")
        pairs.append((row[0], int(row[1])))
    return pairs


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


def _wrong(path: epath.Path, what: str, example: str = "") -> str:
    such = f" with names such as {example!r}" if example else ""
    return (
        f"--eval.assignments={path} {what}. Expected one cluster for each image of the split{such}."
        " Correct the file, or choose the split with --eval.split"
    )


# The task

NAMES = {
    "accuracy": "accuracy, one cluster per class",
    "accuracy_majority": "accuracy, clusters share classes",
    "nmi": "NMI",
    "ami": "AMI",
    "ari": "ARI",
    "fowlkes_mallows": "Fowlkes-Mallows",
}


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns the scores in percent. The SOP and MaSSL papers have no such numbers."""
    found = (
        f"{result['clusters']} clusters of {result['images']} images of {result['classes']} classes"
    )
    rows: list[list[Any]] = [["score", "%"]]
    rows += [[text, percent(result[name])] for name, text in NAMES.items()]
    parts: list[Part] = [found, rows]
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} images could not be read and were left out")
    return parts


TASK = Task(
    does="agreement of clusters with classes, by k-means or for given assignments",
    expects=(
        "labelled images: a folder with val/, with one folder per class, a packed .npz file, or a "
        "TFDS data set"
    ),
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="imagenet",
    sources=lambda inputs: {"images": inputs.images},
    paths=("assignments",),
    view=view_of,
)
