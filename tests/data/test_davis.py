"""Clips in the layout of DAVIS are read, and what is wrong with them is said before any work."""

import io
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image

from sop_jax.data import davis
from sop_jax.errors import UserError

HEIGHT, WIDTH = 8, 12


def mask_of(objects: int = 2) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for number in range(1, objects + 1):
        mask[2 * number : 2 * number + 2, 3:9] = number
    return mask


def write_clip(root: pathlib.Path, name: str, frames: int = 3, masks: int | None = None) -> None:
    for folder in (davis.FRAMES, davis.MASKS):
        (root / folder / name).mkdir(parents=True)
    for number in range(frames):
        pixels = np.full((HEIGHT, WIDTH, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(root / davis.FRAMES / name / f"{number:05d}.jpg")
        if masks is None or number < masks:
            path = root / davis.MASKS / name / f"{number:05d}.png"
            path.write_bytes(davis.encode_mask(mask_of()))


def write_split(root: pathlib.Path, split: str, text: str) -> None:
    (root / davis.SPLITS).mkdir(parents=True, exist_ok=True)
    (root / davis.SPLITS / f"{split}.txt").write_text(text)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    write_clip(tmp_path, "bear")
    write_clip(tmp_path, "swan", masks=1)
    return tmp_path


def error(root: pathlib.Path, split: str | None = None) -> str:
    with pytest.raises(UserError) as raised:
        davis.open_davis(str(root), split)
    return str(raised.value)


def test_all_clips_are_opened_without_a_list(root: pathlib.Path) -> None:
    bear, swan = davis.open_davis(str(root))
    assert (bear.name, bear.size, bear.objects) == ("bear", (HEIGHT, WIDTH), 2)
    assert [path.name for path in bear.frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert (len(bear.masks), len(swan.masks)) == (3, 1)
    assert davis.read_frame(bear.frames[1]).shape == (HEIGHT, WIDTH, 3)
    frames = davis.frames_of(str(root), [bear, swan])
    assert len(frames) == 6 and frames.name(3).endswith("swan/00000.jpg")
    np.testing.assert_array_equal(
        Image.open(io.BytesIO(frames[0])), davis.read_frame(bear.frames[0])
    )


def test_frames_are_identified_by_their_contents_and_those_of_the_masks(root: pathlib.Path) -> None:
    def stamp() -> str:
        return davis.frames_of(str(root), davis.open_davis(str(root))).stamp

    seen = [stamp()]
    assert stamp() == seen[0]
    (root / davis.MASKS / "bear" / "00002.png").write_bytes(davis.encode_mask(mask_of(1)))
    seen.append(stamp())
    frame = root / davis.FRAMES / "swan" / "00001.jpg"
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(frame)
    seen.append(stamp())
    assert len(set(seen)) == 3


def test_a_list_selects_clips_and_their_order(root: pathlib.Path) -> None:
    write_split(root, "val", "swan\n")
    write_split(root, "train", "swan\nbear\n\n")
    assert [clip.name for clip in davis.open_davis(str(root))] == ["swan"]
    assert davis.usual_split(str(root)) == "val"
    assert [clip.name for clip in davis.open_davis(str(root), "train")] == ["swan", "bear"]
    assert "there are train, val. Name a split" in error(root, "test")


def test_masks_keep_their_numbers_and_have_the_colours_of_davis(root: pathlib.Path) -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = epath.Path(root / "mask.png")
    path.write_bytes(davis.encode_mask(mask))
    np.testing.assert_array_equal(davis.read_mask(path), mask)
    with Image.open(path) as image:
        assert image.mode == "P"
        colours = np.array(image.getpalette()).reshape(-1, 3)
    assert colours[[0, 1, 2, 3, 8, 255]].tolist() == [
        *([0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [224, 224, 192]),
    ]


def test_real_masks_have_this_palette(shared: pathlib.Path) -> None:
    root = shared / "data" / "fixtures" / "davis" / "DAVIS"
    clips = davis.open_davis(str(root))
    with Image.open(clips[0].masks[0]) as image:
        colours = np.array(image.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(colours, davis.palette())
    assert {clip.size for clip in clips} == {(480, 854)}


def test_the_first_mask_of_the_real_sample_is_void_in_places(shared: pathlib.Path) -> None:
    message = error(shared / "data" / "fixtures" / "davis_multiobject_tennis2")
    assert "tennis/00000.png are void (255)" in message and "Replace 255 by 0" in message


def test_a_folder_of_another_layout(tmp_path: pathlib.Path) -> None:
    message = error(tmp_path / "DAVIS")
    assert message.startswith("there is no folder") and "davischallenge.org" in message
    (tmp_path / davis.FRAMES).mkdir(parents=True)
    assert error(tmp_path).startswith("there are no clips")


def test_a_list_with_a_clip_that_is_absent(root: pathlib.Path) -> None:
    write_split(root, "val", "bear\nswam\n")
    message = error(root)
    assert "1 of the 2 clips" in message and "did you mean swan?" in message
    write_split(root, "val", "nope\n")
    assert "480p: nope; expected a folder of frames for each; download the clips" in error(root)


def test_frames_that_are_missing(root: pathlib.Path) -> None:
    (root / davis.FRAMES / "bear" / "00001.jpg").unlink()
    assert error(root).startswith("frame 00001 of the clip bear is missing")
    shutil.rmtree(root / davis.FRAMES / "bear")
    (root / davis.FRAMES / "bear").mkdir()
    assert error(root).startswith("the clip bear has no frames")


def test_masks_that_are_missing(root: pathlib.Path) -> None:
    (root / davis.MASKS / "bear" / "00002.png").unlink()
    assert error(root).startswith("1 of the 3 frames of the clip bear have no mask")
    (root / davis.MASKS / "bear" / "00001.png").unlink()
    assert len(davis.open_davis(str(root))[0].masks) == 1  # the first one only
    (root / davis.MASKS / "bear" / "00000.png").unlink()
    assert error(root).startswith("3 of the 3 frames of the clip bear have no mask")
    (root / davis.MASKS / "bear" / "00007.png").write_bytes(davis.encode_mask(mask_of()))
    assert error(root).startswith("the clip bear has masks without frames: 00007")


def test_masks_of_another_size_than_frames(root: pathlib.Path) -> None:
    path = root / davis.MASKS / "bear" / "00001.png"
    path.write_bytes(davis.encode_mask(mask_of()[:, 1:]))
    message = error(root)
    assert f"00001.png has {WIDTH - 1} x {HEIGHT} pixels" in message
    assert "expected frames and masks of one size" in message


def test_a_first_mask_with_void_or_without_objects(root: pathlib.Path) -> None:
    path = root / davis.MASKS / "swan" / "00000.png"
    path.write_bytes(davis.encode_mask(255 * (mask_of() > 0).astype(np.uint8)))
    message = error(root)
    assert "24 pixels" in message and "void (255)" in message and "DAVIS-2016" in message
    path.write_bytes(davis.encode_mask(0 * mask_of()))
    assert "has no object" in error(root)
    path.write_bytes(b"")
    assert "cannot be read" in error(root)


def test_void_in_a_later_mask_is_allowed(root: pathlib.Path) -> None:
    mask = mask_of()
    mask[0, 0] = davis.VOID
    (root / davis.MASKS / "bear" / "00001.png").write_bytes(davis.encode_mask(mask))
    assert davis.open_davis(str(root))[0].objects == 2


def test_a_mask_of_colours_and_damaged_files(root: pathlib.Path) -> None:
    colours = epath.Path(root / "colours.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(colours)
    with pytest.raises(UserError, match="its pixels are RGB; expected a PNG with a palette"):
        davis.read_mask(colours)
    bear = davis.open_davis(str(root))[0]
    for path, read in ((bear.frames[1], davis.read_frame), (bear.masks[1], davis.read_mask)):
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(UserError, match="0000.*cannot be read.*copy it again"):
            read(path)
