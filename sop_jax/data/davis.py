"""Video clips and the masks of their objects in the layout of DAVIS-2017, and masks as it has them.

    JPEGImages/480p/CLIP/00000.jpg ...
    Annotations/480p/CLIP/00000.png ...
    ImageSets/2017/SPLIT.txt

Masks are PNGs whose pixels are the numbers of objects: 0 is the background, and 255 is void, where
it is unknown which object is there.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sop_jax.data.decode import decode
from sop_jax.data.folders import SHOWN
from sop_jax.data.listed import ListedFiles
from sop_jax.errors import UserError, nearest

FRAMES, MASKS, SPLITS = "JPEGImages/480p", "Annotations/480p", "ImageSets/2017"
VOID = 255
EXPECTED = (
    f"DAVIS-2017 at 480p, as {FRAMES}/CLIP/00000.jpg, {MASKS}/CLIP/00000.png and {SPLITS}/val.txt. "
    "It is called TrainVal, 480p, at https://davischallenge.org/davis2017/code.html"
)
LAYOUT = f"Expected {EXPECTED}. Give the folder that contains JPEGImages with --data.path"


class Clip(NamedTuple):
    """A clip whose first mask is known.

    Attributes:
        name: its name.
        frames: its frames in order.
        masks: the true masks: as many as frames, or only the first.
        size: the height and width in pixels.
        objects: the largest number of an object in the first mask.
    """

    name: str
    frames: list[epath.Path]
    masks: list[epath.Path]
    size: tuple[int, int]
    objects: int


def open_davis(root: str, split: str | None = None) -> list[Clip]:
    """Returns the clips of a split; reads the headers of all files, and the first masks.

    Args:
        root: the folder that contains JPEGImages.
        split: the name of a list in ImageSets/2017; by default val, or all clips if there are no
            lists.

    Raises:
        UserError: the folder has another layout; the split or a clip does not exist; frames or
            masks are missing, are not images, or differ in size; or a first mask has no objects or
            has void pixels.
    """
    folder = epath.Path(root)
    if not (folder / FRAMES).is_dir():
        raise UserError(f"there is no folder {folder / FRAMES}. {LAYOUT}")
    return [_open_clip(folder, name) for name in _names(folder, split)]


def usual_split(root: str) -> str:
    """Returns the split that is opened if none is named: val, or "" if there are no lists."""
    return "val" if _splits(epath.Path(root)) else ""


def frames_of(root: str, clips: Sequence[Clip]) -> ListedFiles:
    """Returns all frames of the clips as one source, which identifies them and their masks."""
    files = [f"{clip.name}/{frame.name}" for clip in clips for frame in clip.frames]
    masks = [mask for clip in clips for mask in clip.masks]
    return ListedFiles(epath.Path(root) / FRAMES, files, truth=masks)


def read_frame(path: epath.Path) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a frame in RGB; raises UserError if it cannot be read."""
    try:
        return decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the frame {path} cannot be read: {error}; expected a JPEG; copy it again"
        ) from error


def read_mask(path: epath.Path) -> UInt8[np.ndarray, "H W"]:
    """Returns the object of each pixel; raises UserError if the file is not a mask."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"its pixels are {image.mode}")
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:  # the last is for damaged PNGs
        raise UserError(
            f"the mask {path} cannot be read: {error}; expected a PNG with a palette, whose pixels "
            "are the numbers of objects; copy it again from DAVIS-2017"
        ) from error


def encode_mask(mask: UInt8[np.ndarray, "H W"]) -> bytes:
    """Returns a mask as a PNG with the palette of DAVIS."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    png = io.BytesIO()
    image.save(png, format="PNG")
    return png.getvalue()


def palette() -> UInt8[np.ndarray, "256 3"]:
    """Returns the colours of DAVIS, which are those of Pascal VOC.

    Bits 0, 3 and 6 of a number are the high bits of red, bits 1, 4 and 7 those of green, and bits
    2 and 5 those of blue.
    """
    numbers, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        value = (numbers >> bit & 1) << (7 - bit // 3)
        colours[:, bit % 3] |= value.astype(np.uint8)
    return colours


def scaled(mask: UInt8[np.ndarray, "H W"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """Returns a mask of another height and width, by Pillow's nearest neighbours."""
    height, width = size
    image = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(image)


def _splits(folder: epath.Path) -> list[str]:
    """Returns the names of the lists of clips."""
    lists = folder / SPLITS
    return sorted(f.stem for f in lists.glob("*.txt")) if lists.is_dir() else []


def _names(folder: epath.Path, split: str | None) -> list[str]:
    """Returns the names of the clips of a split, or of all clips if there are no splits."""
    there = sorted(f.name for f in (folder / FRAMES).iterdir() if f.is_dir())
    lists, splits = folder / SPLITS, _splits(folder)
    split = split or usual_split(str(folder))
    if not split:
        names = there
    elif split not in splits:
        known = f"there are {', '.join(splits)}" if splits else "there is no such folder"
        raise UserError(
            f"there is no list of clips {lists / split}.txt; {known}. Name a split that "
            "exists with --data.test_split, or remove ImageSets to use all clips"
        )
    else:
        names = (lists / f"{split}.txt").read_text().split()
    if not names:
        raise UserError(f"there are no clips in {folder}. {LAYOUT}")
    if absent := [name for name in names if name not in there]:
        raise UserError(
            f"{len(absent)} of the {len(names)} clips of the split have no folder in "
            f"{folder / FRAMES}: {', '.join(absent[:SHOWN])}{nearest(absent[0], there)}; expected "
            "a folder of frames for each; download the clips, or remove their names from the list"
        )
    return names


def _open_clip(folder: epath.Path, name: str) -> Clip:
    """Returns a clip after it was checked; raises UserError for what `open_davis` names."""
    frames = sorted((folder / FRAMES / name).glob("*.jpg"))
    stems = [frame.stem for frame in frames]
    if not frames:
        raise UserError(f"the clip {name} has no frames in {folder / FRAMES / name}. {LAYOUT}")
    if absent := _gap(stems):
        raise UserError(
            f"frame {absent} of the clip {name} is missing, between {stems[0]} and {stems[-1]}; "
            "expected consecutive numbers; copy the clip again"
        )
    masks = [folder / MASKS / name / f"{stem}.png" for stem in stems]
    there = {mask.stem for mask in (folder / MASKS / name).glob("*.png")}
    if lost := sorted(there - set(stems)):
        raise UserError(
            f"the clip {name} has masks without frames: {', '.join(lost[:SHOWN])}; expected one "
            "frame for each; copy the clip again"
        )
    missing = [stem for stem in stems if stem not in there]
    if missing and missing != stems[1:]:
        raise UserError(
            f"{len(missing)} of the {len(stems)} frames of the clip {name} have no mask in "
            f"{folder / MASKS / name}: {', '.join(missing[:SHOWN])}; expected a mask of each "
            "frame, or of the first one only, which can be propagated but not scored; copy the "
            "masks again"
        )
    masks = masks[: len(there)]
    size = _size(frames[0])
    for path in (*frames[1:], *masks):
        if (other := _size(path)) != size:
            raise UserError(
                f"{path} has {other[1]} x {other[0]} pixels, but the first frame of the clip has "
                f"{size[1]} x {size[0]}; expected frames and masks of one size; use the files of "
                "the same resolution (480p)"
            )
    objects = read_mask(masks[0])
    if void := np.count_nonzero(objects == VOID):
        raise UserError(
            f"{void} pixels of {masks[0]} are void ({VOID}); the first mask must give the object "
            "of each pixel, 0 for the background and 1, 2, ... for objects. Replace 255 by 0, or "
            "by 1 if the mask is of DAVIS-2016, where 255 is the object"
        )
    if not objects.any():
        raise UserError(
            f"the first mask of the clip {name}, {masks[0]}, has no object; expected one that is "
            "visible in the first frame; remove the clip from the list or its first frames"
        )
    return Clip(name, frames, masks, size, int(objects.max()))


def _gap(stems: list[str]) -> str:
    """Returns the first number that is missing between numbered files, or an empty string."""
    if not all(stem.isdecimal() for stem in stems):
        return ""
    for before, after in zip(stems, stems[1:], strict=False):
        if int(after) > int(before) + 1:
            return f"{int(before) + 1:0{len(before)}d}"
    return ""


def _size(path: epath.Path) -> tuple[int, int]:
    """Returns the height and width of an image from its header."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        reason = str(error).partition(" <")[0]
        raise UserError(
            f"{path} cannot be read: {reason}; expected an image; copy it again"
        ) from error
