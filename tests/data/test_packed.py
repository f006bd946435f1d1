"""Packed files: each fault of an array is reported by name, and arrays are read only once."""

import io
import multiprocessing
import pathlib
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError

N = 20


def records() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (N, 9, 9, 3), np.uint8)
    found = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def write(folder: pathlib.Path, compressed: bool = False, **arrays: Any) -> pathlib.Path:
    path = folder / "p.npz"
    blob = np.frombuffer(b"".join(records()), np.uint8)
    offsets = np.cumsum([0, *map(len, records())])
    save = np.savez_compressed if compressed else np.savez
    save(path, **{"train_blob": blob, "train_offsets": offsets} | arrays)
    return path


def opened(path: pathlib.Path) -> Source:
    config = SimpleNamespace(source="packed", path=str(path), name="")
    config.train_split, config.test_split = "train", "test"
    source = open_source(config, "train")
    assert source is not None
    return source


LABELS = np.arange(N) % 4
NAMES = np.array(["bus", "cat", "dog", "elk"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_offsets": np.linspace(0, 9, 4)}, "train_offsets .*float64.* Expected integers"),
        ({"train_offsets": np.arange(4).reshape(2, 2)}, "train_offsets .*Expected integers"),
        ({"train_offsets": np.uint64([0, 90, 30])}, "train_offsets .*Expected ascending"),
        ({"train_blob": np.zeros(9, np.float32)}, "train_blob .*float32.* Expected bytes"),
        ({"train_labels": LABELS[:5]}, "train_labels has 5 labels for 20 images"),
        ({"train_labels": LABELS - 1}, "train_labels has the label -1. Expected numbers from 0"),
        ({"train_labels": LABELS + 2**31}, "train_labels has the label 2147483648. Expected"),
        (
            {"train_labels": LABELS + 1, "class_names": NAMES},
            "label 4. Expected .* 0 to 3.*4 names",
        ),
        ({"train_labels": LABELS / 2}, "train_labels .*float64.* Expected integers, one per image"),
        ({"class_names": NAMES.astype(object)}, "class_names .*objects.* Expected strings"),
        ({"class_names": np.arange(4)}, "class_names .*int64.* Expected strings"),
    ],
)
def test_an_array_of_the_wrong_kind_is_named_with_what_was_expected(
    tmp_path: pathlib.Path, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(write(tmp_path, **arrays))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["train_blob", "train_offsets", "train_labels"])
def test_a_flipped_byte_is_reported_with_the_array_that_has_it(
    tmp_path: pathlib.Path, compressed: bool, name: str
) -> None:
    path = write(tmp_path, compressed, train_labels=LABELS)
    content = bytearray(path.read_bytes())
    place = content.index(f"{name}.npy".encode()) + 60  # after the header of the member
    place = place + 140 if not compressed else place
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged: .*{name}.* Copy or make"):
        opened(path)


def test_class_names_may_be_bytes(tmp_path: pathlib.Path) -> None:
    source = opened(write(tmp_path, train_labels=LABELS, class_names=NAMES.astype("S")))
    assert source.class_names == ["bus", "cat", "dog", "elk"]


def look(source: Source, answer: Any) -> None:
    mapped = pathlib.Path("/proc/self/smaps").read_text()
    answer.send(([source[i] for i in range(N)], "p.npz" in mapped or "memfd:sop_jax" in mapped))


@pytest.mark.parametrize("compressed", [False, True])
def test_workers_map_the_images_instead_of_reading_them(
    tmp_path: pathlib.Path, compressed: bool
) -> None:
    source = opened(write(tmp_path, compressed))
    assert len(pickle.dumps(source)) < 10_000
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=look, args=(source, there))
    child.start()
    found, mapped = here.recv()
    child.join()
    assert found == records() and mapped
