"""Image retrieval with frozen features, by iBOT's and the SOP paper's protocol.

The revisited Oxford and Paris sets are ranked by the cosine of features that are averaged over
three scales, without whitening (iBOT's `eval_image_retrieval.py` with the options of its run.sh).
That script prints the medium and hard protocols only; here the easy one is reported as well. Images
that cannot be read are ranked last, and queries that cannot be read are left out of the means.

With `images`, the task finds the nearest images of any folder instead.
"""

import csv
import io
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int

from sop_jax import paths
from sop_jax.data import sources
from sop_jax.data.decode import decoding, load_image
from sop_jax.data.folders import FolderSource, folder_source, printable
from sop_jax.data.named import LOOKED_AT, name_folder, use_folder
from sop_jax.data.revisited import EXPECTED, SETS, Revisited, open_revisited
from sop_jax.data.sources import Source
from sop_jax.data.thumbnails import thumbnail
from sop_jax.errors import UserError
from sop_jax.evaluation import ranking
from sop_jax.evaluation.contact_sheet import TILE, Tile, contact_sheet
from sop_jax.evaluation.scales import SCALES
from sop_jax.evaluation.tables import Part, percent
from sop_jax.evaluation.task import (
    POOLS,
    Features,
    Subject,
    Task,
    Tools,
    View,
    check_unused,
)
from sop_jax.evaluation.views import view_of
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import put, replicated, split
from sop_jax.parallel.search import nearest
from sop_jax.rules import COUNT, TEXT, one_of, positive, some

CHUNK = 1024  # queries at a time; the last chunk is padded, so that all share one program
SHOWN = 10  # the most neighbours in a row of the contact sheet
FILES = ("neighbours.csv", "neighbours.png")

RULES = {
    "sets": some(one_of(SETS)),
    "images": TEXT,
    "neighbours": COUNT,
    "rows": COUNT,
    "longest": COUNT,
    "scales": some(positive(1)),
    "layers": COUNT,
    "pool": one_of(POOLS),
}

# Table 5 of the SOP paper: mAP in percent, of ViT-B/16; M and H of Oxford, then of Paris.
PAPER = {
    "DINO": (37.4, 13.7, 63.5, 35.6),
    "iBOT": (36.8, 14.3, 64.1, 36.6),
    "MaSSL": (39.3, 14.1, 65.8, 38.1),
    "SOP": (42.7, 17.5, 67.3, 41.3),
}


class Inputs(NamedTuple):
    """The data of the task.

    Attributes:
        sets: the revisited sets to rank.
        images: the folder to search; None to rank the sets.
    """

    sets: tuple[Revisited, ...]
    images: FolderSource | None


def settings() -> ml_collections.ConfigDict:
    """Returns the defaults.

    `sets` are the sets to rank. `images` is a folder to search instead; `neighbours` are then found
    for each of its images, and the contact sheet has `rows` queries. `longest` and `scales` say how
    images are scaled, and `layers` and `pool` what their features are.
    """
    return ml_collections.ConfigDict(
        dict(
            sets=SETS,
            images="",
            neighbours=10,
            rows=20,
            longest=512,
            scales=SCALES,
            layers=1,
            pool="cls",
        )
    )


def view(config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict) -> View:
    """Returns what the features are."""
    names = ("longest", "layers", "pool")
    own = {name: settings[name] for name in names} | {"scales": tuple(settings.scales)}
    return view_of(config, None, **own)


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Inputs:
    """Opens the revisited sets, or the folder to search; see `task.Open`."""
    view(config, settings)
    _check_use(settings, data)
    if not settings.images:
        root = name_folder(config.data, data, EXPECTED)
        return Inputs(tuple(open_revisited(root, name) for name in settings.sets), None)
    images = folder_source(settings.images)
    if len(images) < 2:
        raise UserError(
            f"--eval.images={settings.images} contains one image only. Expected at least two, so "
            "that each has a neighbour. Name another folder"
        )
    use_folder(config.data, settings.images, data)
    if hosts.is_first():
        for note in sources.notes(images):
            print(note, file=sys.stderr)
    return Inputs((), images)


def _check_use(settings: ml_collections.ConfigDict, data: Mapping[str, Any]) -> None:
    """Raises UserError for a setting or a flag that has no effect because of `images`."""
    if not settings.images:
        check_unused(TASK, settings, ("neighbours", "rows"), "it is for --eval.images")
        return
    check_unused(TASK, settings, ("sets",), "--eval.images is searched instead")
    if given := sorted(data.keys() & {"source", *LOOKED_AT["tfds"]}):
        raise UserError(
            f"--data.{given[0]}={data[given[0]]} would have no effect with --eval.images, which "
            "is the folder that is searched; leave one of them out"
        )


def run(
    subject: Subject, inputs: Inputs, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Ranks the sets, or searches the folder.

    Returns:
        For each set and each of the protocols E, M and H: `map`, and `mp_at_1`, `mp_at_5` and
        `mp_at_10`, shares in [0, 1], and the number of `unreadable` images. For a folder, the
        numbers of `images`, of `neighbours` per image and of `unreadable` images, and `files`, the
        names of the files that were written.
    """
    what = view(subject.config, settings)
    if inputs.images is None:
        return {one.name: _rank_set(one, what, tools) for one in inputs.sets}
    features = tools.whole(tools.features(inputs.images, what))
    if len(features.index) < 2:
        raise UserError(
            f"{inputs.images.root} has {len(inputs.images)} images, but fewer than two of them "
            "can be read. Expected at least two. Copy the images again"
        )
    k = min(settings.neighbours, len(features.index) - 1)
    found = find_neighbours(unit(features.vectors), k, tools.mesh, tools.between)
    if tools.folder is None:
        tools.note("the neighbours are not saved, because the folder cannot be written to")
    elif hosts.is_first():
        _save(tools.folder, subject.config, inputs.images, features, found, settings.rows)
    if tools.folder is not None:
        tools.note(f"the neighbours are in {tools.folder}: {', '.join(FILES)}")
    return {
        "images": len(features.index),
        "neighbours": k,
        "unreadable": len(features.corrupt),
        "files": list(FILES) if tools.folder is not None else [],
    }


# Rankings


def _rank_set(one: Revisited, view: View, tools: Tools) -> dict[str, Any]:
    images = tools.whole(tools.features(one.images, view))
    queries = tools.whole(tools.features(one.queries, view))
    similarity = np.full((len(one.images), len(queries.index)), -np.inf)
    known, asked = (unit(x.vectors).astype(np.float64) for x in (images, queries))
    similarity[images.index] = known @ asked.T
    ranks = ranking.rank(similarity)
    truth = [one.truth[query] for query in queries.index]
    result: dict[str, Any] = {}
    for protocol in ranking.PROTOCOLS:
        scores = ranking.evaluate(ranks, truth, protocol)
        result[protocol] = {"map": _number(scores.mean_ap)} | {
            f"mp_at_{k}": _number(precision)
            for k, precision in zip(ranking.CUTOFFS, scores.mean_precision, strict=True)
        }
    return result | {"unreadable": len(images.corrupt) + len(queries.corrupt)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def unit(vectors: Float32[np.ndarray, "n D"]) -> Float32[np.ndarray, "n D"]:
    """Returns the rows scaled to unit norm; a row of zeros remains zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# Neighbours


class Neighbours(NamedTuple):
    """The nearest rows of each row, the nearest first, without the row itself."""

    cosines: Float32[np.ndarray, "n k"]
    rows: Int[np.ndarray, "n k"]


def find_neighbours(
    vectors: Float32[np.ndarray, "n D"],
    k: int,
    mesh: Mesh,
    between: Callable[[], Any] | None = None,
) -> Neighbours:
    """Returns the k nearest other rows of each row.

    Args:
        vectors: unit vectors, the same in all processes.
        k: less than n.
        mesh: the devices, over which the rows are split.
        between: called before each chunk of queries but the first; it may raise.
    """
    count = len(vectors)
    rows = put(np.pad(vectors, ((0, -count % mesh.devices.size), (0, 0))), split(mesh))
    present = put(np.arange(len(rows)) < count, split(mesh))
    chunk = min(CHUNK, count)
    parts = []
    for start in range(0, count, chunk):
        if start and between:
            between()
        own = np.minimum(np.arange(start, start + chunk), count - 1).astype(np.int32)
        queries, numbers = (put(x, replicated(mesh)) for x in (vectors[own], own))
        parts.append(jax.device_get(_nearest(queries, rows, present, numbers, k, mesh)))
    cosines, found = (np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True))
    return Neighbours(cosines, found)


@partial(jax.jit, static_argnames=("k", "mesh"))
def _nearest(
    queries: Float[Array, "Q D"],
    rows: Float[Array, "N D"],
    present: Bool[Array, " N"],
    own: Int[Array, " Q"],
    k: int,
    mesh: Mesh,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    found = nearest(queries, rows, k, mesh, allowed=present, own=own)
    whole: Any = jax.lax.with_sharding_constraint(found, replicated(mesh))  # every process reads it
    return whole


def _save(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    images: FolderSource,
    features: Features,
    found: Neighbours,
    rows: int,
) -> None:
    """Writes neighbours.csv, with all neighbours, and neighbours.png, with those of some images."""
    names = [printable(images.files[record]) for record in features.index]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["query", "rank", "neighbour", "cosine"])
    for query, (cosines, others) in enumerate(zip(*found, strict=True)):
        for rank, (cosine, other) in enumerate(zip(cosines, others, strict=True), start=1):
            table.writerow([names[query], rank, names[other], f"{cosine:.6f}"])
    folder.mkdir(parents=True, exist_ok=True)
    paths.write_whole(folder / "neighbours.csv", text.getvalue())

    def tile(row: int, note: str) -> Tile:
        return Tile(_small(images, int(features.index[row]), config), names[row], note)

    sheet = []
    for query in np.unique(np.linspace(0, len(names) - 1, rows).astype(int)).tolist():
        pairs = zip(found.cosines[query, :SHOWN], found.rows[query, :SHOWN].tolist(), strict=True)
        sheet.append([tile(query, "query"), *(tile(row, f"{cosine:.3f}") for cosine, row in pairs)])
    content = io.BytesIO()
    contact_sheet(sheet).save(content, "PNG")
    (folder / "neighbours.png").write_bytes(content.getvalue())


def _small(images: Source, record: int, config: ml_collections.ConfigDict) -> np.ndarray | None:
    """Returns a thumbnail, or None if the image, which could be read before, no longer can."""
    try:
        return thumbnail(load_image(images, record, decoding(config.data, images)), TILE)
    except ValueError:
        return None


# The task


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns mAP and mP@k in percent, and the papers' mAP."""
    if settings.images:
        where = f"are in {', '.join(result['files'])}" if result["files"] else "were not saved"
        found = f"{result['neighbours']} nearest neighbours of each of {result['images']} images"
        return [f"{found} {where}", *_unreadable("folder", result["unreadable"])]
    names = ["map", *(f"mp_at_{k}" for k in ranking.CUTOFFS)]
    rows: list[list[Any]] = [["set", "protocol", "mAP", *(f"mP@{k}" for k in ranking.CUTOFFS)]]
    notes = []
    for name, scores in result.items():
        for protocol in ranking.PROTOCOLS:
            values = [percent(scores[protocol][key]) for key in names]
            rows.append([name, protocol, *values])
        notes += _unreadable(name, scores["unreadable"])
    paper: list[list[Any]] = [["ViT-B/16", "Oxford M", "H", "Paris M", "H"]]
    paper += [[method, *values] for method, values in PAPER.items()]
    title = "mAP in table 5 of the SOP paper:"
    return [rows, *notes, title, paper]


def _unreadable(name: str, count: int) -> list[str]:
    return [f"{name}: {count} images could not be read"] if count else []


def sources_of(inputs: Inputs) -> dict[str, Source | None]:
    """Returns the sources, which identify the data in a result."""
    if inputs.images is not None:
        return {"images": inputs.images}
    found: dict[str, Source | None] = {}
    for one in inputs.sets:
        found |= {one.name: one.images, f"{one.name}_queries": one.queries}
    return found


TASK = Task(
    does="image retrieval: the revisited Oxford and Paris sets, or neighbours in any folder",
    expects=f"{EXPECTED}; or any folder of images, named by --eval.images=FOLDER",
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="revisited_paris_oxford",
    sources=sources_of,
    paths=("images",),
)
