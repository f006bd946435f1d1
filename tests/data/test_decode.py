"""From bytes to pixels: white, orientation, and the reasons why an image cannot be read."""

import io
import os
import pathlib
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from sop_jax.config import paper
from sop_jax.data import decode as decoding
from sop_jax.data import pipeline
from sop_jax.data.decode import decode
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError

GREY = np.linspace(0, 255, 40 * 50).round().astype(np.uint8).reshape(40, 50)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, **tags: float) -> bytes:
    """Returns a TIFF image of one channel; tags are given by name."""
    numbers = {"photometric": 262, "black": 340, "white": 341}
    told = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        told[numbers[name]] = value
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=told)


def packed_12_bits(values: np.ndarray) -> bytes:
    """Returns a TIFF image of 12 bits per sample, with two values in three bytes."""
    height, width = values.shape
    pairs = values.reshape(-1, 2).astype(np.uint32)
    words = pairs[:, 0] << 12 | pairs[:, 1]
    strip = b"".join(int(word).to_bytes(3, "big") for word in words)
    entries = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1)]
    entries += [(278, height), (279, len(strip))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + b"\0" * 4


def photo(height: int = 40, width: int = 50) -> Image.Image:
    ramp = np.linspace(0, 255, height * width * 3).astype(np.uint8)
    return Image.fromarray(ramp.reshape(height, width, 3))


def turned(orientation: int) -> bytes:
    """Returns a JPEG image with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(), "JPEG", exif=exif)


def config_of(root: pathlib.Path, **changes: Any) -> Any:
    config = paper()
    config.batch_size = 8
    config.data.update(source="folder", path=str(root), workers=0, threads=0)
    config.augment.update(global_size=16, local_size=8, local_crops=0)
    config.update_from_flattened_dict(changes)
    return config


def source_of(root: pathlib.Path, records: list[bytes]) -> Source:
    """Makes a folder of records with any content."""
    for i, record in enumerate(records):
        (root / f"{i:02}.png").write_bytes(record)
    source = open_source(config_of(root).data, "train")
    assert source is not None
    return source


# White


@pytest.mark.parametrize(
    "record",
    [
        tiff((GREY / 255).astype(np.float32), white=1.0),
        tiff((GREY / 127.5 - 1).astype(np.float32), black=-1.0, white=1.0),
        tiff(GREY.astype(np.int32), white=255),
        tiff(GREY.astype(np.uint16) * 16 + 15, white=4095),
        tiff((255 - GREY).astype(np.uint16) * 257, photometric=0),
        packed_12_bits(GREY.astype(np.uint16) * 16),
    ],
    ids=["float32 in 0..1", "float32 in -1..1", "int32 in 0..255", "12 bits in 16", "0 is white"]
    + ["packed 12 bits"],
)
def test_grey_values_of_more_than_8_bits_are_scaled_as_the_file_says(record):
    image = decode(record)
    assert image.dtype == np.uint8 and image.shape == (40, 50, 3)
    assert np.abs(image.astype(int) - GREY[..., None]).max() <= 1


def test_the_scale_is_never_the_range_of_the_image_itself():
    bright = decode(tiff((GREY / 255).astype(np.float32), white=1.0))
    dark = decode(tiff((GREY / 2550).astype(np.float32), white=1.0))
    assert bright.max() == 255 and dark.max() in (25, 26)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_grey_values_whose_white_is_unknown_are_refused_with_the_setting_that_says_it(dtype):
    with pytest.raises(ValueError, match=r"white.*data\.white=VALUE"):
        decode(tiff(GREY.astype(dtype)))


@pytest.mark.parametrize(
    "record, white",
    [
        (tiff((GREY / 255).astype(np.float32)), 1.0),
        (tiff(GREY.astype(np.int32)), 255.0),
        (tiff(GREY.astype(np.uint16) * 16), 4080.0),
        (encoded(Image.fromarray(GREY.astype(np.uint16) * 16), "PNG"), 4080.0),
        (encoded(Image.fromarray(GREY), "PNG"), 7.0),  # white is always 255 in 8 bits
    ],
    ids=["float32", "int32", "16-bit TIFF", "16-bit PNG", "8-bit PNG"],
)
def test_the_setting_says_which_value_is_white(record, white):
    image = decode(record, decoding.Decoding(white=white))
    np.testing.assert_array_equal(image, np.repeat(GREY[..., None], 3, axis=2))


def test_16_bits_of_other_formats_keep_their_high_byte():
    values = np.linspace(0, 65535, 40 * 50).astype(np.uint16).reshape(40, 50)
    expected = np.repeat((values >> 8)[..., None], 3, axis=2)
    pgm = b"P5 50 40 65535\n" + values.astype(">u2").tobytes()
    for record in (pgm, encoded(Image.fromarray(values), "JPEG2000"), tiff(values)):
        np.testing.assert_array_equal(decode(record), expected)


def test_16_bit_colours_that_end_earlier_are_refused():
    # Pillow cannot write colours of 16 bits, so the header of an 8-bit TIFF is changed.
    told = TiffImagePlugin.ImageFileDirectory_v2()
    told[341] = (4095, 4095, 4095)
    record = encoded(photo(), "TIFF", tiffinfo=told)
    record = record.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))
    with pytest.raises(ValueError, match="16 bits end at 4095.*convert it to 8 bits"):
        decode(record)


def test_a_folder_of_floats_is_refused_by_name_and_read_when_white_is_set(tmp_path):
    values = np.random.default_rng(0).random((24, 12, 12), np.float32)
    source = source_of(tmp_path, [tiff(image) for image in values])
    with pytest.raises(UserError, match=r"\.png.*data\.white=VALUE"):
        next(pipeline.train_batches(source, config_of(tmp_path), 4))
    with_white = config_of(tmp_path, **{"data.white": 1.0})
    batch = next(pipeline.train_batches(source, with_white, 4))
    assert (batch["corrupt"] == -1).all()
    how = decoding.decoding(with_white.data, source)
    (batch,) = pipeline.eval_batches(source, 12, 12, 24, how)
    expected = (values * 255).round()[..., None]
    assert np.abs(batch["image"] - expected).max() <= 1


# Orientation


def assert_upright(image: np.ndarray, record: bytes) -> None:
    picture = Image.open(io.BytesIO(record)).convert("RGB")
    np.testing.assert_array_equal(image, np.asarray(ImageOps.exif_transpose(picture)))


@pytest.mark.parametrize("orientation", range(10))
def test_phone_photos_of_a_folder_are_upright_in_training_and_evaluation(tmp_path, orientation):
    record = turned(orientation)
    source = source_of(tmp_path, [record])
    how = decoding.decoding(config_of(tmp_path).data, source)
    assert_upright(decode(record, how), record)
    whole = {"augment.global_scale": (1.0, 1.0), "augment.resample": "pillow"}
    whole |= dict.fromkeys(("augment.flip", "augment.jitter", "augment.grayscale"), 0.0)
    whole |= {"augment.solarize": 0.0, "augment.blur": (0.0, 0.0, 0.0)}
    trained = next(pipeline.train_batches(source, config_of(tmp_path, **whole), 4))
    (judged,) = pipeline.eval_batches(source, 16, 16, 1, how)
    pixels = decode(record, how).astype(float)
    down, right = (
        np.sign(pixels[-1].mean() - pixels[0].mean()),
        np.sign(pixels[:, -1].mean() - pixels[:, 0].mean()),
    )
    for view in (*trained["global_views"][:, 0].astype(float), judged["image"][0].astype(float)):
        assert np.sign(view[-1].mean() - view[0].mean()) == down
        assert np.sign(view[:, -1].mean() - view[:, 0].mean()) == right


@pytest.mark.parametrize(
    "choice, upright",
    [("auto", [True, False]), ("exif", [True, True]), ("ignore", [False, False])],
)
def test_the_orientation_is_a_setting_and_follows_the_source(tmp_path, choice, upright):
    record = turned(6)
    blob, offsets = np.frombuffer(record, np.uint8), np.array([0, len(record)])
    np.savez(tmp_path / "p.npz", train_blob=blob, train_offsets=offsets)
    config = config_of(tmp_path, **{"data.orientation": choice})
    sources = [source_of(tmp_path, [record])]
    config.data.update(source="packed", path=str(tmp_path / "p.npz"))
    sources.append(open_source(config.data, "train"))
    shapes = [decode(s[0], decoding.decoding(config.data, s)).shape[:2] for s in sources]
    assert shapes == [(50, 40) if up else (40, 50) for up in upright]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_turned_once(compression):
    told = TiffImagePlugin.ImageFileDirectory_v2()
    told[0x0112] = 6
    record = encoded(photo(), "TIFF", tiffinfo=told, compression=compression)
    upright = np.asarray(photo().transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(decode(record, decoding.Decoding(upright=True)), upright)


def test_16_bit_images_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
    record = encoded(Image.fromarray(values), "PNG", exif=exif)
    expected = np.rot90(values >> 8, -1)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(decode(record, decoding.Decoding(upright=True)), expected)


# `decode` hides this warning; it is visible here because tests turn all warnings into errors.
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "block", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x09ab"]
)
def test_a_broken_exif_block_does_not_make_an_image_corrupt(block):
    record = encoded(photo(), "JPEG", exif=b"Exif\0\0" + block)
    assert decode(record, decoding.Decoding(upright=True)).shape == (40, 50, 3)


# Why an image cannot be read


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG image that ends after its header."""
    record = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    record[16:24] = struct.pack(">2I", width, height)
    record[29:33] = struct.pack(">I", zlib.crc32(bytes(record[12:29])))
    return bytes(record)


def test_an_image_of_too_many_pixels_says_so_and_names_the_setting():
    with pytest.raises(ValueError, match=r"13400 x 13400.*data\.max_pixels=179560000"):
        decode(png_header(13400, 13400))
    record = encoded(photo(), "PNG")
    assert decode(record, decoding.Decoding(max_pixels=2000)).shape == (40, 50, 3)
    with pytest.raises(ValueError, match="2000 pixels, more than data.max_pixels=1999"):
        decode(record, decoding.Decoding(max_pixels=1999))


def test_pillow_does_not_warn_of_large_images():
    with pytest.raises(ValueError) as caught:  # 100 M pixels by the header
        decode(png_header(10000, 10000))
    assert "Warning" not in str(caught.value)


@pytest.mark.parametrize(
    "record, why",
    [
        (b"", "it is empty"),
        (encoded(photo(), "JPEG")[:-200], "truncated"),
        (b"<html>not found</html>", "not an image in a format that Pillow can read"),
        (b"II*\0" + b"\0" * 50, "a TIFF with a pixel format that Pillow cannot read"),
    ],
    ids=["empty", "cut off", "no image", "odd TIFF"],
)
def test_each_unreadable_image_says_why(record, why):
    with pytest.raises(ValueError, match=why):
        decode(record)


def test_the_reason_is_found_again_for_a_record_that_was_found_corrupt(tmp_path):
    cut = encoded(photo(), "JPEG")[:-200]
    os.symlink(tmp_path / "gone.png", tmp_path / "03.png")
    source = source_of(tmp_path, [cut, b"", png_header(13400, 13400)])
    how = decoding.decoding(config_of(tmp_path).data, source)
    reasons = [decoding.reason(source, index, how) for index in range(4)]
    for reason, word in zip(reasons, ("truncated", "empty", "13400", "gone.png"), strict=True):
        assert word in reason
