"""Sources and decoding: what is read, what is refused, and what replaces broken records."""

import io
import os
import pathlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sop_jax.data.decode import AS_STORED, decode, decode_or_substitute
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError

SHARED = pathlib.Path(
    os.environ.get("SOP_SHARED_DIR", pathlib.Path(__file__).parents[2] / ".." / "shared")
)
CIFAR = SHARED / "data" / "cifar10_jpeg_full.npz"


def data_config(source: str, path: object = "", **changes: str) -> SimpleNamespace:
    names = dict(name="", train_split="train", test_split="test")
    return SimpleNamespace(**{**names, "source": source, "path": str(path), **changes})


def opened(config: SimpleNamespace, split: str = "train") -> Source:
    source = open_source(config, split)
    assert source is not None
    return source


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int = 0, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_tree(root: pathlib.Path, files: list[str]) -> pathlib.Path:
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(number, 12, 10)).save(root / file)
    return root


def test_the_digest_identifies_the_records_wherever_they_are_stored(tmp_path):
    files = ["a/1.png", "a/2.png", "b/3.png"]
    here, moved = write_tree(tmp_path / "here", files), write_tree(tmp_path / "moved", files)
    other = write_tree(tmp_path / "other", [*files, "b/4.png"])
    digests = [opened(data_config("folder", folder)).digest for folder in (here, moved, other)]
    records = [encoded(noise(i)) for i in range(3)]
    for number, kept in enumerate((records, records, records[:2])):
        path = write_packed(tmp_path / f"{number}.npz", kept, test_blob=np.uint8([1]))
        digests.append(opened(data_config("packed", path)).digest)
    digests += [opened(data_config("digits"), split).digest for split in ("train", "train", "test")]
    for first, same, different in zip(*[iter(digests)] * 3, strict=True):
        assert first == same != different
    assert len(set(digests)) == 6
    path = write_packed(tmp_path / "labels.npz", records, train_labels=np.uint8([2, 0, 1]))
    assert opened(data_config("packed", path)).digest not in digests


# Packed


def write_packed(path: pathlib.Path, records: list[bytes], **arrays: object) -> pathlib.Path:
    offsets = np.cumsum([0, *map(len, records)])
    blob = np.frombuffer(b"".join(records), np.uint8)
    np.savez_compressed(path, **{"train_blob": blob, "train_offsets": offsets, **arrays})
    return path


def test_packed_round_trip(tmp_path):
    pictures = [noise(i, 9, 7 + i) for i in range(3)]
    records = [encoded(picture) for picture in pictures]
    path = write_packed(tmp_path / "p.npz", records, train_labels=np.uint8([2, 0, 1]))
    source = opened(data_config("packed", path))
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 3 and source.class_names is None
    for i, picture in enumerate(pictures):
        np.testing.assert_array_equal(decode(source[i]), picture)
    np.testing.assert_array_equal(source.labels, [2, 0, 1])
    assert source.labels.dtype == np.int32
    assert open_source(data_config("packed", path), "test") is None
    assert len(pickle.dumps(source)) < 1000  # a path, not the images


def test_packed_without_labels(tmp_path):
    path = write_packed(tmp_path / "p.npz", [encoded(noise())])
    assert opened(data_config("packed", path)).labels is None


def test_packed_nonsense(tmp_path):
    with pytest.raises(UserError, match="no file"):
        open_source(data_config("packed", tmp_path / "p.npz"), "train")
    (tmp_path / "p.npz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not an .npz file"):
        open_source(data_config("packed", tmp_path / "p.npz"), "train")
    path = write_packed(tmp_path / "q.npz", [encoded(noise())])
    with pytest.raises(UserError, match="no training_blob"):
        open_source(data_config("packed", path, train_split="training"), "train")
    path = write_packed(tmp_path / "r.npz", [b"abc"], train_offsets=np.int64([0, 2, 99]))
    with pytest.raises(UserError, match="damaged"):
        open_source(data_config("packed", path), "train")


@pytest.mark.skipif(not CIFAR.exists(), reason=f"{CIFAR} is not there")
def test_packed_cifar10():
    source = opened(data_config("packed", CIFAR))
    assert len(source) == 50000 and len(source.class_names) == 10
    assert decode(source[49999]).shape == (32, 32, 3)
    np.testing.assert_array_equal(np.bincount(source.labels), [5000] * 10)
    assert len(opened(data_config("packed", CIFAR), "test")) == 10000


# Digits


def test_digits():
    train, test = opened(data_config("digits")), opened(data_config("digits"), "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == list("0123456789")
    pixels = np.stack([decode(train[i]) for i in range(len(train))])
    assert pixels.shape == (1437, 32, 32, 3) and pixels.dtype == np.uint8
    assert pixels.min() == 0 and pixels.max() == 255
    assert set(train.labels) == set(test.labels) == set(range(10))
    again = opened(data_config("digits"))
    np.testing.assert_array_equal(again.labels, train.labels)
    every = {decode(s[i]).tobytes() for s in (train, test) for i in range(len(s))}
    assert len(every) > 1790  # the splits do not overlap (a few digits exist twice)


# Decoding


@pytest.mark.parametrize(
    "kind, modes",
    [
        ("PNG", "RGB L P RGBA LA 1"),
        ("JPEG", "RGB L CMYK"),
        ("TIFF", "RGB L CMYK P RGBA LA 1"),
        ("WEBP", "RGB RGBA"),
        ("BMP", "RGB L P 1"),
        ("PPM", "RGB L 1"),
    ],
)
def test_decode_is_pillows_rgb(kind, modes):
    for mode in modes.split():
        check_decode(encoded(Image.fromarray(noise()).convert(mode), kind))


def check_decode(record: bytes) -> None:
    expected = np.asarray(Image.open(io.BytesIO(record)).convert("RGB"))
    image = decode(record)
    assert image.dtype == np.uint8 and image.shape == (40, 50, 3)
    np.testing.assert_array_equal(image, expected)


def test_decode_16_bit_grey_keeps_the_high_byte():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = decode(encoded(ramp))
    np.testing.assert_array_equal(image, np.repeat((ramp >> 8)[..., None], 3, axis=2))


def test_decode_leaves_the_orientation_alone():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    assert decode(encoded(noise(), "JPEG", exif=exif)).shape == (40, 50, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99])
def test_truncated_jpeg_is_an_error(share, progressive, capfd):
    record = encoded(noise(0, 200, 200), "JPEG", quality=90, progressive=progressive)
    with pytest.raises(ValueError):
        decode(record[: int(share * len(record))])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_others_are_errors(kind):
    record = encoded(noise(), kind)
    for end in (len(record) // 3, len(record) - 60):
        with pytest.raises(ValueError):
            decode(record[:end])


@pytest.mark.parametrize("record", [b"", b"\xff\xd8\xff", b"<html>not found</html>", b"\0" * 999])
def test_no_image_is_an_error(record):
    with pytest.raises(ValueError):
        decode(record)


def test_decode_refuses_odd_arrays():
    np.testing.assert_array_equal(decode(noise()), noise())
    with pytest.raises(ValueError, match="uint8"):
        decode(noise().astype(np.float32))


def test_substitute_depends_only_on_the_index(tmp_path):
    files = [f"{i}.png" for i in range(20)]
    source = opened(data_config("folder", write_tree(tmp_path, files)))
    image, used, corrupt = decode_or_substitute(source, 3, AS_STORED)
    assert (used, corrupt) == (3, -1)
    np.testing.assert_array_equal(image, decode(source[3]))
    for broken in (3, 4):
        pathlib.Path(source.name(broken)).write_bytes(b"broken")
    found = [decode_or_substitute(source, i, AS_STORED) for i in (3, 4, 3, 4)]
    assert [corrupt for _, _, corrupt in found] == [3, 4, 3, 4]
    used = [used for _, used, _ in found]
    assert used[:2] == used[2:] and not set(used) & {3, 4}
    np.testing.assert_array_equal(found[0][0], decode(source[used[0]]))


def test_nothing_readable_is_a_user_error(tmp_path):
    source = opened(data_config("folder", write_tree(tmp_path, ["1.png", "2.png"])))
    for i in range(2):
        pathlib.Path(source.name(i)).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"1\.png.*data\.path"):
        decode_or_substitute(source, 0, AS_STORED)
