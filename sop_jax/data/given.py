"""Images that a program passes: arrays, Pillow images, files, bytes, or a folder."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from PIL import Image

from sop_jax.data.decode import Decoding, decode_pillow
from sop_jax.data.folders import FolderSource, list_images, printable
from sop_jax.errors import UserError
from sop_jax.paths import expand

CHANNELS = (1, 3, 4)  # grey; red, green and blue; the same with alpha
OBJECTS = "UTO"  # the kinds of arrays of text, of either type of NumPy, and of objects


@runtime_checkable
class ArrayLike(Protocol):
    """What NumPy converts to an array, such as an array of JAX or a tensor of PyTorch."""

    def __array__(self) -> np.ndarray: ...


# One image: a path, an encoded image, a Pillow image, or uint8 [h, w], [h, w, 1], [h, w, 3] or
# [h, w, 4].
OneImage = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | ArrayLike

# One image, several as uint8 [n, h, w, 1], [n, h, w, 3] or [n, h, w, 4], as a sequence or as an
# array of paths or other objects, or a folder.
Images = OneImage | Sequence[OneImage]


class GivenImages:
    """Images that are in memory, or files that are named one by one; see `sources.Source`.

    Attributes:
        names: the paths as they were given, and numbers such as `[3]` for other images.
    """

    has_labels = False
    class_names = None

    def __init__(self, items: Sequence[Any], names: Sequence[str], how: Decoding) -> None:
        """Creates a source from paths, encoded images, Pillow images and arrays of one image."""
        self._items, self.names, self._how = items, names, how

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        item = self._items[index]
        if isinstance(item, Image.Image):
            return decode_pillow(item, self._how)
        if isinstance(item, str):
            return epath.Path(item).read_bytes()
        return item if isinstance(item, bytes) else _rgb(item)

    def name(self, index: int) -> str:
        """Returns the name in printable form."""
        return printable(self.names[index])

    def label(self, index: int) -> int:
        """Returns -1, because there are no labels."""
        return -1

    @property
    def digest(self) -> str:
        """A hash of the names."""
        names = "\0".join(self.names).encode("utf-8", "surrogateescape")
        return hashlib.sha256(names).hexdigest()[:12]


def open_given(images: Any, how: Decoding) -> FolderSource | GivenImages:
    """Opens the images that a program passes.

    Args:
        images: see `Images`.
        how: how Pillow images are decoded.

    Raises:
        UserError: they are not images, a file is missing, or there are none.
    """
    images = _listed(images)
    if isinstance(images, str | os.PathLike):
        path = _path(images)
        if epath.Path(path).is_dir():
            files, notes = list_images(path)
            return FolderSource(path, files, None, None, notes)
    items = [images] if is_one(images) else list(images)
    if not items:
        raise UserError("there are no images: the list or array is empty; give at least one image")
    checked = [_checked(item, f"[{i}]") for i, item in enumerate(items)]
    names = [
        os.fspath(item) if isinstance(item, str | os.PathLike) else f"[{i}]"
        for i, item in enumerate(items)
    ]
    return GivenImages(checked, names, how)


def names_of(source: FolderSource | GivenImages) -> Sequence[str]:
    """Returns the names of all images: in a folder, their paths relative to it."""
    return source.files if isinstance(source, FolderSource) else source.names


def is_one(images: Any) -> bool:
    """Whether a program passes one image by itself, rather than several or a folder.

    Raises:
        UserError: they are not images, or there is no such path.
    """
    images = _listed(images)
    if isinstance(images, str | os.PathLike):
        return not epath.Path(_path(images)).is_dir()
    if isinstance(images, bytes | Image.Image):
        return True
    if isinstance(images, ArrayLike):
        return np.ndim(np.asarray(images)) != 4
    if isinstance(images, Sequence):
        return False
    raise UserError(_not_an_image(images, ""))


def _listed(images: Any) -> Any:
    """Returns an array of paths or other objects, such as a column of names, as a list."""
    if isinstance(images, str | bytes | os.PathLike | Image.Image | Sequence):
        return images
    if isinstance(images, ArrayLike) and (array := np.asarray(images)).dtype.kind in OBJECTS:
        return array.tolist()
    return images


def _checked(item: Any, name: str) -> Any:
    """Returns a path as text, an array as that of NumPy, and other images unchanged."""
    if isinstance(item, bytes | Image.Image):
        return item
    if isinstance(item, str | os.PathLike):
        path = _path(item)
        if epath.Path(path).is_dir():
            raise UserError(
                f"{printable(path)} is a folder in a list of images; give a folder by itself, or "
                "list its files"
            )
        return path
    if not isinstance(item, ArrayLike):
        raise UserError(_not_an_image(item, f" at {name}"))
    array = np.asarray(item)
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise UserError(
            f"image {name} is an array of {array.dtype}, but images are uint8, from 0 to 255; "
            "convert it, for example by (255 * x).round().astype(np.uint8) if it is from 0 to 1"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in CHANNELS):
        raise UserError(
            f"image {name} has the shape {shape}; expected [h, w, 3], [h, w] if it is grey, or "
            "[n, h, w, 3] for several images. Move the channels to the end, and give grey images "
            "as [n, h, w, 1]"
        )
    if not array.size:
        raise UserError(f"image {name} has the shape {shape}, which has no pixels; leave it out")
    return array


def _path(path: str | os.PathLike[str]) -> str:
    text = expand(os.fspath(path))
    if not epath.Path(text).exists():
        raise UserError(f"there is no file or folder {printable(text)}; check its path")
    return text


def _not_an_image(item: Any, where: str) -> str:
    what = repr(item) if item is None or isinstance(item, int | float) else type(item).__name__
    return (
        f"{what}{where} is not an image; give a path, a Pillow image, the bytes of a file, a uint8 "
        "array [h, w, 3], or a list of these"
    )


def _rgb(array: np.ndarray) -> np.ndarray:
    """Returns uint8 [h, w, 3]; alpha is dropped, as Pillow does."""
    if array.ndim == 2:
        array = array[..., None]
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]
