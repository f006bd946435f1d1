"""The pictures of a run: which images are shown, what they show, and what cannot be shown."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8

from sop_jax.data.folders import printable
from sop_jax.data.sources import Source
from sop_jax.data.subsets import Subset
from sop_jax.errors import UserError
from sop_jax.evaluation.task import Features
from sop_jax.evaluation.task import Subject as Evaluated
from sop_jax.evaluation.tools import Toolbox
from sop_jax.evaluation.views import view_of
from sop_jax.page import gallery
from sop_jax.page.gallery import Cell
from sop_jax.parallel.mesh import make_mesh
from sop_jax.pictures import subject
from sop_jax.pictures.attention import attention, without_cls
from sop_jax.pictures.components import components
from sop_jax.pictures.feature_map import feature_map
from sop_jax.pictures.masks import masked, without_masks
from sop_jax.pictures.neighbours import neighbours
from sop_jax.pictures.subject import Images, Trained, centre_crops, without_patches
from sop_jax.pictures.supports import Supported, supports, without_supports

NEAREST = 6  # neighbours of an image
MOST_SUPPORTS = 8  # of an anchor
MOST_HEADS = 16
BATCH = 64  # the most images that are embedded at a time
NAME = 30  # the most letters below a picture
LEVELS = {"cls": "[CLS]", "patch": "patches"}


class Samples(NamedTuple):
    """The pictures of a run.

    Attributes:
        parts: the title of each kind of picture, and its HTML.
        left_out: sentences that say what is not shown, and why.
        step: the step of the checkpoint; None if none could be loaded.
    """

    parts: list[tuple[str, str]]
    left_out: list[str]
    step: int | None


class Chosen(NamedTuple):
    """Images to look at.

    Attributes:
        names: their names.
        crops: what the network sees of them.
    """

    names: Sequence[str]
    crops: UInt8[np.ndarray, "n S S 3"]


def samples(
    workdir: epath.PathLike,
    name: str,
    shown: int,
    embedded: int,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    step: int | None = None,
    tell: Callable[[str], Any] = lambda text: None,
) -> Samples:
    """Returns the pictures of a checkpoint, and what is left out.

    Args:
        workdir: the folder of the run, which is only read.
        name: an id for the page.
        shown: the most images of each kind of picture.
        embedded: the most images of each split that are embedded, for neighbours and the map.
        seed: draws images, anchors and masks.
        data: flags that name other data, see `data.named.name_data`.
        step: the step of the checkpoint; the newest by default.
        tell: called with what is done next, because it may take minutes.

    Raises:
        UserError: the images that `data` names are not there, or there are no pictures although
            `data` or `step` asks for them.
    """
    try:
        images, own = subject.open_images(workdir, data)
        trained = subject.load(workdir, step)
    except UserError as error:
        if data or step is not None:
            raise
        return Samples([], [f"There are no pictures: {error}"], None)
    config = trained.config
    config.data = own
    config.eval.batch_size = min(config.eval.batch_size, BATCH)
    parts, left_out = [], []
    for title, draw in (
        ("Anchors and their supports", _supports),
        ("Nearest images and a map of the features", _features),
        ("What patches show", _patches),
    ):
        tell(f"drawing: {title.lower()}")
        content, missing = draw(trained, images, name, shown, embedded, seed)
        left_out += missing
        if content:
            parts.append((title, content))
    return Samples(parts, left_out, trained.step)


def _supports(
    trained: Trained, images: Images, name: str, shown: int, embedded: int, seed: int
) -> tuple[str, list[str]]:
    """Returns anchors with their supports and votes."""
    del name, embedded
    if why := without_supports(trained):
        return "", [f"There are no anchors with supports: {why}."]
    parts, left_out = [], []
    for one in supports(trained, shown, seed):
        what = LEVELS.get(one.level, one.level)
        if (one.images >= len(images.train)).any():
            left_out.append(
                f"Anchors of {what} are not shown: these images are fewer than those of the run."
            )
        elif (one.images < 0).all():
            left_out.append(
                f"Anchors of {what} are not shown: the memory has no rows of images yet."
            )
        else:
            parts.append(grid_of_supports(one, trained.config, images.train))
    return "".join(parts), left_out


def grid_of_supports(one: Supported, config: ml_collections.ConfigDict, train: Source) -> str:
    """Returns anchors with their supports and votes as HTML, one row for each anchor.

    Args:
        one: what is drawn.
        config: the config of the run; `data` is that of `train`.
        train: the images that the memory knows by their index.
    """
    what = LEVELS.get(one.level, one.level)
    count = min(one.images.shape[1], 1 + MOST_SUPPORTS)
    records = np.unique(one.images[one.images >= 0])
    crops, readable = centre_crops(train, records.tolist(), config)
    crop_of = {
        int(record): crop
        for record, crop, fine in zip(records, crops, readable, strict=True)
        if fine
    }
    rows = []
    for own, cosines, votes in zip(one.images, one.cosines, one.votes, strict=True):
        cells = []
        for column, record in enumerate(own[:count].tolist()):
            role = f"support {column}" if column else "anchor"
            text = f"vote {votes[column]:.2f}"
            if column:
                text += f"\ncosine {cosines[column]:.2f}"
                text += "\nthe anchor's image" if record == own[0] >= 0 else ""
            text += "\na random row" if record < 0 else ""
            name = "a random row" if record < 0 else name_of(train, record, config.data)
            cells.append(Cell(crop_of.get(record), text, f"{role}: {name}"))
        rows.append(cells)
    columns = ["anchor", *(f"support {n}" for n in range(1, count))]
    caption = (
        f"Prototypes of {what}, as the next step could draw them: {len(rows)} of "
        f"{one.prototypes:,}. "
    )
    if count > 1:
        caption += (
            "Each row is an anchor and its nearest supports in the memory. The vote is what a row "
            "gives to its own prototype; the rest of 1 is spread over the others. Supports should "
            "be other images of the same kind; where all rows show the same images, the run "
            "collapses."
        )
    else:
        columns, rows = [f"anchor {n + 1}" for n in range(len(rows))], [[x for (x,) in rows]]
        caption += f"Anchors of {what} have no supports in this run."
    if one.level == "patch":
        caption += " The memory knows the image of each patch, but not the place in it."
    return gallery.grid(columns, rows, caption)


def _features(
    trained: Trained, images: Images, name: str, shown: int, embedded: int, seed: int
) -> tuple[str, list[str]]:
    """Returns the nearest images of some, and a map."""
    mesh, view = make_mesh(), view_of(trained.config)
    network = Evaluated("", trained.config, trained.model, trained.teacher, "", trained.step)
    tools = Toolbox(network, mesh, seed=seed, shown=False)
    sources = [images.train] if images.test is None else [images.train, images.test]
    drawn = [_draw(source, embedded, seed) for source in sources]
    found = [tools.whole(tools.features(source, view)) for source in drawn]
    if len(found[0].index) < 3 or not len(found[-1].index):
        return "", ["There are no nearest images and no map: too few images can be read."]
    parts = [
        _grid_of_neighbours(trained, drawn, found, shown, images.test is None),
        _map(trained, drawn[-1], found[-1], name, seed, images.test is None),
    ]
    return "".join(parts), []


def _draw(source: Source, most: int, seed: int) -> Source:
    drawn = np.random.default_rng(seed).permutation(len(source))[:most]
    return Subset(source, np.sort(drawn))


def _grid_of_neighbours(
    trained: Trained,
    sources: Sequence[Source],
    found: Sequence[Features],
    shown: int,
    same: bool,
) -> str:
    gallery_of, queries_of = sources[0], sources[-1]
    known, asked = found[0], found[-1]
    rows = np.sort(np.random.default_rng(1).permutation(len(asked.index))[:shown])
    themselves = [[row] for row in rows.tolist()] if same else []
    near = neighbours(asked.vectors[rows], known.vectors, NEAREST, themselves)
    lines = []
    right = total = 0
    for row, places, cosines in zip(rows, near.places, near.cosines, strict=True):
        record, label = int(asked.index[row]), int(asked.labels[row])
        crops, _ = centre_crops(queries_of, [record], trained.config)
        name = name_of(queries_of, record, trained.config.data)
        cells = [Cell(crops[0], _text(queries_of, name, label), f"query: {name}")]
        crops, readable = centre_crops(gallery_of, known.index[places].tolist(), trained.config)
        for number, (place, cosine) in enumerate(zip(places, cosines, strict=True)):
            own = int(known.index[place])
            other = name_of(gallery_of, own, trained.config.data)
            kind = _class(gallery_of, int(known.labels[place]))
            text = f"cosine {cosine:.2f}" + (f"\n{kind}" if kind else "")
            image = crops[number] if readable[number] else None
            cells.append(Cell(image, text, f"neighbour {number + 1}: {other}"))
            if label >= 0 and known.labels[place] >= 0:
                total += 1
                right += int(known.labels[place] == label)
        lines.append(cells)
    split = "train" if same else "test"
    caption = (
        f"Nearest images of some {split} images. The first of each row is the query; the others "
        f"are its nearest among {len(known.index):,} train images by the cosine of their features."
    )
    if total:
        caption += f" {right} of {total} are of the query's class."
    columns = [f"{split} image", *(f"nearest {n + 1}" for n in range(near.places.shape[1]))]
    return gallery.grid(columns, lines, caption)


def _map(
    trained: Trained, source: Source, found: Features, name: str, seed: int, same: bool
) -> str:
    at, how = feature_map(found.vectors, seed)
    crops, _ = centre_crops(source, found.index.tolist(), trained.config)
    names = [name_of(source, int(record), trained.config.data) for record in found.index]
    classes = [_class(source, label) for label in range(int(found.labels.max()) + 1)]
    split = "train" if same else "test"
    caption = (
        f"Map of the features of {len(names):,} {split} images, by {how}. Near points have similar "
        "features. The pointer, or the arrow keys, show the image of a point."
    )
    if classes:
        caption += " Colours are classes, which the network has not seen."
    points = gallery.Points(f"{name}-map", at, crops, names, found.labels, classes)
    return gallery.feature_map(points, caption)


def _patches(
    trained: Trained, images: Images, name: str, shown: int, embedded: int, seed: int
) -> tuple[str, list[str]]:
    """Returns attention, principal components, and masked images with what the loss compares."""
    del name, embedded
    config, left_out, parts = trained.config, [], []
    chosen = _choose(images, config, shown, seed)
    if not chosen.names:
        return "", ["There are no pictures of patches: none of the drawn images can be read."]
    if why := without_patches(config):
        left_out.append(f"Principal components of patches are not shown: {why}.")
    elif np.prod(chosen.crops.shape[:3]) < 3 * trained.model.patch**2:
        left_out.append("Principal components of patches are not shown: there are too few patches.")
    else:
        colours = components(config, trained.model, trained.teacher, chosen.crops)
        weights = None
        if why := without_cls(config):
            left_out.append(f"Attention is not shown: {why}.")
        else:
            weights = attention(config, trained.model, trained.teacher, chosen.crops)
        parts.append(_grid_of_tokens(chosen, colours, weights))
    if why := without_masks(trained):
        left_out.append(f"Masked images are not shown: {why}.")
    else:
        parts.append(_grid_of_masks(chosen, trained, seed))
    return "".join(parts), left_out


def _choose(images: Images, config: Any, shown: int, seed: int) -> Chosen:
    source = images.train if images.test is None else images.test
    drawn = np.random.default_rng(seed).permutation(len(source))[: 2 * shown]
    crops, readable = centre_crops(source, drawn.tolist(), config)
    names = [name_of(source, int(record), config.data) for record in drawn[readable][:shown]]
    return Chosen(names, crops[readable][:shown])


def _grid_of_tokens(
    chosen: Chosen,
    colours: UInt8[np.ndarray, "n h w 3"],
    weights: Float[np.ndarray, "n heads h w"] | None,
) -> str:
    """Returns principal components of patches, and the attention of [CLS] to them."""
    heads = 0 if weights is None else weights.shape[1]
    shown = min(heads, MOST_HEADS)
    rows = []
    for place, (name, crop) in enumerate(zip(chosen.names, chosen.crops, strict=True)):
        cells = [
            Cell(crop, _short(name), f"image: {name}"),
            Cell(colours[place], "components", f"principal components of the patches of {name}"),
        ]
        for head in range(shown):
            assert weights is not None
            own = weights[place, head]
            row, column = np.unravel_index(own.argmax(), own.shape)
            alt = f"attention of head {head + 1}, most at row {row + 1}, column {column + 1}"
            heat = _heat(own, 0.0, float(own.max()))
            cells.append(Cell(heat, f"{100 * own.sum():.0f} % on patches", alt))
        rows.append(cells)
    caption = (
        "Tokens of patches, and attention. Red, green and blue are the first three principal "
        "components of the tokens of all of these images: patches with like colours have like "
        "tokens, in different images too."
    )
    if heads:
        caption += (
            " Then the attention of [CLS] in the last layer, head by head: yellow patches have the "
            "most weight of a head in an image, and dark ones none. Heads that differ and follow "
            "objects are a sign of learning. The rest of the weight is on [CLS] itself and on "
            "registers."
        )
    if shown < heads:
        caption += f" {heads - shown} more heads are not shown."
    columns = ["image", "patches", *(f"head {n + 1}" for n in range(shown))]
    return gallery.grid(columns, rows, caption)


def _grid_of_masks(chosen: Chosen, trained: Trained, seed: int) -> str:
    found = masked(trained, chosen.crops, seed)
    rows = []
    for place, (name, crop) in enumerate(zip(chosen.names, chosen.crops, strict=True)):
        mask, cosines = found.masks[place], found.cosines[place]
        hidden = _hide(crop, mask)
        cells = [
            Cell(crop, _short(name), f"image: {name}"),
            Cell(hidden, f"{100 * mask.mean():.0f} % masked", f"{name} with masked patches"),
        ]
        if mask.any():
            text = f"mean cosine {cosines[mask].mean():.2f}"
            alt = f"cosines of masked patches, from {cosines[mask].min():.2f} to "
            alt += f"{cosines[mask].max():.2f}"
            cells.append(Cell(_only(_heat(cosines, 0.0, 1.0), mask), text, alt))
            if found.choices is not None:
                same = found.choices[0, place] == found.choices[1, place]
                text = f"{int(same[mask].sum())} of {int(mask.sum())} the same"
                drawn = np.where(same[..., None], np.uint8(230), np.uint8(90)).repeat(3, axis=-1)
                alt = f"masked patches with the same nearest prototype: {text}"
                cells.append(Cell(_only(drawn.astype(np.uint8), mask), text, alt))
        rows.append(cells)
    columns = ["image", "what the student sees", "cosine of student and teacher"]
    caption = (
        "Masked images, and what the loss of masked patches compares. The teacher sees the whole "
        "image. At each masked patch, the loss compares how student and teacher assign its "
        "embedding to prototypes; here is the cosine of the two embeddings, from 0, dark, to 1, "
        "yellow."
    )
    if found.choices is not None:
        columns.append("the same prototype")
        caption += " Light patches have the same nearest prototype for both, dark ones another."
    return gallery.grid(columns, rows, caption)


def _heat(values: Float[np.ndarray, "h w"], low: float, high: float) -> UInt8[np.ndarray, "h w 3"]:
    """Returns values as colours, from dark for `low` to yellow for `high`."""
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    levels = (255 * scaled).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _hide(
    image: UInt8[np.ndarray, "S S 3"], mask: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "S S 3"]:
    """Returns an image with its masked patches in grey."""
    side = image.shape[0] // mask.shape[0]
    large = mask.repeat(side, axis=0).repeat(side, axis=1)
    return np.where(large[..., None], np.uint8(128), image)


def _only(
    colours: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns colours at masked patches, and grey elsewhere."""
    return np.where(mask[..., None], colours, np.uint8(160))


def name_of(source: Source, record: int, data: ml_collections.ConfigDict) -> str:
    """Returns the name of an image, without the folders in which the data is.

    Args:
        source: where the image is from.
        record: its index.
        data: `config.data` of the source.
    """
    name = printable(source.name(record))
    if data.source == "tfds" and data.name:
        return name[name.find(f"/{re.split('[:/]', data.name)[0]}/") + 1 :]
    if not data.path:
        return name
    root = printable(str(epath.Path(data.path)))
    if name.startswith(f"{root}:"):  # a packed file, or the folder of one TFDS data set
        return name[root.rfind("/") + 1 :]
    return name.removeprefix(f"{root.rstrip('/')}/")


def _class(source: Source, label: int) -> str:
    """Returns the name of a class, its number if it has no name, and "" for no class."""
    if label < 0:
        return ""
    names = source.class_names
    return f"class {printable(names[label]) if names is not None else label}"


def _text(source: Source, name: str, label: int) -> str:
    kind = _class(source, label)
    return _short(name) + (f"\n{kind}" if kind else "")


def _short(name: str) -> str:
    """Returns the end of a path, with its middle left out if it is long."""
    name = name.rstrip("/").split("/")[-1]
    return name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}…{name[-NAME // 2 :]}"
