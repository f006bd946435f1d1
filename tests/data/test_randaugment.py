"""RandAugment's operations against their definitions, and random erasing."""

import functools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sop_jax import models
from sop_jax.data import randaugment
from sop_jax.data.augment import FILTERS
from sop_jax.data.labelled import Recipe, training_crop
from sop_jax.data.randaugment import OPERATIONS, erase, rand_augment


@functools.cache
def picture() -> np.ndarray:
    """Returns a random image whose values span 20 to 219, uint8 [40, 40, 3]."""
    return np.random.default_rng(0).integers(20, 220, (40, 40, 3), np.uint8)


def apply(name: str, magnitude: float, sign: float = 1.0, image: np.ndarray | None = None):
    given = Image.fromarray(picture() if image is None else image)
    kernel = FILTERS["bicubic"]
    return np.asarray(OPERATIONS[name](given, magnitude / 10, sign, kernel))


def test_the_channel_statistics_are_those_of_the_networks():
    np.testing.assert_allclose(randaugment.MEAN, 255 * np.array(models.MEAN), rtol=1e-6)
    np.testing.assert_allclose(randaugment.STD, 255 * np.array(models.STD), rtol=1e-6)
    assert randaugment.FILL == (124, 116, 104)


def test_operations_on_values():
    x = picture().astype(int)
    np.testing.assert_array_equal(apply("invert", 0), 255 - x)
    np.testing.assert_array_equal(apply("posterize", 9), x & 0b10000000)  # 4 - int(3.6) bits
    np.testing.assert_array_equal(apply("posterize", 5), x & 0b11000000)
    threshold = 256 - int(256 * 0.9)
    np.testing.assert_array_equal(apply("solarize", 9), np.where(x < threshold, x, 255 - x))
    np.testing.assert_array_equal(
        apply("solarize_add", 9), np.where(x < 128, np.minimum(x + 99, 255), x)
    )
    low, high = x.min((0, 1)), x.max((0, 1))
    stretched = (x - low) * 255 / (high - low)
    assert np.abs(apply("autocontrast", 0) - stretched).max() <= 1
    equalized = apply("equalize", 0)
    assert equalized.min() < 5 and equalized.max() > 250 and abs(equalized.mean() - 127.5) < 6


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_works_at_all_magnitudes(name):
    for magnitude in (0.0, 0.01, 5.0, 9.99, 10.0):
        for sign in (-1.0, 1.0):
            assert apply(name, magnitude, sign).shape == picture().shape
    if name == "posterize":
        assert not apply(name, 10.0).any()  # no bits are kept


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_enhancements_blend_with_their_neutral_picture(sign):
    x = picture().astype(float)
    factor = 1 + sign * 0.81
    brightness = np.clip(x * factor, 0, 255)
    assert np.abs(apply("brightness", 9, sign) - brightness).max() <= 1
    grey = np.asarray(Image.fromarray(picture()).convert("L")).astype(float)
    colour = np.clip(grey[..., None] + factor * (x - grey[..., None]), 0, 255)
    assert np.abs(apply("color", 9, sign) - colour).max() <= 1
    mean = round(grey.mean())
    assert (
        np.abs(apply("contrast", 9, sign) - np.clip(mean + factor * (x - mean), 0, 255)).max() < 2
    )
    sharp = apply("sharpness", 9, sign).astype(float)
    roughness = [np.abs(np.diff(values, axis=0)).mean() for values in (x, sharp)]
    assert (roughness[1] > roughness[0]) == (sign > 0)


def test_operations_that_move_pixels():
    ramp = np.zeros((40, 40, 3), np.uint8)
    ramp[:, 20], ramp[20, :] = 250, 250
    for sign in (-1.0, 1.0):
        right = apply("translate_x", 10, sign, ramp)
        column = np.argmax(right[3, :, 0] * (right[3, :, 0] > 200))
        assert abs(column - (20 - sign * 0.45 * 40)) <= 1  # the map goes from output to input
        down = apply("translate_y", 10, sign, ramp)
        row = np.argmax(down[:, 3, 0] * (down[:, 3, 0] > 200))
        assert abs(row - (20 - sign * 0.45 * 40)) <= 1
        for name, axis in (("shear_x", 0), ("shear_y", 1)):
            sheared = np.moveaxis(apply(name, 10, sign, ramp), axis, 0)[..., 0]
            for place in (2, 30):
                line = np.where(sheared[place] > 180)[0]
                assert np.abs(line - (20 - sign * 0.3 * place)).min() <= 1
    black = np.zeros((40, 40, 3), np.uint8)
    assert tuple(apply("translate_x", 10, 1.0, black)[20, 39]) == randaugment.FILL
    assert tuple(apply("rotate", 10, 1.0, black)[0, 0]) == randaugment.FILL
    turned = np.asarray(
        Image.fromarray(ramp).rotate(27, FILTERS["bicubic"], fillcolor=(124, 116, 104))
    )
    np.testing.assert_array_equal(apply("rotate", 9, 1.0, ramp), turned)


def test_which_operations_are_drawn(monkeypatch):
    calls: list[tuple[str, float, float]] = []

    def record(name, image, strength, sign, kernel):
        calls.append((name, strength, sign))
        return image

    stubs = {name: functools.partial(record, name) for name in OPERATIONS}
    monkeypatch.setattr(randaugment, "OPERATIONS", stubs)
    rng, draws = np.random.default_rng(0), 6000
    for _ in range(draws):
        rand_augment(picture(), rng, 9.0, "bicubic")
    assert len(OPERATIONS) == 15
    assert abs(len(calls) - draws) < 4 * np.sqrt(draws / 2)  # two draws, applied half of the time
    counts = Counter(name for name, _, _ in calls)
    assert all(abs(counts[name] - len(calls) / 15) < 5 * np.sqrt(draws / 15) for name in OPERATIONS)
    strengths = np.array([strength for _, strength, _ in calls])
    assert strengths.max() == 1.0 and abs(np.median(strengths) - 0.9) < 0.003
    assert abs((strengths < 0.85).mean() - 0.1587) < 0.02  # one standard deviation below
    assert abs(np.mean([sign for _, _, sign in calls])) < 0.06


def test_an_erased_box_is_noise_and_the_rest_is_kept():
    grey = np.full((64, 64, 3), 7, np.uint8)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(60):
        changed = erase(grey, rng)
        inside = (changed != 7).any(-1)
        rows, columns = np.where(inside)
        box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        outside = np.ones((64, 64), bool)
        outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
        assert (changed[outside] == 7).all() and 0.01 < inside.mean() < 0.36
        values.append(box.reshape(-1, 3))
    pixels = np.concatenate(values).astype(float)
    assert np.abs(pixels.mean(0) - randaugment.MEAN).max() < 3
    assert np.abs(pixels.std(0) - randaugment.STD).max() < 6  # limited to the range of pixels
    assert abs(np.corrcoef(pixels.T)[0, 1]) < 0.02
    assert (grey == 7).all()


def test_a_crop_is_changed_only_when_asked():
    plain = Recipe(size=24, interpolation="bicubic")
    crops = [training_crop(picture(), np.random.default_rng(s), plain) for s in range(20)]
    for changes in ({"magnitude": 9.0}, {"erase": 1.0}):
        recipe = plain._replace(**changes)
        other = [training_crop(picture(), np.random.default_rng(s), recipe) for s in range(20)]
        assert sum((a != b).any() for a, b in zip(crops, other, strict=True)) >= 10
