"""Folders of images: which files are read, which folders are splits or classes, and messages."""

import collections
import os
import time

import fsspec.implementations.memory
import numpy as np
import pytest
from etils.epath import backend
from PIL import Image
from test_sources import data_config, encoded, noise, opened, write_tree

from sop_jax.data import formats
from sop_jax.data.decode import decode
from sop_jax.data.folders import folder_source, list_images, printable, whole_tree
from sop_jax.data.sources import notes, open_source
from sop_jax.errors import UserError


def test_folder_with_splits_and_classes(tmp_path):
    train = ["train/b/2.PNG", "train/a/1.jpg", "train/a/deep/3.webp", "train/c/x.jpeg"]
    write_tree(tmp_path, [*train, "val/b/9.bmp", "val/c/8.tiff"])
    (tmp_path / "train/a/readme.txt").write_text("no image")
    write_tree(tmp_path, ["train/.hidden/4.png", "train/a/.5.png"])
    config = data_config("folder", tmp_path, test_split="val")
    source = opened(config)
    assert source.class_names == ["a", "b", "c"]
    assert [source.name(i).removeprefix(f"{tmp_path}/train/") for i in range(len(source))] == [
        "a/1.jpg",
        "a/deep/3.webp",
        "b/2.PNG",
        "c/x.jpeg",
    ]
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 2])
    assert source.labels.dtype == np.int32
    assert all(decode(source[i]).shape == (12, 10, 3) for i in range(4))
    test = opened(config, "test")
    assert test.class_names == source.class_names
    np.testing.assert_array_equal(test.labels, [1, 2])  # labels of train; `a` is absent


def test_folder_without_splits_is_the_train_set(tmp_path):
    write_tree(tmp_path, ["cats/1.png", "dogs/2.png"])
    config = data_config("folder", f"{tmp_path}/")
    assert opened(config).class_names == ["cats", "dogs"]
    assert open_source(config, "test") is None


def test_folders_may_be_links(tmp_path):
    write_tree(tmp_path / "elsewhere", ["a/1.png", "b/2.png"])
    (tmp_path / "train").mkdir()
    for name in "ab":
        (tmp_path / "train" / name).symlink_to(tmp_path / "elsewhere" / name)
    source = opened(data_config("folder", tmp_path))
    assert len(source) == 2 and source.class_names == ["a", "b"]


@pytest.mark.parametrize(
    "files", [["1.png", "2.png"], ["a/1.png", "b/2.png", "3.png"], ["all/1.png", "all/2.png"]]
)
def test_unlabelled_folders(tmp_path, files):
    source = opened(data_config("folder", write_tree(tmp_path, files)))
    assert source.labels is None and source.class_names is None
    assert len(source) == len(files)


def test_folder_nonsense(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere.*Give the path"):
        open_source(data_config("folder", tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="contains no images"):
        open_source(data_config("folder", tmp_path), "train")
    with pytest.raises(UserError, match=r"--config\.data\.path"):
        open_source(data_config("folder"), "train")
    with pytest.raises(UserError, match="Unknown data.source 'imagenet'"):
        open_source(data_config("imagenet"), "train")
    write_tree(tmp_path, ["val/a/1.png", "val/b/2.png"])
    with pytest.raises(UserError, match="none called 'train'"):
        open_source(data_config("folder", tmp_path, test_split="val"), "train")
    write_tree(tmp_path, ["train/a/1.png", "train/c/2.png"])
    with pytest.raises(UserError, match="contains b, but the classes of .*/train are a, c"):
        open_source(data_config("folder", tmp_path, test_split="val"), "test")


def test_a_split_that_is_a_file_or_empty(tmp_path):
    write_tree(tmp_path, ["train/a/1.png", "train/b/2.png"])
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        open_source(data_config("folder", tmp_path), "test")
    assert open_source(data_config("folder", tmp_path, test_split=""), "test") is None


# Splits


def test_images_beside_the_split_are_refused_by_name(tmp_path):
    write_tree(tmp_path, [f"{name}/{i}.png" for name in ("bus", "cat", "train") for i in range(5)])
    with pytest.raises(UserError, match=r"images in bus, cat.*--config\.data\.train_split="):
        open_source(data_config("folder", tmp_path), "train")


def test_an_empty_train_split_says_that_there_are_no_splits(tmp_path):
    write_tree(tmp_path, [f"{name}/{i}.png" for name in ("bus", "cat", "train") for i in range(5)])
    config = data_config("folder", tmp_path, train_split="")
    source = opened(config)
    assert source.class_names == ["bus", "cat", "train"] and len(source) == 15
    assert open_source(config, "test") is None


@pytest.mark.parametrize("train, test", [("Train", "Val"), ("TRAIN", "VALID"), ("train", "val")])
def test_splits_are_found_in_any_letter_case_and_validation_by_any_of_its_names(
    tmp_path, train, test
):
    write_tree(tmp_path, [f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/b/3.png"])
    config = data_config("folder", tmp_path, test_split="validation")
    source, held_out = opened(config), opened(config, "test")
    assert source.class_names == held_out.class_names == ["a", "b"]
    assert (len(source), len(held_out)) == (2, 1)
    assert notes(source, held_out) == [f"{tmp_path}: splits: {train}, {test}"]


def test_a_test_split_that_is_the_train_split_is_reported(tmp_path):
    write_tree(tmp_path, ["train/a/1.png", "train/b/2.png", "val/a/1.png", "val/b/2.png"])
    same = data_config("folder", tmp_path, train_split="val", test_split="validation")
    assert "are the same images" in notes(opened(same), opened(same, "test"))[-1]
    other = data_config("folder", tmp_path, test_split="val")
    assert "are the same images" not in str(notes(opened(other), opened(other, "test")))


def test_splits_that_are_not_used_are_reported(tmp_path):
    splits = ("train", "val", "validation", "Test")
    write_tree(tmp_path, [f"{split}/{name}/1.png" for split in splits for name in "ab"])
    write_tree(tmp_path, ["sample.png"])
    config = data_config("folder", tmp_path, test_split="validation")
    assert notes(opened(config)) == [
        f"{tmp_path}: splits: train, validation; not used: Test, val",
        f"{tmp_path}: not used: 1 image outside the splits",
    ]
    assert opened(config, "test").name(0) == f"{tmp_path}/validation/a/1.png"


def test_what_may_or_may_not_be_a_split_is_asked_for(tmp_path):
    write_tree(tmp_path / "cases", ["train/a/1.png", "Train/b/2.png"])
    with pytest.raises(UserError, match="the folders Train, train, and any of them could be"):
        open_source(data_config("folder", tmp_path / "cases"), "train")
    write_tree(tmp_path / "two", ["train/a/1.png", "val/a/2.png", "valid/a/3.png"])
    with pytest.raises(UserError, match="the folders val, valid, and any"):
        open_source(data_config("folder", tmp_path / "two", test_split="validation"), "train")
    write_tree(tmp_path / "test", ["cat/1.png", "dog/2.png", "test/3.png"])
    with pytest.raises(UserError, match="the split test, but none called 'train'"):
        open_source(data_config("folder", tmp_path / "test"), "train")
    write_tree(tmp_path / "name", ["cat/1.png", "dog/2.png"])
    with pytest.raises(UserError, match="none called 'training'"):
        open_source(data_config("folder", tmp_path / "name", train_split="training"), "train")
    write_tree(tmp_path / "file", ["train/a/1.png"])
    (tmp_path / "file" / "val").write_bytes(b"an archive")
    with pytest.raises(UserError, match="file/val is a file, but a folder"):
        open_source(data_config("folder", tmp_path / "file", test_split="val"), "train")
    with pytest.raises(UserError, match="is a file, not a folder"):
        open_source(data_config("folder", tmp_path / "file" / "val"), "train")


def test_a_split_may_be_a_path(tmp_path):
    write_tree(tmp_path, ["images/train/1.png", "images/val/2.png", "masks/train/1.png"])
    config = data_config("folder", tmp_path, train_split="images/train", test_split="images/val")
    assert len(opened(config)) == len(opened(config, "test")) == 1


def test_labels_of_a_tree_with_splits_come_from_the_folders_in_them(tmp_path):
    write_tree(tmp_path, ["Train/a/1.png", "Train/b/2.png", "val/b/3.png", "val/c/4.png"])
    source = whole_tree(str(tmp_path))
    assert source.files == ["Train/a/1.png", "Train/b/2.png", "val/b/3.png", "val/c/4.png"]
    assert source.class_names == ["a", "b", "c"] and source.labels.tolist() == [0, 1, 1, 2]
    assert any("inside the splits: Train, val" in note for note in source.notes)
    assert whole_tree(str(tmp_path), splits=False).class_names == ["Train", "val"]
    write_tree(tmp_path, ["test/5.png"])
    source = whole_tree(str(tmp_path))
    assert source.labels is None and "1 of 5 images is not in a class folder" in source.notes[-1]
    write_tree(tmp_path, ["bus/6.png"])
    with pytest.raises(UserError, match="in bus, so it .*--nosplits"):
        whole_tree(str(tmp_path))


def test_images_of_one_folder_have_no_labels(tmp_path):
    write_tree(tmp_path, ["dogs/1.png", "dogs/big/2.png"])
    source = whole_tree(str(tmp_path))
    assert source.labels is None
    assert source.notes == [f"{tmp_path}: no labels, because all images are in one folder, dogs"]
    write_tree(tmp_path, ["cats/3.png"])
    assert whole_tree(str(tmp_path)).class_names == ["cats", "dogs"]
    # A split with several folders lacks labels for another reason: that of the one like it.
    assert folder_source(str(tmp_path), source).notes == []


# Links, and folders that cannot be listed


def test_every_folder_is_read_once_whatever_links_to_it(tmp_path):
    write_tree(tmp_path, [f"{name}/{i}.png" for name in "ab" for i in range(3)])
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # two endless links
    (tmp_path / "c").symlink_to("b")
    listing = list_images(str(tmp_path))
    assert listing.files == [f"{name}/{i}.png" for name in "ab" for i in range(3)]
    assert listing.notes == [
        f"{tmp_path}: linked more than once, but read once: a/up (same as {tmp_path}), "
        f"b/up (same as {tmp_path}), c (same as {tmp_path}/b)"
    ]


def test_links_that_lead_nowhere_are_reported(tmp_path):
    write_tree(tmp_path, ["a/1.png", "b/2.png"])
    (tmp_path / "c").symlink_to("/unmounted")
    (tmp_path / "d").symlink_to("d")
    os.mkfifo(tmp_path / "e.png")  # reading it would wait forever
    (tmp_path / "a" / "3.png").symlink_to("/unmounted/3.png")
    listing = list_images(str(tmp_path))
    assert listing.files == ["a/1.png", "a/3.png", "b/2.png"]  # reading 3.png says why
    assert len(listing.notes) == 1 and listing.notes[0].endswith("special files: c, d, e.png")


@pytest.mark.parametrize("split", ["train", ""])
def test_a_folder_that_cannot_be_listed_is_an_error_that_names_it(tmp_path, split, monkeypatch):
    write_tree(tmp_path, ["train/a/1.png", "train/b/deep/2.png"])
    scandir = os.scandir

    def unsteady(path):
        if str(path).endswith("deep"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", unsteady)
    with pytest.raises(UserError, match=r"Cannot list the folder .*/b/deep: Input/output error"):
        open_source(data_config("folder", tmp_path, train_split=split), "train")


def test_the_train_folder_is_listed_once_for_both_splits(tmp_path, monkeypatch):
    write_tree(tmp_path, ["train/a/1.png", "train/b/2.png", "test/a/3.png"])
    listed = collections.Counter()
    scandir = os.scandir

    def counted(path):
        listed[os.path.relpath(path, tmp_path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    config = data_config("folder", tmp_path)
    train = open_source(config, "train")
    test = open_source(config, "test", train)
    assert test.class_names == train.class_names == ["a", "b"]
    assert {folder: n for folder, n in listed.items() if folder != "."} == dict.fromkeys(
        ["train", "train/a", "train/b", "test", "test/a"], 1
    )


def test_many_files_are_listed_in_seconds(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(5_000):
        (tmp_path / "a" / f"{i:06}.jpg").touch()
    clock = time.process_time()
    assert len(list_images(str(tmp_path)).files) == 5_000
    assert time.process_time() - clock < 0.25  # 100,000 take less than 5 s


# Formats


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")  # until Pillow removes it
def test_every_listed_ending_is_decoded():
    picture = Image.fromarray(noise(0, 16, 16))
    checked = set()
    for suffix in formats.SUFFIXES:
        kind = Image.registered_extensions()[suffix]
        if kind not in Image.SAVE:
            continue
        for mode in ("RGB", "P", "1"):
            try:
                record = encoded(picture.convert(mode), kind)
                break
            except (OSError, ValueError):
                continue
        height, width, channels = decode(record).shape
        assert height == width and channels == 3, suffix
        checked.add(suffix)
    assert checked > set(".avif .bmp .gif .jfif .jp2 .jpg .pgm .png .qoi .tga .tif .webp".split())
    assert not formats.SUFFIXES & set(".eps .emf .h5 .hdf .mpg .pdf .ps .wmf".split())


def test_classes_of_any_raster_format_are_read(tmp_path):
    endings = ["gif", "jfif", "avif", "jp2", "pgm", "tga", "tif", "JPE"]
    write_tree(tmp_path, [f"{ending}/1.{ending}" for ending in endings])
    source = opened(data_config("folder", tmp_path))
    assert source.class_names == sorted(endings)
    assert {decode(source[i]).shape for i in range(len(source))} == {(12, 10, 3)}


def test_a_moving_picture_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = dict(lossless=True) if kind == "WEBP" else {}
        record = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode(record) == [255, 0, 0]).all(), kind


def test_postscript_is_not_run_whatever_it_is_called():
    with pytest.raises(ValueError, match=r"identify|format"):
        decode(encoded(noise(), "EPS"))


def test_files_that_are_not_images_are_counted_by_ending(tmp_path):
    write_tree(tmp_path, ["a/1.png", "b/2.png", "b/.3.png"])
    for i in range(12):
        (tmp_path / "a" / f"{i}.TXT").touch()
    (tmp_path / "a" / "readme").touch()
    (tmp_path / "empty").mkdir()
    assert notes(opened(data_config("folder", tmp_path))) == [
        f"{tmp_path}: ignored 13 files that are not images (12 .txt, 1 without an extension)",
        f"{tmp_path}: ignored 1 hidden file or folder",
        f"{tmp_path}: not classes, because they contain no images: empty",
    ]
    for image in tmp_path.rglob("*.png"):
        image.rename(image.with_suffix(".eps"))
    with pytest.raises(UserError, match=r"contains no images, but 15 files .*12 \.txt, 2 \.eps"):
        open_source(data_config("folder", tmp_path), "train")


def test_heic_is_read_where_its_library_is_installed(tmp_path):
    if ".heic" not in formats.SUFFIXES:
        write_tree(tmp_path, ["a/1.png"])
        (tmp_path / "a" / "2.HEIC").touch()
        (note,) = list_images(str(tmp_path)).notes
        assert note.endswith("an image (1 .heic); to read HEIC: pip install pillow-heif")
        pytest.skip("pillow-heif is not installed")
    write_tree(tmp_path, ["1.heic", "2.png"])
    source = opened(data_config("folder", tmp_path))
    assert len(source) == 2 and decode(source[0]).shape == (12, 10, 3)


# Names


def test_names_that_are_not_utf8_are_kept_and_shown(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(encoded(noise()))
    write_tree(tmp_path, ["b/1.png"])
    source = opened(data_config("folder", tmp_path))
    assert [os.fsencode(name) for name in source.files] == [b"b/1.png", b"caf\xe9/\xff.png"]
    assert source.name(1) == f"{tmp_path}/caf\\xe9/\\xff.png" and source.name(1).encode()
    np.testing.assert_array_equal(decode(source[1]), noise())
    assert source.digest


def test_printable_names():
    assert printable("caf\xe9 \u732b.jpg") == "caf\xe9 \u732b.jpg"
    assert printable(os.fsdecode(b"caf\xe9.jpg")) == r"caf\xe9.jpg"
    assert printable("two\nlines") == r"two\nlines"


# Remote folders


class Bucket(fsspec.implementations.memory.MemoryFileSystem):
    """A bucket in memory that has a folder which cannot be listed."""

    store, pseudo_dirs, unlisted = {}, [""], "/no"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def ls(self, path, detail=True, **options):
        if path.rstrip("/").endswith(self.unlisted):
            raise PermissionError(13, "Permission denied", path)
        return super().ls(path, detail, **options)


def test_remote_folders(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda *_: bucket)
    for i, file in enumerate(["Train/a/1.png", "Train/b/x/2.png", "Val/a/3.png", "Train/a/n.txt"]):
        bucket.pipe(f"gs://bucket/data/{file}", encoded(noise(i)))
    config = data_config("folder", "gs://bucket/data", test_split="validation")
    train = opened(config)
    assert train.files == ["a/1.png", "b/x/2.png"] and train.labels.tolist() == [0, 1]
    assert notes(train)[1:] == [
        "gs://bucket/data/Train: ignored 1 file that is not an image (1 .txt)"
    ]
    np.testing.assert_array_equal(decode(train[1]), noise(1))
    assert opened(config, "test").name(0) == "gs://bucket/data/Val/a/3.png"
    bucket.pipe("gs://bucket/data/Train/b/no/4.png", b"")
    with pytest.raises(UserError, match="Cannot list the folder gs://bucket/data/Train/b/no"):
        opened(config)
