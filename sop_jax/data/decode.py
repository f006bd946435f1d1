"""From a stored record to RGB pixels, and what replaces a record that cannot be read."""

import io

import numpy as np
from PIL import Image

from sop_jax.data.formats import FORMATS
from sop_jax.data.sources import Source
from sop_jax.errors import UserError

SUBSTITUTES = 32  # tries before the data set is given up


def decode(record: bytes | np.ndarray) -> np.ndarray:
    """Decodes one record as Pillow's `convert("RGB")` does.

    So alpha is dropped and the EXIF orientation is left alone; only 16-bit grey keeps its high
    byte, where Pillow would clip. Pillow and not OpenCV, because it reports truncated data and
    broken streams as errors and writes nothing about broken files to stderr. OpenCV's JPEG pixels
    are the same, 15 % sooner, which is 4 % of the time that the views of an image take.

    Args:
        record: an encoded image, or pixels uint8 [h, w, 3], which are returned as they are.

    Returns:
        uint8 [h, w, 3].

    Raises:
        ValueError: the data is empty, truncated, corrupt or no image.
    """
    if isinstance(record, np.ndarray):
        if record.dtype != np.uint8 or record.ndim != 3 or record.shape[2] != 3:
            raise ValueError(f"expected uint8 [h, w, 3], got {record.dtype} {record.shape}")
        return record
    if not record:
        raise ValueError("the record is empty")
    try:
        image = Image.open(io.BytesIO(record), formats=FORMATS)
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(np.int64) >> 8
            return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        reason = str(error).partition(" <_io.")[0]  # without the address of a buffer
        raise ValueError(f"{type(error).__name__}: {reason}") from error


def decode_or_substitute(source: Source, index: int) -> tuple[np.ndarray, int, int]:
    """Reads record `index`, or when that fails one that `index` alone decides.

    Args:
        source: the data set.
        index: the record that is wanted.

    Returns:
        The image uint8 [h, w, 3], the index of the record that it really is, and -1, or `index`
        when that record could not be read.

    Raises:
        UserError: no substitute could be read either.
    """
    try:
        return decode(source[index]), index, -1
    except (ValueError, OSError) as error:
        reason = error
    for substitute in np.random.default_rng(index).integers(len(source), size=SUBSTITUTES):
        try:
            return decode(source[int(substitute)]), int(substitute), index
        except (ValueError, OSError):
            continue
    raise UserError(
        f"Neither {source.name(index)!r} nor {SUBSTITUTES} other records picked at random could be "
        f"read as images; most of the data set must be broken. The first failed with: {reason}. "
        "Check data.path, or that the copy of the data is complete."
    )
