"""ImageNet-9: images whose background or foreground was changed (Xiao et al., ICLR 2021).

The layout is that of the official release: ROOT/VARIANT/val/CLASS/*.JPEG, with the nine classes
00_dog to 08_fish.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from sop_jax.data.folders import list_images, printable
from sop_jax.data.listed import ListedFiles
from sop_jax.errors import UserError

# The clean set and its seven variations, in the order of table 6 of the SOP paper.
CLEAN = "original"
VARIATIONS = (
    *("only_fg", "mixed_same", "mixed_rand", "mixed_next"),
    *("no_fg", "only_bg_b", "only_bg_t"),
)
CLASSES = 9
MAP = "in_to_in9.json"
IMAGENET = 1000  # classes

EXPECTED = (
    "ImageNet-9 as ROOT/VARIANT/val/CLASS/*.JPEG, for the variants original, only_fg, mixed_same, "
    "mixed_rand, mixed_next, no_fg, only_bg_b and only_bg_t, the nine classes 00_dog to 08_fish, "
    f"and for heads of {IMAGENET} classes ROOT/{MAP}. The data is at "
    "https://github.com/MadryLab/backgrounds_challenge/releases, and the file in that repository"
)


def open_variants(root: epath.PathLike) -> dict[str, ListedFiles]:
    """Returns the variants that exist below `root`, each with labels from 0 to 8.

    Raises:
        UserError: there is none, or a folder of a class has no number from 00 to 08.
    """
    names = [name for name in (CLEAN, *VARIATIONS) if (epath.Path(root) / name / "val").is_dir()]
    if not names:
        raise UserError(
            f"{root} contains none of the variants of ImageNet-9. Expected {EXPECTED}. Give the "
            "folder that contains the folders of the variants"
        )
    known = [path for path in (epath.Path(root) / MAP,) if path.is_file()]
    return {name: open_variant(epath.Path(root) / name / "val", known) for name in names}


def open_variant(folder: epath.Path, truth: Sequence[epath.Path] = ()) -> ListedFiles:
    """Returns the images of one variant. Labels are the numbers with which folders begin.

    Args:
        folder: contains the folders of the classes.
        truth: see `ListedFiles`.

    Raises:
        UserError: there is no image, or a folder has no number from 00 to 08.
    """
    files, _ = list_images(str(folder))
    classes = [file.split("/", 1)[0] if "/" in file else "" for file in files]
    numbers = {name: _number(folder, name) for name in sorted(set(classes))}
    labels = np.array([numbers[name] for name in classes], np.int32)
    return ListedFiles(folder, files, labels, truth=truth)


def _number(folder: epath.Path, name: str) -> int:
    """Returns the label of a class folder; "" stands for images outside of such a folder."""
    match = re.match(r"(\d+)_", name)
    if match and int(match[1]) < CLASSES:
        return int(match[1])
    what = f"a folder {printable(name)}" if name else "images outside of class folders"
    raise UserError(
        f"{folder} has {what}. Expected the nine class folders of ImageNet-9, 00_dog to 08_fish, "
        "whose numbers are the labels. Rename or remove what differs"
    )


def read_map(root: epath.PathLike) -> np.ndarray:
    """Returns the ImageNet-9 class of each of ImageNet's classes, int [1000]; -1 for no class.

    Raises:
        UserError: the file does not exist or is damaged.
    """
    path = epath.Path(root) / MAP
    if not path.is_file():
        raise UserError(
            f"there is no {path}, which a head of {IMAGENET} classes needs. Expected {EXPECTED}. "
            "Put the file there"
        )
    try:
        content = json.loads(path.read_text())
        classes = np.array([content[str(number)] for number in range(IMAGENET)])
        valid = classes.dtype.kind == "i" and -1 <= classes.min() and classes.max() < CLASSES
    except (ValueError, KeyError, TypeError, OSError):
        valid = False
    if not valid or len(content) != IMAGENET:
        raise UserError(
            f"{path} is not the map of ImageNet's classes to ImageNet-9's. Expected an object with "
            f'the keys "0" to "{IMAGENET - 1}" and values from -1 to {CLASSES - 1}. Download it '
            "again from https://github.com/MadryLab/backgrounds_challenge"
        )
    return classes
