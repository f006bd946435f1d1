"""The papers' transfer sets: how paths are understood, and iNaturalist's own layout."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from sop_jax.config import paper
from sop_jax.data import named, prepare, transfer
from sop_jax.data.decode import AS_STORED, load_image
from sop_jax.data.sources import open_source
from sop_jax.errors import UserError


def write(path: pathlib.Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(path)


def inaturalist(root: pathlib.Path, year: int = 2019) -> pathlib.Path:
    """Makes a competition with the categories 7 and 3, one of which has no image in `val`."""
    for split, categories in (("train", [7, 3, 7]), ("val", [7])):
        images = []
        for i, category in enumerate(categories):
            name = f"train_val{year}/Birds/{category}/{split}{i}.png"
            write(root / name, 10 * i + category)
            images.append({"id": 100 + i, "file_name": name})
        annotations = [
            {"id": i, "image_id": 100 + i, "category_id": category}
            for i, category in enumerate(categories)
        ]
        content = {"images": images, "annotations": annotations[::-1]}
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return root


def test_the_competitions_of_inaturalist(tmp_path):
    root = inaturalist(tmp_path)
    assert transfer.is_inaturalist("inat19", str(root))
    assert not transfer.is_inaturalist("inat18", str(root))
    assert not transfer.is_inaturalist("cars", str(root))
    train, test = transfer.open_inaturalist(root, 2019)
    assert train.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [1]
    assert train.class_names == ["3", "7"] == test.class_names
    assert [load_image(train, i, AS_STORED)[0, 0, 0] for i in range(3)] == [7, 13, 27]


@pytest.mark.parametrize("content", ["", "[]", '{"images": [{"id": 1, "file_name": "a"}]}', None])
def test_damaged_lists(tmp_path, content):
    root = inaturalist(tmp_path)
    file = root / "val2019.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match="val2019.json cannot be read"):
        transfer.open_inaturalist(root, 2019)
    file.write_text('{"images": [], "annotations": []}')
    with pytest.raises(UserError, match="lists no images"):
        transfer.open_inaturalist(root, 2019)


@pytest.mark.parametrize("inside", [False, True])
def test_sets_of_tfds(tmp_path, monkeypatch, inside):
    unknown = transfer.SETS["flowers"]._replace(tfds="made_here")  # TFDS has its own version
    monkeypatch.setitem(transfer.SETS, "flowers", unknown)
    for split, count in (("train", 3), ("validation", 2), ("test", 4)):
        for i in range(count):
            write(tmp_path / "tree" / split / f"class{i % 2}" / f"{split}{i}.png", i)
    splits = ["train", "validation", "test"]
    prepare.prepare(str(tmp_path / "tree"), str(tmp_path), "made_here", splits)
    path = next(tmp_path.glob("made_here/*")) if inside else tmp_path
    data = paper().data
    named.name_data(data, transfer.flags("flowers", str(path)))
    train = open_source(data, "train")
    test = open_source(data, "test", train)
    assert train is not None and test is not None
    assert (len(train), len(test)) == (5, 4)  # train and validation
    assert train.digest != test.digest
    assert sorted(train.label(i) for i in range(5)) == [0, 0, 0, 1, 1]


def test_other_layouts_are_opened_as_they_are(tmp_path):
    write(tmp_path / "train" / "a" / "1.png", 1)
    assert transfer.flags("pets", str(tmp_path)) == {"path": str(tmp_path)}


def test_every_set_says_where_to_get_it():
    for name, own in transfer.SETS.items():
        text = transfer.expected(name)
        assert own.title in text and own.home in text and "train/CLASS" in text
        with pytest.raises(UserError, match=own.title):
            transfer.flags(name, "/nowhere")
