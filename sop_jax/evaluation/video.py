"""Video object segmentation: the objects of the first frame of a clip, found in the other frames.

The protocol is that of DINO and iBOT (`eval_video_segmentation.py`) on DAVIS-2017, scored as by
davis2017-evaluation for the semi-supervised task: J, F and their mean, over all objects of all
clips, without the first and last frame.

Properties of the official protocol that are kept: an object that is too small to be on the grid of
tokens in the first frame is lost, which the results report; void pixels (255) of true masks count
as background in J and F; and the standard deviation of red is .228, where the networks were trained
with .229 (`red_std`).
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import cv2
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Array, Float32, Float64, UInt8

from sop_jax import models
from sop_jax.data import davis
from sop_jax.data.davis import Clip
from sop_jax.data.listed import ListedFiles
from sop_jax.errors import UserError
from sop_jax.evaluation import overlap, propagation
from sop_jax.evaluation.tables import Part, percent
from sop_jax.evaluation.task import Subject, Task, Tools
from sop_jax.parallel import hosts
from sop_jax.paths import write_whole
from sop_jax.rules import COUNT, COUNT_OR_ZERO, POSITIVE, one_of

MULTIPLE = 64  # the longer side of frames is rounded down to a multiple of this, in pixels

# J&F, J and F in percent; table 4 of the SOP paper.
PAPER = {
    "DINO ViT-S/16": (61.8, 60.2, 63.4),
    "DINO ViT-B/16": (62.3, 60.7, 63.9),
    "iBOT ViT-S/16": (61.8, 60.4, 63.2),
    "iBOT ViT-B/16": (62.7, 61.7, 63.7),
    "SOP ViT-B/16": (63.3, 61.7, 65.0),
}

RULES = {
    "short_side": COUNT,
    "neighbourhood": COUNT_OR_ZERO,
    "top_k": COUNT,
    "temperature": POSITIVE,
    "last_frames": COUNT,
    "red_std": POSITIVE,
    "masks": one_of(("soft", "hard")),
}

Scores = dict[str, float]  # J_mean, J_recall, J_decay, F_mean, F_recall, F_decay
Look = Callable[[UInt8[np.ndarray, "H W 3"]], Float32[Array, "h w D"]]


class Record(TypedDict):
    """What is known of a clip.

    Attributes:
        frames: the number of frames.
        objects: the number of objects.
        lost: the objects that are too small to be on the grid of tokens in the first frame.
        scores: for each object; empty without true masks or for fewer than three frames.
    """

    frames: int
    objects: int
    lost: list[int]
    scores: list[Scores]


class Inputs(NamedTuple):
    """The clips, and all their frames as one source."""

    clips: list[Clip]
    frames: ListedFiles


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of the papers.

    `short_side` is in pixels. `neighbourhood` is in tokens, for any size of patches; the best
    `top_k` tokens of the first and the `last_frames` frames are averaged. `masks` says whether the
    propagated masks stay `soft` for later frames, or become `hard`: each token wholly the object
    with the largest share. `red_std` is the divisor of red; the other channels are as in training.
    """
    return ml_collections.ConfigDict(
        dict(
            short_side=480,
            neighbourhood=12,
            top_k=5,
            temperature=0.1,
            last_frames=7,
            red_std=0.228,
            masks="soft",
        )
    )


def open_clips(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Inputs:
    """Opens the clips in the folder `path`, all or those of the list `test_split`.

    `config.data` is updated to them.

    Raises:
        UserError: no folder is named, or `open_davis` finds fault with it; another flag is given;
            or the network has no patch tokens, or larger ones than frames.
    """
    family, side = config.model.family, models.token_side(config.model)
    if not models.FAMILIES[family].patches:
        raise UserError(
            f"a {family} has no tokens of patches, by which the task video finds objects; expected "
            "a network with patches, such as a ViT or a Swin; evaluate another run or file"
        )
    if settings.short_side < max(side, MULTIPLE):
        raise UserError(
            f"eval.short_side={settings.short_side} leaves no room for a token of {side} pixels; "
            f"expected at least {max(side, MULTIPLE)}; the papers use 480"
        )
    if unused := sorted(data.keys() - {"path", "test_split"}):
        raise UserError(
            f"--data.{unused[0]}={data[unused[0]]} would have no effect: the task video reads the "
            "clips of --data.path, those of the list --data.test_split; leave the flag out"
        )
    if not data.get("path"):
        raise UserError(
            f"the task video needs clips, and no folder is named. Expected {davis.EXPECTED}. Give "
            "the folder that contains JPEGImages with --data.path"
        )
    clips = davis.open_davis(data["path"], data.get("test_split"))
    split = davis.usual_split(data["path"])
    config.data.update(source="folder", name="", train_split="", test_split=split)
    config.data.update(data)
    return Inputs(clips, davis.frames_of(data["path"], clips))


def measure_clips(
    subject: Subject, inputs: Inputs, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Propagates the masks of all clips and scores them.

    Each process computes whole clips. Masks are written to `tools.folder`/CLIP, and the record of a
    finished clip to `tools.folder`/CLIP.json until all are finished: after an interruption, these
    clips are not computed again.

    Returns:
        `JF_mean`, the mean of J and F; `J_mean`, `J_recall`, `J_decay`, and the same of F, all
        means over the objects of all clips, as shares in [0, 1], None where there are no scores;
        `objects`, their number; `files`, the folders of masks that were written; and `clips`, which
        has the same of each clip, and its `Record`.
    """
    look = make_look(subject, settings.red_std)
    longest_first = sorted(inputs.clips, key=lambda clip: -len(clip.frames))
    place, places = jax.process_index(), jax.process_count()
    mine: dict[str, Record | None] = {}
    with tools.progress(len(inputs.frames), "frame") as bar:
        for start in range(0, len(longest_first), places):
            together = longest_first[start : start + places]  # one clip for each process
            own = together[place : place + 1]
            work = (
                finish(own[0], look, subject.model.patch, settings, tools.folder)
                if own
                else iter(())
            )
            record: Record | None = None
            for frame in range(len(together[0].frames)):
                tools.between()
                record = next(work, None) or record
                bar.update(sum(frame < len(clip.frames) for clip in together))
            mine |= {clip.name: record for clip in own}
    every: dict[str, Any] = {}
    for text in hosts.gather(json.dumps(mine), hosts.END_TIMEOUT):
        every |= json.loads(text)
    if tools.folder is not None:  # the records of clips are for a measurement that is interrupted
        for name in mine:
            (tools.folder / f"{name}.json").unlink(missing_ok=True)
    records = [every[clip.name] for clip in inputs.clips]
    return {
        **summary([row for record in records for row in record["scores"]]),
        "objects": sum(record["objects"] for record in records),
        "files": [clip.name for clip in inputs.clips] if tools.folder is not None else [],
        "clips": {
            clip.name: {**record, **summary(record["scores"])}
            for clip, record in zip(inputs.clips, records, strict=True)
        },
    }


def finish(
    clip: Clip,
    look: Look,
    patch: int,
    settings: ml_collections.ConfigDict,
    folder: epath.Path | None,
) -> Iterator[Record | None]:
    """Propagates the masks of a clip and scores them, a frame at a time.

    Args:
        clip: the clip.
        look: see `make_look`.
        patch: the pixels on each side of the square that a token stands for.
        settings: the settings of the task.
        folder: where masks and the record are written; None to write nothing. A clip whose record
            is there is not computed again.

    Yields:
        None after each frame but the last, then the record.

    Raises:
        UserError: a file of the clip cannot be read, or the folder cannot be written to.
    """
    about = {
        "versions": hosts.versions(),
        "clip": [len(clip.frames), len(clip.masks), clip.objects, *clip.size],
    }
    path = None if folder is None else folder / f"{clip.name}.json"
    if path is not None and (known := _known(path, about)):
        yield known
        return
    first = davis.read_mask(clip.masks[0])
    there = np.unique(on_grid(first, settings.short_side, patch))
    lost = [int(number) for number in np.setdiff1d(first[first > 0], there)]
    values = []
    for number, mask in enumerate(track(clip, first, look, patch, settings)):
        if number:
            yield None
        if len(clip.masks) == len(clip.frames):
            truth = davis.read_mask(clip.masks[number])
            values.append(overlap.measure(mask, truth, clip.objects))
        if folder is not None:
            with _writing(folder / clip.name / f"{clip.frames[number].stem}.png") as png:
                png.parent.mkdir(parents=True, exist_ok=True)
                png.write_bytes(davis.encode_mask(mask))
    scores = statistics(np.stack(values, -1)) if len(values) > 2 else []
    record = Record(frames=len(clip.frames), objects=clip.objects, lost=lost, scores=scores)
    if path is not None:
        with _writing(path):
            write_whole(path, json.dumps({**about, "record": record}) + "\n")
    yield record


def track(
    clip: Clip,
    first: UInt8[np.ndarray, "H W"],
    look: Look,
    patch: int,
    settings: ml_collections.ConfigDict,
) -> Iterator[UInt8[np.ndarray, "H W"]]:
    """Yields the masks of all frames of a clip, the first of which is given."""
    yield first
    objects = propagation.one_hot(on_grid(first, settings.short_side, patch))
    frames = (resized(davis.read_frame(path), settings.short_side) for path in clip.frames)
    contexts = propagation.start(look(next(frames)), objects, settings.last_frames)
    for frame in frames:
        tokens = look(frame)
        masks = propagation.propagate(
            contexts, tokens, settings.neighbourhood, settings.top_k, settings.temperature
        )
        yield davis.scaled(np.asarray(propagation.decide(masks, patch)), clip.size)
        if settings.masks == "hard":
            masks = propagation.harden(masks)
        contexts = propagation.remember(contexts, tokens, masks)


def make_look(subject: Subject, red_std: float) -> Look:
    """Returns a function that maps a frame to its patch tokens, after the final norm.

    It runs on one device of this process. Pixels to the right of and below the last whole token are
    left out.
    """
    model = subject.model
    params = jax.tree.map(lambda leaf: leaf.addressable_data(0), subject.params)

    @jax.jit
    def look(params: models.Params, frame: Array) -> Array:
        h, w = (side // model.patch for side in frame.shape[:2])
        whole = frame[: h * model.patch, : w * model.patch]
        (tokens,) = model.features(params, recoloured(whole, red_std)[None])
        return tokens[0, 1:].reshape(h, w, -1).astype(jnp.float32)

    return lambda frame: look(params, frame)


def recoloured(frame: UInt8[Array, "H W 3"], red_std: float) -> Float32[Array, "H W 3"]:
    """Returns pixels whose red, after `models.normalize`, has been divided by `red_std`."""
    ratio = jnp.array([models.STD[0] / red_std, 1, 1], jnp.float32)
    mean = 255 * jnp.array(models.MEAN, jnp.float32)
    return (frame.astype(jnp.float32) - mean) * ratio + mean


def grid_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Returns the height and width, in pixels, to which a frame of this size is resized.

    The shorter side has `short_side` pixels. The longer one is in proportion, rounded down to a
    multiple of 64.
    """
    height, width = size
    longer = int(short_side * max(height, width) / min(height, width)) // MULTIPLE * MULTIPLE
    return (longer, short_side) if height > width else (short_side, longer)


def resized(frame: UInt8[np.ndarray, "H W 3"], short_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a frame in the size of `grid_size`, by OpenCV's bilinear filter."""
    height, width = grid_size((frame.shape[0], frame.shape[1]), short_side)
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)


def on_grid(
    mask: UInt8[np.ndarray, "H W"], short_side: int, patch: int
) -> UInt8[np.ndarray, "h w"]:
    """Returns the object of each token of a resized frame."""
    height, width = grid_size((mask.shape[0], mask.shape[1]), short_side)
    return davis.scaled(mask, (height // patch, width // patch))


def statistics(values: Float64[np.ndarray, "2 objects T"]) -> list[Scores]:
    """Returns for each object the statistics of J and F over the frames."""
    return [
        {
            f"{measure}_{name}": value
            for measure, row in zip("JF", rows, strict=True)
            for name, value in overlap.statistics(row)._asdict().items()
        }
        for rows in values.swapaxes(0, 1)
    ]


def summary(scores: Sequence[Scores]) -> dict[str, float | None]:
    """Returns the means over objects, and JF, the mean of those of J and F; None for no objects."""
    names = [f"{measure}_{name}" for measure in "JF" for name in overlap.Statistics._fields]
    if not scores:
        return dict.fromkeys(("JF_mean", *names))
    means = {name: float(np.mean([row[name] for row in scores])) for name in names}
    return {"JF_mean": (means["J_mean"] + means["F_mean"]) / 2, **means}


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns J&F, J and F in percent by clip, their means, and those of the papers."""
    clips = result["clips"].items()
    mean = (f"mean of {result['objects']} objects", result)
    rows: list[list[Any]] = [["clip", "J&F", "J", "F"]]
    for name, scores in [*clips, mean]:
        rows.append([name, *(percent(scores[key]) for key in ("JF_mean", "J_mean", "F_mean"))])
    lost = [
        f"{name}: too small for the grid of tokens, and lost: object "
        + ", ".join(map(str, record["lost"]))
        for name, record in clips
        if record["lost"]
    ]
    paper = [["DAVIS-2017 val", *rows[0][1:]], *([name, *values] for name, values in PAPER.items())]
    title = "table 4 of the SOP paper:"
    return [rows, *lost, title, paper]


TASK = Task(
    does="objects in video (DAVIS-2017), found by their patches: J, F and their mean",
    expects=davis.EXPECTED,
    settings=settings,
    rules=RULES,
    open=open_clips,
    run=measure_clips,
    table=table,
    place="DAVIS",
    sources=lambda inputs: {"frames": inputs.frames},
)


def _known(path: epath.Path, about: Mapping[str, Any]) -> Record | None:
    """Returns the record of a clip that was computed from the same facts, or None."""
    try:
        found = json.loads(path.read_text())
        record = found.pop("record")
    except (OSError, ValueError, KeyError):
        return None
    return record if found == json.loads(json.dumps(about)) else None


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[epath.Path]:
    """Raises UserError if the file cannot be written."""
    try:
        yield path
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error}; expected a folder with room for the masks of all "
            "frames; free some, and run the same command again, which resumes"
        ) from error
