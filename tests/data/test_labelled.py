"""Batches of labelled crops: epochs, hosts, resuming and unreadable records."""

import contextlib
import io
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sop_jax.config import paper
from sop_jax.data import labelled, pipeline
from sop_jax.data.decode import AS_STORED
from sop_jax.data.labelled import Recipe, labelled_batches
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError

SMALL = Recipe(size=16)


def tree(root: pathlib.Path, count: int, broken: tuple[int, ...] = ()) -> Source:
    """Makes `count` images in two classes, of which the numbers in `broken` cannot be read."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), np.uint8)
    for i, picture in enumerate(pixels):
        folder = root / ("a" if i < count // 2 else "b")
        folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        (folder / f"{i:04}.png").write_bytes(b"broken" if i in broken else buffer.getvalue())
    data = paper().data
    data.update(source="folder", path=str(root))
    source = open_source(data, "train")
    assert source is not None
    return source


def take(source: Source, count: int, batch_size: int = 4, **changes: Any) -> list[dict]:
    arguments = {"recipe": SMALL, "seed": 0, "how": AS_STORED} | changes
    batches = labelled_batches(source, batch_size=batch_size, **arguments)
    with contextlib.closing(batches):
        return [dict(batch) for batch in itertools.islice(batches, count)]


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_what_a_batch_holds(tmp_path):
    (batch,) = take(tree(tmp_path, 10), 1)
    shapes = {key: (value.shape, str(value.dtype)) for key, value in batch.items()}
    assert shapes == {
        "image": ((4, 16, 16, 3), "uint8"),
        **{key: ((4,), "int32") for key in ("label", "index", "corrupt")},
        "valid": ((4,), "bool"),
    }
    assert (batch["corrupt"] == -1).all() and batch["valid"].all()


@pytest.mark.parametrize("count", [10, 12, 3])
def test_an_epoch_has_each_image_once_and_is_filled_up(tmp_path, count):
    source = tree(tmp_path, count)
    steps = labelled.steps_per_epoch(count, 4)
    batches = take(source, 3 * steps)
    orders = []
    for epoch in range(3):
        part = batches[epoch * steps : (epoch + 1) * steps]
        index, valid, label = (
            np.concatenate([batch[key] for batch in part]) for key in ("index", "valid", "label")
        )
        assert sorted(index[valid]) == list(range(count))
        assert valid[:count].all() and not valid[count:].any()
        assert (index[count:] == -1).all() and (label[count:] == -1).all()
        assert not np.concatenate([batch["image"] for batch in part])[count:].any()
        assert all(label[i] == source.label(int(index[i])) for i in range(count))
        orders.append(index[:count].tolist())
    assert orders[0] != orders[1] or count == 3
    assert len({tuple(order) for order in orders}) > 1


def test_crops_are_new_every_epoch(tmp_path):
    first, second = take(tree(tmp_path, 4), 2)
    crops = [batch["image"][np.argsort(batch["index"])] for batch in (first, second)]
    assert (crops[0] != crops[1]).any((1, 2, 3)).all()


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1, 3]])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.medium)])
def test_a_host_makes_its_rows_of_the_same_global_batches(tmp_path, rows, workers):
    source = tree(tmp_path, 10, broken=(3,))
    whole = take(source, 4, start_step=1)
    part = take(source, 4, start_step=1, rows=rows, workers=workers, threads=workers)
    assert_same(part, [{key: value[rows] for key, value in batch.items()} for batch in whole])


def test_resuming_is_a_step_number(tmp_path):
    source = tree(tmp_path, 10)
    stream = take(source, 9)
    for step in (1, 3, 7):
        assert_same(take(source, 2, start_step=step), stream[step : step + 2])


def test_pieces_and_threads_change_nothing(tmp_path, monkeypatch):
    source = tree(tmp_path, 10)
    expected = take(source, 4)
    monkeypatch.setattr(pipeline, "PIECE_BYTES", 2 * 16 * 16 * 3)
    assert_same(take(source, 4, threads=2), expected)


def test_the_seed_decides(tmp_path):
    source = tree(tmp_path, 10)
    (first,), (second,) = take(source, 1), take(source, 1, seed=1)
    assert (first["index"] != second["index"]).any()


def test_unreadable_records_are_reported_and_never_replaced(tmp_path):
    source = tree(tmp_path, 8, broken=(2, 5))
    batches = take(source, 2)
    index, valid, corrupt, label = (
        np.concatenate([batch[key] for batch in batches])
        for key in ("index", "valid", "corrupt", "label")
    )
    assert sorted(index) == list(range(8))
    assert set(index[~valid]) == {2, 5} == set(corrupt[~valid])
    assert (corrupt[valid] == -1).all() and (label[~valid] == -1).all()
    assert not np.concatenate([batch["image"] for batch in batches])[~valid].any()


def test_a_subset_is_an_epoch_of_its_own(tmp_path):
    source, subset = tree(tmp_path, 10), np.array([7, 1, 4, 9, 2])
    for batches in (take(source, 2, subset=subset), take(source, 4, subset=subset)[2:]):
        index = np.concatenate([batch["index"] for batch in batches])
        assert sorted(index) == [-1, -1, -1, 1, 2, 4, 7, 9]


def test_repeated_augmentation_shows_three_crops_of_an_image(tmp_path):
    source = tree(tmp_path, 12)
    (batch,) = take(source, 1, batch_size=12, recipe=SMALL._replace(copies=3))
    index = batch["index"].reshape(4, 3)
    assert (index == index[:, :1]).all() and len(set(index[:, 0])) == 4
    crops = batch["image"].reshape(12, -1)
    assert len(np.unique(crops, axis=0)) == 12


def test_without_crop_and_flip_the_image_is_scaled(tmp_path):
    source = tree(tmp_path, 4)
    still = SMALL._replace(size=12, scale=(1.0, 1.0), flip=0.0)
    (batch,) = take(source, 1, recipe=still)
    for image, index in zip(batch["image"], batch["index"], strict=True):
        pixels = source[int(index)]
        assert isinstance(pixels, bytes)
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(pixels))))
    flipped = take(source, 1, recipe=still._replace(flip=1.0))[0]
    np.testing.assert_array_equal(flipped["image"], batch["image"][:, :, ::-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": np.array([], int)}, "no images to train on"),
        ({"subset": np.array([3, 10])}, "record 10, but the records of the split are 0 to 9"),
        ({"subset": np.array([-1, 3])}, "record -1"),
        ({"recipe": SMALL._replace(scale=(0.0, 1.0))}, "0 < first <= second <= 1"),
        ({"recipe": SMALL._replace(interpolation="nearest")}, "bicubic, bilinear"),
    ],
)
def test_errors(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        take(tree(tmp_path, 10), 1, **changes)


def test_images_without_labels_are_an_error(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    data = paper().data
    data.update(source="folder", path=str(tmp_path))
    source = open_source(data, "train")
    assert source is not None
    with pytest.raises(UserError, match="have no labels"):
        take(source, 1)
