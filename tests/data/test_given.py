"""Images that a program passes."""

import io
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sop_jax.data.decode import AS_STORED, Decoding, load_image
from sop_jax.data.given import is_one, names_of, open_given
from sop_jax.errors import UserError

UPRIGHT = Decoding(upright=True)


def colour(seed: int = 0, shape: tuple[int, ...] = (6, 9, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(images: Any, how: Decoding = AS_STORED) -> list[np.ndarray]:
    source = open_given(images, how)
    return [load_image(source, i, how) for i in range(len(source))]


def png(image: Image.Image, path: pathlib.Path, **options: Any) -> pathlib.Path:
    image.save(path, "PNG", **options)
    return path


def test_arrays_are_pixels_and_grey_is_all_three_colours() -> None:
    rgb, grey = colour(), colour(1, (6, 9))
    stack = colour(2, (4, 6, 9, 3))
    np.testing.assert_array_equal(pixels(rgb), [rgb])
    for one in (grey, grey[..., None]):
        np.testing.assert_array_equal(pixels(one), [np.stack([grey] * 3, axis=2)])
    np.testing.assert_array_equal(pixels(stack), stack)
    np.testing.assert_array_equal(pixels(list(stack)), stack)
    alpha = np.concatenate([rgb, colour(3, (6, 9, 1))], axis=2)
    np.testing.assert_array_equal(pixels(alpha), pixels(Image.fromarray(alpha)))
    np.testing.assert_array_equal(pixels(alpha), [rgb])


def test_arrays_of_other_libraries_are_taken() -> None:
    jax = pytest.importorskip("jax")
    np.testing.assert_array_equal(pixels(jax.numpy.asarray(colour())), [colour()])


def test_a_path_its_bytes_and_its_pillow_image_have_the_same_pixels(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    images = [
        png(Image.fromarray(colour()), tmp_path / "a.png", exif=exif),
        png(Image.fromarray(colour(1, (5, 5))), tmp_path / "grey.png"),
        png(Image.fromarray(colour(2, (5, 5)).astype(np.uint16) * 256), tmp_path / "deep.png"),
        png(Image.fromarray(colour(3)).quantize(8), tmp_path / "palette.png"),
    ]
    for path in images:
        (expected,) = pixels(path, UPRIGHT)
        np.testing.assert_array_equal(pixels(str(path), UPRIGHT), [expected])
        np.testing.assert_array_equal(pixels(path.read_bytes(), UPRIGHT), [expected])
        with Image.open(path) as opened:
            np.testing.assert_array_equal(pixels(opened, UPRIGHT), [expected])
    assert pixels(images[0], UPRIGHT)[0].shape == (9, 6, 3)
    assert pixels(images[0])[0].shape == (6, 9, 3)


def test_order_and_names_are_those_that_were_given(tmp_path: pathlib.Path) -> None:
    for name, seed in (("b", 1), ("a", 2), ("c", 3)):
        png(Image.fromarray(colour(seed)), tmp_path / f"{name}.png")
    paths = [tmp_path / "b.png", str(tmp_path / "a.png"), colour(7)]
    source = open_given(paths, AS_STORED)
    assert list(names_of(source)) == [str(tmp_path / "b.png"), str(tmp_path / "a.png"), "[2]"]
    np.testing.assert_array_equal(pixels(paths), [colour(1), colour(2), colour(7)])
    folder = open_given(tmp_path, AS_STORED)
    assert list(names_of(folder)) == ["a.png", "b.png", "c.png"]
    np.testing.assert_array_equal(pixels(tmp_path), [colour(2), colour(1), colour(3)])
    assert open_given((tmp_path / "b.png",), AS_STORED).digest != folder.digest


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (3, "3 is not an image; give a path"),
        (None, "None is not an image"),
        ({"a": 1}, "dict is not an image; give a path"),
        ([[colour(), colour()]], r"^list at \[0\] is not an image; give a path"),
        (np.array([["a.png"], ["b.png"]]), r"^list at \[0\] is not an image"),
        (np.array(["nowhere.png"]), "no file or folder nowhere.png"),
        (np.array([1, None]), r"^1 at \[0\] is not an image"),
        ([], "there are no images"),
        (np.zeros((0, 4, 4, 3), np.uint8), "there are no images"),
        ([colour(), "nowhere.png"], "no file or folder nowhere.png"),
        ([colour(), 3], r"3 at \[1\] is not an image"),
        (colour().astype(np.float32), r"array of float32, but images are uint8.*255 \* x"),
        (colour(0, (3, 6, 9)), r"shape \[3, 6, 9\]; expected .*Move the channels to the end"),
        (colour(0, (28, 28, 28)), r"grey images as \[n, h, w, 1\]"),
        (colour(0, (5,)), r"shape \[5\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        ("", "empty"),
    ],
)
def test_nonsense_is_refused_before_anything_is_computed(images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_given(images, AS_STORED)


def test_an_array_of_paths_is_a_list_of_them(tmp_path: pathlib.Path) -> None:
    paths = [png(Image.fromarray(colour(i)), tmp_path / f"{i}.png") for i in range(2)]
    texts = np.array([str(path) for path in paths])
    for array in (texts, texts.astype(object), np.array(paths)):
        source = open_given(array, AS_STORED)
        assert list(names_of(source)) == texts.tolist()
        np.testing.assert_array_equal(pixels(array), [colour(0), colour(1)])
    np.testing.assert_array_equal(pixels(texts[1]), [colour(1)])
    np.testing.assert_array_equal(pixels(np.array(texts[1])), [colour(1)])
    different = np.empty(2, object)
    different[:] = [colour(), colour(1, (3, 4))]
    assert [image.shape for image in pixels(different)] == [(6, 9, 3), (3, 4, 3)]


def test_one_image_is_told_from_several(tmp_path: pathlib.Path) -> None:
    path = png(Image.fromarray(colour()), tmp_path / "a.png")
    pillow = Image.fromarray(colour())
    for one in (path, str(path), np.array(str(path)), path.read_bytes(), colour(), pillow):
        assert is_one(one)
    for several in (tmp_path, [path], np.array([str(path)]), colour()[None], []):
        assert not is_one(several)
    with pytest.raises(UserError, match="no file or folder .*nowhere"):
        is_one(tmp_path / "nowhere")


def test_folders_are_given_by_themselves(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="contains no images"):
        open_given(tmp_path, AS_STORED)
    with pytest.raises(UserError, match="is a folder in a list of images"):
        open_given([tmp_path], AS_STORED)


def test_a_broken_image_has_a_reason() -> None:
    content = io.BytesIO()
    Image.fromarray(colour(0, (50, 50, 3))).save(content, "PNG")
    broken = Image.open(io.BytesIO(content.getvalue()[:200]))
    source = open_given([b"no image", b"", broken], AS_STORED)
    for index, reason in enumerate(["not an image in a format", "it is empty", "truncated"]):
        with pytest.raises(ValueError, match=reason):
            load_image(source, index, AS_STORED)
    large = Image.fromarray(colour(0, (50, 50, 3)))
    with pytest.raises(ValueError, match=r"2500 pixels, more than data.max_pixels=99"):
        pixels(large, Decoding(max_pixels=99))
