"""Decodes stored records to RGB pixels and replaces records that cannot be read."""

import io
import logging
import threading
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffTags, UnidentifiedImageError

from sop_jax.data.folders import FolderSource
from sop_jax.data.formats import FORMATS
from sop_jax.data.read import read
from sop_jax.data.sources import Source
from sop_jax.errors import UserError

SUBSTITUTES = 32  # replacements to try before giving up on the data set
MAX_PIXELS = 178_956_970  # Pillow's default limit

ORIENTATION = ExifTags.Base.Orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC, BLACK, WHITE = (
    TiffTags.lookup(number).value
    for number in (258, 262, 340, 341)  # BitsPerSample to SMaxSampleValue
)
FULL_RANGE = ("PNG", "PPM", "JPEG2000")  # whose grey values in mode I span 16 bits by definition

Image.MAX_IMAGE_PIXELS = None  # `decode` has its own limit, which a setting can raise
# Pillow's complaints about a file are reported as the reason why it cannot be read.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class Decoding(NamedTuple):
    """How records are decoded: the same in training, evaluation and extraction.

    Attributes:
        upright: whether images are rotated according to their EXIF orientation.
        white: the value of white in single-channel images of more than 8 bits, with black at 0;
            0 to use what the file specifies.
        max_pixels: images with more pixels than this are not decoded.
        retry_seconds: how long to retry reading a record whose storage fails, in seconds.
    """

    upright: bool = False
    white: float = 0.0
    max_pixels: int = MAX_PIXELS
    retry_seconds: float = 60.0


AS_STORED = Decoding()


def decoding(data_config: Any, source: Source) -> Decoding:
    """Returns how the settings of a run decode the records of a source.

    Args:
        data_config: has `orientation` ("auto" | "exif" | "ignore"), `white`, `max_pixels` and
            `retry_seconds`.
        source: the data set. "auto" rotates images that come from a folder: cameras and phones
            write such files, whereas prepared data sets mostly come with codebases that ignore
            the orientation.
    """
    c = data_config
    upright = {"exif": True, "ignore": False}.get(c.orientation, isinstance(source, FolderSource))
    return Decoding(upright, c.white, c.max_pixels, c.retry_seconds)


def decode(record: bytes | np.ndarray, how: Decoding = AS_STORED) -> np.ndarray:
    """Decodes one record as Pillow's `convert("RGB")` does; only the first frame of an animation.

    Alpha is therefore dropped. A single channel of more than 8 bits, which Pillow would clip, is
    scaled: by `how.white`, else by the TIFF tags SMinSampleValue and SMaxSampleValue, else by its
    type if that has a range (unsigned, BitsPerSample of 9 to 16), in which case the high byte is
    kept. Pillow is used rather than OpenCV because it reports truncated data and broken streams as
    errors and writes nothing about broken files to stderr. OpenCV decodes JPEG to the same pixels
    15 % faster, which is 4 % of the time needed to make the views of an image.

    Args:
        record: an encoded image, or pixels uint8 [h, w, 3], which are returned unchanged.
        how: the decoding options.

    Returns:
        uint8 [h, w, 3].

    Raises:
        ValueError: the data is empty, truncated, corrupt, not an image, larger than allowed, or
            does not specify which value is white.
    """
    if isinstance(record, np.ndarray):
        if record.dtype != np.uint8 or record.ndim != 3 or record.shape[2] != 3:
            raise ValueError(f"expected uint8 [h, w, 3], got {record.dtype} {record.shape}")
        return record
    if not record:
        raise ValueError("it is empty")
    try:
        return _pixels(Image.open(io.BytesIO(record), formats=FORMATS), how)
    except UnidentifiedImageError as error:
        tiff = record[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        raise ValueError(
            "it is a TIFF with a pixel format that Pillow cannot read"
            if tiff
            else "it is not an image in a format that Pillow can read"
        ) from error
    except Exception as error:  # broken bytes can make Pillow's decoders raise anything
        raise ValueError(_why(error)) from error


def decode_pillow(image: Image.Image, how: Decoding = AS_STORED) -> np.ndarray:
    """Decodes an opened Pillow image to the pixels to which `decode` decodes its file.

    Args:
        image: the image, of any mode.
        how: the decoding options.

    Returns:
        uint8 [h, w, 3].

    Raises:
        ValueError: it is truncated or damaged, larger than allowed, or does not specify which value
            is white.
    """
    try:
        return _pixels(image, how)
    except Exception as error:  # as for bytes, because Pillow reads a file when pixels are needed
        raise ValueError(_why(error)) from error


def _pixels(image: Image.Image, how: Decoding) -> np.ndarray:
    _check_size(image, how.max_pixels)
    if image.mode.startswith(("I", "F")):
        rgb = _eight_bits(image, how.white).convert("RGB")
    else:
        _check_white(image)
        rgb = image.convert("RGB")
    turn = TURNS.get(_orientation(image)) if how.upright else None
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _why(error: Exception) -> str:
    """Returns the message of an error of Pillow, without the address of a buffer."""
    reason = str(error).partition(" <_io.")[0]
    clear = isinstance(error, OSError | ValueError) and reason
    return reason if clear else f"{type(error).__name__}: {reason}"


def _check_size(image: Image.Image, most: int) -> None:
    pixels = image.width * image.height
    if pixels > most:
        raise ValueError(
            f"it has {image.width} x {image.height} = {pixels} pixels, more than "
            f"data.max_pixels={most}; to allow it, set data.max_pixels={pixels}, or scale it down"
        )


def _check_white(image: Image.Image) -> None:
    """Refuses colours that would need scaling, because Pillow keeps the high byte of 16 bits."""
    if not (tags := getattr(image, "tag_v2", None)):
        return
    bits, white = max(np.ravel(tags.get(BITS, 8))), max(np.ravel(tags.get(WHITE, 0)))
    if bits > 8 and 0 < white < 2**bits - 1:
        raise ValueError(
            f"its colours of {bits} bits end at {white:g}, which Pillow cannot scale; convert it "
            "to 8 bits per channel"
        )


def _eight_bits(image: Image.Image, white: float) -> Image.Image:
    """Scales a single channel of more than 8 bits to 8 bits.

    Raises:
        ValueError: neither `white` nor the file specifies which value is white.
    """
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    bits = int(np.ravel(tags.get(BITS, 16 if image.mode[1:] else 32))[0])
    black = 0.0
    if not white and WHITE in tags:
        black, white = (float(np.ravel(tags.get(tag, 0))[0]) for tag in (BLACK, WHITE))
        if not white > black:
            raise ValueError(f"its TIFF tags set white to {white:g} and black to {black:g}")
    if white:
        scaled = (values.astype(np.float32) - black) * (255 / (white - black))
        grey = np.rint(np.nan_to_num(scaled)).clip(0, 255).astype(np.uint8)
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in FULL_RANGE):
        shift = (bits if image.mode != "I" else 16) - 8
        grey = (values.astype(np.int32) >> shift).clip(0, 255).astype(np.uint8)
    else:
        kind = "floating-point" if image.mode == "F" else "integer"
        raise ValueError(
            f"the file does not specify which of its {bits}-bit {kind} values is white; set it "
            "for all such images with data.white=VALUE, for example 1 or 255, or convert it to 8 "
            "bits per channel"
        )
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, or 1 if it is absent or cannot be parsed."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken bytes can make Pillow's parser raise anything
        return 1


def load_image(
    source: Source, index: int, how: Decoding, stop: threading.Event | None = None
) -> np.ndarray:
    """Reads and decodes record `index`.

    Args:
        source: the data set.
        index: the index of the record.
        how: the decoding options.
        stop: ends the wait for storage that does not respond when it is set, see `read`.

    Returns:
        uint8 [h, w, 3].

    Raises:
        ValueError: the record cannot be read; the message is the reason.
        UserError: its storage cannot be reached, or denies access.
    """
    return decode(read(source, index, how.retry_seconds, stop), how)


def decode_or_substitute(
    source: Source, index: int, how: Decoding, stop: threading.Event | None = None
) -> tuple[np.ndarray, int, int]:
    """Reads record `index`, or a substitute if that record is corrupt.

    The substitute depends on `index` only.

    Args:
        source: the data set.
        index: the index of the record to read.
        how: the decoding options.
        stop: ends the wait for storage that does not respond when it is set, see `read`.

    Returns:
        A tuple of the image, uint8 [h, w, 3]; the index of the record that was read; and -1, or
        `index` if that record could not be read.

    Raises:
        UserError: no substitute could be read either, or the storage cannot be reached.
    """
    try:
        return load_image(source, index, how, stop), index, -1
    except ValueError as error:
        reason = error
    for substitute in np.random.default_rng(index).integers(len(source), size=SUBSTITUTES):
        try:
            return load_image(source, int(substitute), how, stop), int(substitute), index
        except ValueError:
            continue
    raise UserError(
        f"Neither {source.name(index)} nor {SUBSTITUTES} other records picked at random could be "
        f"read as images. The reason for the first: {reason}. If no setting fixes that, check "
        "data.path, and that the copy of the data is complete."
    )


def reason(source: Source, index: int, how: Decoding) -> str:
    """Returns a message that explains why a record that was found corrupt cannot be read."""
    try:
        load_image(source, index, how._replace(retry_seconds=0.0))
    except (ValueError, UserError) as error:
        return str(error)
    return "it could not be read before, but can be now"
