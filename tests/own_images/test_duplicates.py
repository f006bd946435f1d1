"""Equal files and near-duplicates: what counts as the same, and how it is said."""

import io
import pathlib

import cv2
import numpy as np
import pytest
from PIL import Image

from sop_jax.data.folders import FolderSource
from sop_jax.own_images import duplicates
from sop_jax.own_images.duplicates import (
    Equal,
    equal_files,
    equal_words,
    near_duplicates,
    perceptual_hash,
)


def photo(seed: int, side: int = 200) -> np.ndarray:
    """Returns a smooth random picture, which has low frequencies as photos do."""
    noise = np.random.default_rng(seed).integers(256, size=(9, 9, 3), dtype=np.uint8)
    return cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)


def bits(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.bitwise_count(perceptual_hash(one) ^ perceptual_hash(other)))


def test_files_of_the_same_bytes_are_grouped(tmp_path: pathlib.Path) -> None:
    contents = {"a": b"1" * 99, "b": b"2" * 99, "c": b"1" * 99, "d": b"3", "e": b"1" * 99}
    long = bytes(duplicates.BEGINNING)
    contents |= {"f": long + b"x", "g": long + b"y", "h": long + b"x"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = equal_files(str(tmp_path), [*contents, "gone"])
    assert found == Equal([[0, 2, 4], [5, 7]], 7, 7)
    assert equal_words(found).startswith("3 files are copies of others")


def test_of_many_files_of_the_same_size_a_sample_is_compared(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        (tmp_path / str(number)).write_bytes(b"same")
    monkeypatch.setattr(duplicates, "COMPARED", 10)
    found = equal_files(str(tmp_path), [str(number) for number in range(30)])
    assert (len(found.groups[0]), found.compared, found.candidates) == (10, 10, 30)
    assert "9 files are copies of others among 10 of a sample" in equal_words(found)


def test_words_for_none_and_for_one() -> None:
    assert equal_words(Equal([], 0, 0)) == "none"
    assert equal_words(Equal([[0, 1]], 2, 2)).startswith("1 file is a copy of others")


def test_the_hash_of_a_copy_in_another_size_quality_or_brightness_is_near() -> None:
    image = photo(0)
    small = cv2.resize(image, (120, 90), interpolation=cv2.INTER_AREA)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=40)
    compressed = np.asarray(Image.open(buffer))
    brighter = np.clip(image.astype(int) + 15, 0, 255).astype(np.uint8)
    for copy in (small, compressed, brighter, image[3:-3, 3:-3]):
        assert bits(image, copy) <= duplicates.NEAR


def test_other_images_are_far() -> None:
    images = [photo(seed) for seed in range(30)]
    pairs = [bits(one, other) for i, one in enumerate(images) for other in images[:i]]
    assert min(pairs) > duplicates.NEAR


def test_an_image_of_one_colour_has_a_hash() -> None:
    assert perceptual_hash(np.zeros((5, 7, 3), np.uint8)) == 0


def test_groups_are_those_of_a_search_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(2**63, size=2500, dtype=np.uint64)
    hashes[2000] = hashes[7] ^ np.uint64(0b111)
    hashes[1200] = hashes[2000] ^ np.uint64(0b111111000)  # near 2000, but not near 7
    hashes[44] = hashes[45]
    assert near_duplicates(hashes) == [[7, 1200, 2000], [44, 45]]
    assert near_duplicates(hashes[:0]) == []


def test_near_duplicates_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource("/images", [f"{number}.jpg" for number in range(40)], None, None)
    drawn = np.random.default_rng(0).integers(2**63, size=40, dtype=np.uint64)
    hashes = {i: drawn[i] for i in range(40) if i != 3}
    hashes[8] = hashes[5]
    lines = duplicates.words(hashes, source)
    assert lines[0] == "  near-duplicates: 2 images look alike, in 1 group"
    assert lines[1] == "    /images/5.jpg, /images/8.jpg"
    monkeypatch.setattr(duplicates, "COMPARED", 3)
    assert "among a sample of 3" in duplicates.words(hashes, source)[0]
