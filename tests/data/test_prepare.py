"""A tree of images is converted to a TFDS data set, and opened, without TensorFlow."""

import errno
import os
import pathlib
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sop_jax.data.decode import decode
from sop_jax.data.folders import FolderSource
from sop_jax.data.pipeline import eval_batches
from sop_jax.data.prepare import prepare
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError

FILES = ["train/n01/a.JPEG", "train/n01/b.JPEG", "train/n02/c.JPEG", "train/n02/d.png"]
FILES += ["val/n01/e.JPEG", "val/n02/f.JPEG"]
MODES = ["RGB", "L", "CMYK", "RGBA", "RGB", "L"]  # as in ImageNet, and more


def write_tree(root: pathlib.Path, files: list[str] = FILES) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (len(files), 20, 30, 3), np.uint8)
    for file, mode, picture in zip(files, MODES, pixels, strict=False):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).convert(mode).save(root / file)
    return str(root)


def reopen(config_flags: str, split: str = "train") -> Source | None:
    """Opens the data set that the printed flags name."""
    values = dict(
        flag.removeprefix("--config.data.").split("=", 1) for flag in config_flags.split()
    )
    return open_source(SimpleNamespace(**values), split)


def test_round_trip_of_an_imagenet_tree(tmp_path):
    tree = write_tree(tmp_path / "tree")
    config_flags = prepare(tree, str(tmp_path / "out"), "tiny", ["train", "val"])
    for split, folder in (("train", "train"), ("test", "val")):
        source = reopen(config_flags, split)
        source = pickle.loads(pickle.dumps(source))
        assert source.class_names == ["n01", "n02"]
        found = {}
        for i in range(len(source)):
            file = source.name(i).split(" ")[-1]
            found[file] = source.label(i)
            record = source[i]
            assert record == (tmp_path / "tree" / folder / file).read_bytes()
            assert decode(record).shape == (20, 30, 3)
        expected = [file.removeprefix(f"{folder}/") for file in FILES if file.startswith(folder)]
        assert found == {file: int(file.startswith("n02")) for file in expected}


def test_the_folder_by_itself_opens_too_and_splits_can_be_sliced(tmp_path):
    prepare(write_tree(tmp_path / "tree"), str(tmp_path), "tiny", ["train", "val"])
    config = SimpleNamespace(source="tfds", path=str(tmp_path / "tiny" / "1.0.0"), name="")
    config.train_split, config.test_split = "train[:50%]", "train[50%:]"
    train, test = open_source(config, "train"), open_source(config, "test")
    assert len(train) == len(test) == 2
    assert {train[0], train[1]}.isdisjoint({test[0], test[1]})
    assert train.digest != test.digest
    config.test_split = "validation"
    assert open_source(config, "test") is None


def test_the_digest_of_a_data_set_stays_when_it_is_moved(tmp_path):
    prepare(write_tree(tmp_path / "tree"), str(tmp_path / "here"), "tiny", ["train", "val"])
    (tmp_path / "here").rename(tmp_path / "there")
    config = SimpleNamespace(source="tfds", path=str(tmp_path / "there"), name="tiny")
    config.train_split, config.test_split = "train", "val"
    moved, test = open_source(config, "train"), open_source(config, "test")
    prepare(write_tree(tmp_path / "tree"), str(tmp_path / "here"), "tiny", ["train", "val"])
    config.path = str(tmp_path / "here")
    assert open_source(config, "train").digest == moved.digest != test.digest


def test_labels_come_with_the_records_that_features_are_made_of(tmp_path):
    config_flags = prepare(
        write_tree(tmp_path / "tree"), str(tmp_path / "out"), "tiny", ["train", "val"]
    )
    source = reopen(config_flags)
    records, read = source._records, []

    class Counted:
        def __len__(self):
            return len(records)

        def __getitem__(self, index):
            read.append(index)
            return records[index]

    source._records = Counted()
    assert source.has_labels and not read
    batches = list(eval_batches(source, 8, 8, 3))
    assert sorted(read) == [0, 1, 2, 3]
    labels = np.concatenate([batch["label"][batch["valid"]] for batch in batches])
    assert labels.tolist() == [int(records[i]["label"]) for i in range(4)]


def test_an_unlabelled_tree_is_one_split(tmp_path):
    tree = write_tree(tmp_path / "tree", ["a.jpg", "deep/b.jpg", "deep/c.jpg"])
    config_flags = prepare(tree, str(tmp_path / "out"), "plain", ["train", "val"])
    source = reopen(config_flags)
    assert len(source) == 3 and not source.has_labels and source.class_names is None
    assert reopen(config_flags, "test") is None


def test_splits_are_found_in_any_letter_case(tmp_path, capfd):
    files = ["Train/a/1.png", "Train/b/2.png", "Validation/b/3.png", "test/4.png", "Train/n.txt"]
    for file in files:
        (tmp_path / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "tree" / file, "PNG")
    tree, out = str(tmp_path / "tree"), str(tmp_path / "out")
    config_flags = prepare(tree, out, "tiny", ["train", "val"])
    source, test = reopen(config_flags), reopen(config_flags, "test")
    assert source.class_names == test.class_names == ["a", "b"]
    assert (len(source), len(test)) == (2, 1)
    told = capfd.readouterr().err
    assert f"{tree}: splits: Train, Validation; not used: test" in told
    assert f"{tree}/Train: ignored 1 file that is not an image (1 .txt)" in told
    with pytest.raises(UserError, match="--splits=Train,Validation,test"):
        prepare(tree, out, "other", ["train", "training"])
    with pytest.raises(UserError, match="two of --splits are the same"):
        prepare(tree, out, "other", ["train", "val", "validation"])


def test_images_next_to_the_splits_are_refused_unless_there_are_no_splits(tmp_path):
    tree = write_tree(tmp_path / "tree", ["bus/1.png", "cat/2.png", "train/3.jpg"])
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="images in bus, cat.* --splits="):
        prepare(tree, out, "tiny", ["train", "val"])
    source = reopen(prepare(tree, out, "tiny", []))
    assert source.class_names == ["bus", "cat", "train"] and len(source) == 3


def test_names_that_are_not_utf8_are_stored_byte_for_byte(tmp_path):
    write_tree(tmp_path / "tree", ["train/a/1.png", "train/b/2.png"])
    folder = os.fsencode(tmp_path / "tree" / "train")
    os.rename(folder + b"/b/2.png", folder + b"/b/caf\xe9.png")
    os.rename(folder + b"/b", folder + b"/\xfcber")
    source = reopen(prepare(str(tmp_path / "tree"), str(tmp_path / "out"), "tiny", ["train"]))
    assert source.class_names == ["a", r"\xfcber"]
    assert {source._records[i]["file_name"] for i in range(2)} == {
        b"a/1.png",
        b"\xfcber/caf\xe9.png",
    }
    assert any(source.name(i).endswith(r" \xfcber/caf\xe9.png") for i in range(2))


def test_nonsense(tmp_path):
    tree, out = write_tree(tmp_path / "tree"), str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    cases = {
        "is not a valid name": (tree, out, "My-Images", ["train"]),
        "contains no images": (str(tmp_path / "empty"), out, "x", ["train"]),
        "There is no folder": (str(tmp_path / "nowhere"), out, "x", ["train"]),
        "not test.*--splits=train": (tree, out, "x", ["train", "test"]),
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=message):
            prepare(*arguments)
    prepare(tree, out, "x", ["train", "val"])
    with pytest.raises(UserError, match="already exists"):
        prepare(tree, out, "x", ["train", "val"])


def test_a_folder_that_cannot_be_written_to_is_reported_first(tmp_path, read_only):
    with pytest.raises(UserError, match=f"cannot write to {read_only}: .*choose another --out"):
        prepare("/there/is/no/tree", str(read_only), "tiny", ["train"])


def test_an_image_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    tree = write_tree(tmp_path / "tree")
    link = tmp_path / "tree" / "train" / "n01" / "link.jpg"
    link.symlink_to("nowhere.jpg")
    what = r"link.jpg cannot be read: it is a link to nowhere.jpg, which"
    with pytest.raises(UserError, match=what) as told:
        prepare(tree, str(tmp_path / "out"), "tiny", ["train", "val"])
    assert "room" not in str(told.value)
    link.unlink()

    def fail(self, index):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FolderSource, "__getitem__", fail)
    with pytest.raises(UserError, match=r"n01/a.JPEG cannot be read: Input/output error") as told:
        prepare(tree, str(tmp_path / "new"), "tiny", ["train", "val"])
    assert "room" not in str(told.value)


def test_tfds_nonsense(tmp_path):
    config_flags = prepare(write_tree(tmp_path / "tree"), str(tmp_path), "tiny", ["train", "val"])
    for change, message in (
        (("tiny", "absent"), "cannot open absent"),
        (("train_split=train", "train_split=training"), "no split 'training'"),
        (("tiny", "cifar10"), "not prepared"),
    ):
        with pytest.raises(UserError, match=message):
            reopen(config_flags.replace(*change))
    for file in (tmp_path / "tiny" / "1.0.0").glob("*.array_record*"):
        file.unlink()
    with pytest.raises(UserError, match="Cannot read tiny"):
        reopen(config_flags)


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "sop_jax.data.prepare", f"--out={tmp_path}", "--name=tiny"]
    command += [f"--images={write_tree(tmp_path / 'tree')}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config_flags = done.stdout.strip().splitlines()[-1]
    assert len(reopen(config_flags)) == 4 and len(reopen(config_flags, "test")) == 2
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "Traceback" not in again.stderr
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_file_of_records_that_is_gone_is_not_a_damaged_record(tmp_path):
    prepare(write_tree(tmp_path / "tree"), str(tmp_path), "tiny", ["train", "val"])
    config = SimpleNamespace(source="tfds", path=str(tmp_path), name="tiny")
    config.train_split, config.test_split = "train", "val"
    source = pickle.loads(pickle.dumps(open_source(config, "train")))
    (records,) = (tmp_path / "tiny" / "1.0.0").glob("*train.array_record*")
    records.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        source[0]
    (tmp_path / "away").rename(records)
    expected = source[0]  # it is found when it is back
    content = records.read_bytes()
    records.write_bytes(content.replace(expected[:200], bytes(200)))
    source = pickle.loads(pickle.dumps(source))
    with pytest.raises(ValueError, match="Corrupted"):
        [source[i] for i in range(len(source))]


def test_the_flags_turn_photos_as_the_folder_would_have(tmp_path):
    flags = prepare(write_tree(tmp_path / "tree"), str(tmp_path / "out"), "tiny", ["train"])
    assert "--config.data.orientation=exif" in flags.split()
