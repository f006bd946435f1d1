"""What a survey finds in a folder: sizes, formats, classes, faults and what is left out."""

import os
import pathlib
import time

import numpy as np
import pytest
from PIL import Image

from sop_jax.data.decode import Decoding
from sop_jax.data.folders import folder_source
from sop_jax.data.sources import DigitsSource
from sop_jax.errors import UserError
from sop_jax.own_images import survey
from sop_jax.own_images.survey import Header, Survey, words

UPRIGHT = Decoding(upright=True)


def paint(path: pathlib.Path, size: tuple[int, int] = (40, 30), seed: int = 0, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def look(folder: pathlib.Path, how: Decoding = UPRIGHT, **options) -> Survey:
    source = folder_source(str(folder))
    return survey.survey(source, None, how, str(folder), source.notes, **options)


def test_counts_sizes_formats_classes_and_rotated_photos(tmp_path: pathlib.Path) -> None:
    paint(tmp_path / "cats" / "a.jpg", (64, 48), 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(tmp_path / "cats" / "b.jpg", (64, 48), 2, exif=exif)
    paint(tmp_path / "dogs" / "c.png", (20, 100), 3)
    (tmp_path / "dogs" / "read.me").write_text("not an image")
    found = look(tmp_path)
    assert (found.images, found.test, found.classes) == (3, None, {"cats": 2, "dogs": 1})
    assert found.headers[0] == Header("JPEG", 64, 48, False)
    assert found.headers[1] == Header("JPEG", 64, 48, True)
    assert found.headers[2] == Header("PNG", 20, 100, False)
    assert (found.short_side, found.readable, found.share) == (48, 3, 0.0)
    assert found.seconds > 0
    text = "\n".join(words(found))
    assert "3 images" in text
    assert "2 folders of 1 to 2 images: cats, dogs" in text
    assert "shorter side 20 to 48 pixels, median 48; longest side 100" in text
    assert "2 JPEG, 1 PNG" in text
    assert "rotated by their EXIF orientation: 1" in text
    assert "unreadable: none (of all images)" in text
    assert "1 file that is not an image (1 .me)" in text


def test_unreadable_images_are_named_with_their_reasons(tmp_path: pathlib.Path) -> None:
    for seed in range(6):
        paint(tmp_path / f"{seed}.png", seed=seed)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    paint(tmp_path / "large.tif", (200, 300))
    found = look(tmp_path, UPRIGHT._replace(max_pixels=50_000))
    assert (found.images, found.readable, found.share) == (10, 6, 0.4)
    lines = "\n".join(found.unreadable.values())
    assert "empty.jpg: it is empty" in lines
    assert "text.jpg: it is not an image" in lines
    assert "cut.png: " in lines
    assert "large.tif: it has 200 x 300 = 60000 pixels, more than data.max_pixels=50000" in lines
    assert found.headers.keys().isdisjoint(found.unreadable)
    assert "unreadable: 4 (of all images)" in "\n".join(words(found))


def test_the_share_of_unreadable_images_is_estimated_from_samples(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "HEADERS", 20)
    monkeypatch.setattr(survey, "DECODED", 10)
    for number in range(40):
        paint(tmp_path / f"{number}.png", (40, 40), number)
        if number % 2:  # damaged after the header
            file = tmp_path / f"{number}.png"
            file.write_bytes(file.read_bytes()[:-40])
    found = look(tmp_path)
    assert (len(found.headers) + len(found.unreadable), found.decoded) == (20, 10)
    assert 0.2 <= found.share <= 0.8
    assert found.share == len(found.unreadable) / 10
    assert "of a sample" in words(found)[2]
    assert "of 20 headers, and 10 images decoded" in "\n".join(words(found))


def test_decoding_stops_when_its_time_is_over(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        paint(tmp_path / f"{number}.png", (8, 8), number)
    monkeypatch.setattr(survey, "SECONDS", 0.0)
    found = look(tmp_path)
    assert (found.decoded, found.seconds) == (0, 0.0)
    assert len(found.headers) == 100


def test_all_images_are_looked_at_if_asked(tmp_path: pathlib.Path) -> None:
    for number in range(30):
        paint(tmp_path / f"{number:02}.png", (8, 8 + number), number)
    heights: dict[int, int] = {}
    found = look(tmp_path, look=lambda index, image: heights.update({index: len(image)}))
    assert found.decoded == 30
    assert heights == {index: 8 + index for index in range(30)}


def test_a_file_that_may_not_be_read_is_an_error(read_only: pathlib.Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    read_only.chmod(0o755)
    paint(read_only / "a.png")
    (read_only / "a.png").chmod(0)
    os.seteuid(user)
    with pytest.raises(UserError, match="a.png cannot be read: Permission denied"):
        look(read_only)


def test_pixels_have_a_size_and_no_equal_files() -> None:
    found = survey.survey(DigitsSource("train"), DigitsSource("test"), UPRIGHT, "digits")
    assert (found.images, found.test, found.decoded) == (1437, 360, 500)
    assert set(found.headers.values()) == {Header("pixels", 32, 32, False)}
    assert found.classes is not None and len(found.classes) == 10
    assert found.equal is None
    text = "\n".join(words(found))
    assert "1,437 images to train on, 360 test images" in text
    assert "equal" not in text


def test_many_tiny_files_are_surveyed_in_seconds(tmp_path: pathlib.Path) -> None:
    paint(tmp_path / "0.png", (4, 4))
    for number in range(1, 2000):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    began = time.process_time()
    found = look(tmp_path)
    assert time.process_time() - began < 4
    assert (found.images, len(found.headers), found.decoded) == (2000, 2000, 500)
    assert found.equal is not None and [len(group) for group in found.equal.groups] == [2000]
