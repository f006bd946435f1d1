"""ADE20K's pairs: what is read, what is refused, and the crops of training."""

import pathlib

import numpy as np
import pytest
from datasets import write_pairs
from PIL import Image

from sop_jax.data import ade20k
from sop_jax.data.ade20k import IGNORED, Pair, open_pairs, train_crop
from sop_jax.errors import UserError


def replace_mask(root: pathlib.Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(root / "annotations" / "training" / "ADE_0001.png")


def test_zero_is_ignored_and_classes_start_at_zero():
    mask = np.array([[0, 1, 150]], np.uint8)
    assert ade20k.reduce_zero_label(mask).tolist() == [[IGNORED, 0, 149]]


def test_real_pairs_are_read(shared):
    pairs = open_pairs(shared / "data" / "fixtures" / "ade20k", "validation")
    assert len(pairs) == 3
    for i in range(3):
        image, mask = pairs.pair(i)
        assert image.shape[:2] == mask.shape
        assert set(np.unique(mask)) <= {*range(ade20k.CLASSES), IGNORED}
        raw = np.asarray(Image.open(pairs.mask_name(i)))
        np.testing.assert_array_equal(mask == IGNORED, raw == 0)


def test_the_folder_of_the_archive_is_found(tmp_path):
    write_pairs(tmp_path / "ADEChallengeData2016")
    assert len(open_pairs(tmp_path, "training")) == 3


def test_missing_layout_names_what_was_expected(tmp_path):
    (tmp_path / "images" / "training").mkdir(parents=True)
    with pytest.raises(UserError, match=r"annotations/training. Expected the scene parsing"):
        open_pairs(tmp_path, "training")


def test_image_without_mask_is_named(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "annotations" / "training" / "ADE_0001.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images in .* have no mask: ADE_0001.jpg"):
        open_pairs(tmp_path, "training")


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.zeros((48, 63), np.uint8), r"has 63 x 48 pixels, but its image has 64 x 48"),
        (np.full((48, 64), 151, np.uint8), r"has the label 151. Expected 0 .* from 1 to 150"),
        (np.zeros((48, 64, 3), np.uint8), r"the full ADE20K release"),
    ],
)
def test_bad_mask_is_refused_with_its_name(tmp_path, mask, message):
    write_pairs(tmp_path)
    replace_mask(tmp_path, mask)
    with pytest.raises(UserError, match=rf"ADE_0001.png {message}|ADE_0001.png .*{message}"):
        open_pairs(tmp_path, "training")


def test_damaged_file_is_refused_with_its_name(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "images" / "training" / "ADE_0002.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"ADE_0002.jpg cannot be read"):
        open_pairs(tmp_path, "training")


@pytest.mark.parametrize("index", range(20))
def test_sizes_of_all_pairs_are_compared(tmp_path, index):
    write_pairs(tmp_path, count=20)
    Image.new("L", (32, 24)).save(tmp_path / "annotations" / "training" / f"ADE_{index:04}.png")
    with pytest.raises(UserError, match=rf"ADE_{index:04}.png has 32 x 24 pixels"):
        open_pairs(tmp_path, "training")


def test_invalid_pairs_are_counted(tmp_path):
    write_pairs(tmp_path, count=20)
    for index in (3, 5, 11):
        Image.new("L", (32, 24)).save(tmp_path / "annotations" / "training" / f"ADE_{index:04}.png")
    with pytest.raises(UserError, match=r"ADE_0003.png .* 2 other pairs of training are invalid"):
        open_pairs(tmp_path, "training")


def test_file_that_is_damaged_later_is_named_by_the_batches(tmp_path):
    pairs = open_pairs(write_pairs(tmp_path), "training")
    (tmp_path / "images" / "training" / "ADE_0002.jpg").write_bytes(b"not an image")
    stream = ade20k.train_batches(pairs, 16, batch_size=3, seed=0, threads=2)
    with pytest.raises(UserError, match=r"ADE_0002.jpg cannot be read"):
        next(stream)
    stream.close()


def pair_of_positions(height: int, width: int) -> Pair:
    """Returns a pair whose mask repeats the red channel of the image, block by block."""
    mask = np.kron(np.arange(12).reshape(3, 4), np.ones((height // 3, width // 4))).astype(np.uint8)
    return Pair(np.stack([mask * 20, mask, mask], -1), mask)


def test_crop_is_a_function_of_its_generator():
    pair = pair_of_positions(60, 80)
    first, again = (train_crop(pair, 32, np.random.default_rng(5)) for _ in range(2))
    other = train_crop(pair, 32, np.random.default_rng(6))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    pairs = open_pairs(write_pairs(tmp_path, count=5), "training")

    def batches(**options: object) -> list[dict[str, np.ndarray]]:
        stream = ade20k.train_batches(pairs, 16, batch_size=4, seed=3, **options)
        found = [next(stream) for _ in range(3)]
        stream.close()
        return found

    whole, later, part = batches(), batches(start_step=1), batches(rows=[1, 3], threads=2)
    for name in ("image", "mask"):
        np.testing.assert_array_equal(later[0][name], whole[1][name])
        np.testing.assert_array_equal(part[2][name], whole[2][name][[1, 3]])
    assert whole[0]["image"].shape == (4, 16, 16, 3) and whole[0]["mask"].dtype == np.uint8
    assert not np.array_equal(whole[0]["image"], whole[1]["image"])


def test_image_and_mask_are_cropped_and_flipped_together(monkeypatch):
    monkeypatch.setattr(ade20k, "distort", lambda image, rng: image)
    for seed in range(20):
        image, mask = train_crop(pair_of_positions(60, 80), 32, np.random.default_rng(seed))
        assert image.shape == (32, 32, 3) and mask.shape == (32, 32)
        inside = mask != IGNORED
        # The image is interpolated and the mask is not, so that they differ at borders of blocks.
        same = np.abs(image[..., 0][inside] / 20 - mask[inside]) < 0.5
        assert same.mean() > 0.75


def test_missing_pixels_are_padded():
    """The scale goes down to 1/2, so that some crops are larger than the scaled image."""
    pair = pair_of_positions(60, 80)
    padded = 0
    for seed in range(20):
        image, mask = train_crop(pair, 64, np.random.default_rng(seed))
        missing = mask == IGNORED
        padded += missing.any()
        assert (image[missing] == ade20k.MEAN_COLOUR).all()
    assert 0 < padded < 20


def test_crops_avoid_a_dominant_class():
    mask = np.zeros((64, 200), np.uint8)
    mask[:, 160:] = np.arange(40) % 4 + 1
    shares = []
    for seed in range(50):
        place = ade20k.crop_place(mask, 64, np.random.default_rng(seed))
        shares.append(np.bincount(mask[place].ravel()).max() / 64**2)
    dominated = [np.mean(mask[:, x : x + 64] == 0) >= 0.75 for x in range(137)]
    assert np.mean(dominated) > 0.8  # of all crops
    assert np.mean(np.array(shares) >= 0.75) < 0.3  # after ten tries, about 0.8^10


def test_ignored_pixels_do_not_count_as_a_dominant_class():
    mask = np.full((32, 32), IGNORED, np.uint8)
    mask[0, :2] = 1, 2
    rng = np.random.default_rng(0)
    draws = [ade20k.crop_place(mask, 32, rng) for _ in range(3)]
    assert draws == [(slice(0, 32), slice(0, 32))] * 3
    state = rng.bit_generator.state
    ade20k.crop_place(mask, 32, rng)  # the first draw is accepted: one pair of draws
    fresh = np.random.default_rng()
    fresh.bit_generator.state = state
    fresh.integers(1), fresh.integers(1)
    assert rng.bit_generator.state == fresh.bit_generator.state


def test_distortion_keeps_grey_images_grey_and_changes_others():
    grey = np.repeat(np.arange(64, 192, dtype=np.uint8).reshape(8, 16, 1), 3, axis=2)
    colour = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    changed = 0
    for seed in range(20):
        found = ade20k.distort(grey, np.random.default_rng(seed)).astype(int)
        assert np.ptp(found, axis=-1).max() <= 1
        changed += not np.array_equal(ade20k.distort(colour, np.random.default_rng(seed)), colour)
    assert changed > 10


def test_rescale_keeps_within_both_limits():
    image = np.zeros((100, 900, 3), np.uint8)
    assert ade20k.rescale(image, (512, 128)).shape == (57, 512, 3)
    assert ade20k.rescale(image[:, :200], (128, 512)).shape == (128, 256, 3)
