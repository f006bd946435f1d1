"""Maps of features in two dimensions by t-SNE, coloured by class.

The SOP paper's `tsne_visualization.py` has the same perplexity, random start and automatic rate,
but draws no seed and computes three dimensions, of which the paper shows two.
"""

import csv
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import broadcast_one_to_all
from jaxtyping import Float, Int

from sop_jax.data.folders import printable
from sop_jax.data.sources import Source
from sop_jax.data.subsets import Subset
from sop_jax.errors import UserError
from sop_jax.evaluation.cluster import SPLITS, name_of
from sop_jax.evaluation.scatter import Points, draw_html, draw_png
from sop_jax.evaluation.splits import open_split
from sop_jax.evaluation.tables import Part
from sop_jax.evaluation.task import Subject, Task, Tools
from sop_jax.evaluation.views import VIEW_RULES, view_of, view_settings
from sop_jax.parallel import hosts
from sop_jax.paths import write_whole
from sop_jax.rules import one_of, positive, whole

LEAST_ITERATIONS = 300  # the first 250 exaggerate attractions, without measuring the divergence

FILES = ("tsne.png", "tsne.html", "tsne.csv")

RULES = VIEW_RULES | {
    "split": one_of(SPLITS),
    "images": whole(2),
    "perplexity": positive(),
    "iterations": whole(LEAST_ITERATIONS),
    "start": one_of(("random", "pca")),
}


class Inputs(NamedTuple):
    """The data of the task.

    Attributes:
        images: the images of the map.
    """

    images: Source


def settings() -> ml_collections.ConfigDict:
    """Returns the defaults.

    `split` is "test" or "train", and `images` the most images that are drawn from it, by the seed.
    `perplexity`, `iterations` and `start`, which is "random" or "pca", are those of t-SNE. The
    others say what the features are.
    """
    own = dict(split="test", images=2000, perplexity=30.0, iterations=1000, start="random")
    return ml_collections.ConfigDict({**own, **view_settings()})


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Inputs:
    """Opens the images and draws those of the map; see `task.Open`."""
    view_of(config, settings)
    source = open_split(config, data, settings.split, "tsne")
    count = min(settings.images, len(source))
    _check_perplexity(settings.perplexity, count)
    if count == len(source):
        return Inputs(source)
    drawn = np.random.default_rng(config.seed).permutation(len(source))[:count]
    return Inputs(Subset(source, np.sort(drawn)))


def _check_perplexity(perplexity: float, count: int) -> None:
    if perplexity >= count:
        raise UserError(
            f"eval.perplexity is {perplexity:g}, but the map has {count} images. Expected a "
            "perplexity less than the number of images, which is that of the neighbours that "
            "matter. Choose a smaller one, or more images"
        )


def run(
    subject: Subject, inputs: Inputs, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Writes tsne.png, tsne.html and tsne.csv.

    Returns:
        The numbers of `images` and of `unreadable` images; `divergence`, the Kullback-Leibler
        divergence that t-SNE minimizes; and `files`, the names of the files that were written.
    """
    features = tools.whole(tools.features(inputs.images, view_of(subject.config, settings)))
    _check_perplexity(settings.perplexity, len(features.index))
    tools.note(f"computing the map of {len(features.index)} images")
    with tools.at_once():
        at, divergence = embed(features.vectors, settings, tools.seed)
    if tools.folder is None:
        tools.note("the map is not saved, because the folder cannot be written to")
    elif hosts.is_first():
        title = f"t-SNE of {len(features.index)} images, {subject.name}"
        names = [name_of(inputs.images, int(record)) for record in features.index]
        classes = _class_names(inputs.images, features.labels)
        _save(tools.folder, Points(title, at, names, features.labels, classes))
    if tools.folder is not None:
        tools.note(f"the map is in {tools.folder}: {', '.join(FILES)}")
    return {
        "images": len(features.index),
        "unreadable": len(features.corrupt),
        "divergence": divergence,
        "files": list(FILES) if tools.folder is not None else [],
    }


def embed(
    vectors: Float[np.ndarray, "n D"], settings: ml_collections.ConfigDict, seed: int
) -> tuple[Float[np.ndarray, "n 2"], float]:
    """Returns the positions of rows in the map, and the divergence that is left.

    All processes do the same, and take the result of the first, so that rounding cannot make them
    differ.
    """
    from sklearn.manifold import TSNE  # takes a second, as in `agreement`

    method = TSNE(
        2,
        perplexity=settings.perplexity,
        max_iter=settings.iterations,
        init=settings.start,
        random_state=seed,
    )
    at = method.fit_transform(vectors).astype(np.float32)
    divergence = np.float32(method.kl_divergence_)
    if hosts.several():
        at, divergence = broadcast_one_to_all((at, divergence))
    return np.asarray(at), float(divergence)


def _class_names(source: Source, labels: Int[np.ndarray, " n"]) -> list[str]:
    """Returns the names of the classes; their numbers if they have no names."""
    if source.class_names is not None:
        return [printable(name) for name in source.class_names]
    return [str(label) for label in range(int(labels.max()) + 1)]


def as_csv(points: Points) -> str:
    """Returns a table of the points, one line for each."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["name", "class", "x", "y"])
    for name, label, (x, y) in zip(points.names, points.labels, points.at, strict=True):
        rows.writerow([name, points.classes[label] if label >= 0 else "", f"{x:.4f}", f"{y:.4f}"])
    return text.getvalue()


def _save(folder: epath.Path, points: Points) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    draw_png(points).save(content, "PNG")
    (folder / "tsne.png").write_bytes(content.getvalue())
    write_whole(folder / "tsne.html", draw_html(points))
    write_whole(folder / "tsne.csv", as_csv(points))


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns where the map is, and how well it keeps the neighbours of the features."""
    where = f"is in {', '.join(result['files'])}" if result["files"] else "was not saved"
    parts: list[Part] = [
        f"a map of {result['images']} images {where}",
        f"Kullback-Leibler divergence: {result['divergence']:.3f}",
    ]
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} images could not be read and were left out")
    return parts


TASK = Task(
    does="a map of the features in two dimensions, coloured by class",
    expects=(
        "images: a folder with val/, with one folder per class, a packed .npz file, or a TFDS data "
        "set; without labels, all points have the same colour"
    ),
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="imagenet",
    sources=lambda inputs: {"images": inputs.images},
    view=view_of,
)
