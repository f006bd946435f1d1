"""Each operation compared with Pillow's; probabilities, sizes and crop statistics of a recipe."""

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from sop_jax.data import augment


def recipe(**changes: object) -> SimpleNamespace:
    """Returns iBOT's recipe at a small size."""
    values = dict(
        resample="opencv",
        global_size=32,
        local_size=16,
        global_crops=2,
        local_crops=3,
        global_scale=(0.25, 1.0),
        local_scale=(0.05, 0.25),
        flip=0.5,
        jitter=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale=0.2,
        blur=(1.0, 0.1, 0.5),
        blur_sigma=(0.1, 2.0),
        solarize=0.2,
    )
    return SimpleNamespace(**{**values, **changes})


def plain(**changes: object) -> SimpleNamespace:
    """Returns a recipe that only crops."""
    off = dict(flip=0.0, jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=0.0)
    return recipe(**{**off, **changes})


def photo(height: int = 64, width: int = 80) -> np.ndarray:
    """Returns an image that is smooth and colourful, as a photo is, with values from 0 to 255."""
    raw = np.random.default_rng(0).normal(size=(height, width, 3))
    smooth = cv2.GaussianBlur(raw, (0, 0), 3)
    return (128 + 600 * smooth).clip(0, 255).astype(np.uint8)


def difference(ours: np.ndarray, theirs: Image.Image) -> np.ndarray:
    assert ours.dtype == np.uint8
    return np.abs(ours.astype(int) - np.asarray(theirs.convert("RGB")).astype(int))


@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.4])
def test_brightness_contrast_saturation_match_pillow(factor):
    image, picture = photo(), Image.fromarray(photo())
    pairs = [
        (augment.adjust_brightness, ImageEnhance.Brightness),
        (augment.adjust_contrast, ImageEnhance.Contrast),
        (augment.adjust_saturation, ImageEnhance.Color),
    ]
    for ours, theirs in pairs:
        assert difference(ours(image, factor), theirs(picture).enhance(factor)).max() <= 1


@pytest.mark.parametrize("turns", [-0.1, -0.03, 0.0, 0.07, 0.1, 0.5])
def test_hue_matches_torchvisions_shift_of_pillows_hsv(turns):
    hue, saturation, value = Image.fromarray(photo()).convert("HSV").split()
    shift = np.int32(turns * 255).astype(np.uint8)
    turned = Image.fromarray(np.asarray(hue) + shift)
    theirs = Image.merge("HSV", (turned, saturation, value))
    off = difference(augment.adjust_hue(photo(), turns), theirs)
    assert off.mean() < 1.2 and np.quantile(off, 0.99) <= 8  # both store hue in 8 bits


def test_grayscale_and_solarize_match_pillow():
    picture = Image.fromarray(photo())
    assert difference(augment.grayscale(photo()), picture.convert("L")).max() <= 1
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None], 3, axis=2)
    ours = augment.solarized(ramp)
    assert difference(ours, ImageOps.solarize(Image.fromarray(ramp), threshold=128)).max() == 0


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_close_to_pillows(sigma):
    theirs = Image.fromarray(photo()).filter(ImageFilter.GaussianBlur(sigma))
    off = difference(augment.gaussian_blur(photo(), sigma), theirs)
    assert off.max() <= 8 and off.mean() < 0.8  # Pillow uses three box filters
    edges = cv2.BORDER_REPLICATE
    exact = cv2.GaussianBlur(detailed().astype(float), (0, 0), sigma, borderType=edges)
    assert np.abs(augment.gaussian_blur(detailed(), sigma) - exact).max() < 1.5
    flat = np.full((16, 16, 3), 77, np.uint8)
    np.testing.assert_array_equal(augment.gaussian_blur(flat, sigma), flat)  # edges too


@pytest.mark.parametrize("size", [16, 32, 100])
def test_resize_matches_pillow(size):
    box = (3, 5, 50, 60)
    cut = Image.fromarray(photo()[3:53, 5:65])
    bicubic = cut.resize((size, size), Image.Resampling.BICUBIC)
    ours = augment.resize(photo(), box, size, "pillow")
    assert difference(ours[4:-4, 4:-4], bicubic.crop((4, 4, size - 4, size - 4))).max() <= 1
    assert difference(augment.resize(photo(), box, size, "opencv"), bicubic).mean() < 3


def detailed(height: int = 260, width: int = 240) -> np.ndarray:
    """Returns noise whose amplitudes decrease with frequency, as in photos."""
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height)))
    white = np.fft.rfft2(np.random.default_rng(0).normal(size=(3, height, width)))
    pink = np.fft.irfft2(white * np.maximum(frequency, 1 / width) ** -1.2, (height, width))
    return (128 + 40 * pink / pink.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("h, w", [(120, 120), (140, 110), (190, 130), (200, 200), (248, 225)])
def test_fast_shrinking_is_nearer_to_pillows_than_areas_are(h, w):
    image, box, size = detailed(), (7, 9, h, w), 100
    cut = np.ascontiguousarray(image[7 : 7 + h, 9 : 9 + w])
    pillows = augment.resize(image, box, size, "pillow").astype(int)
    ours = augment.resize(image, box, size, "opencv")
    areas = cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA)
    off, reference = (np.sqrt(np.mean((x - pillows) ** 2.0)) for x in (ours, areas))
    assert off < reference and off < 3
    assert abs(ours.mean() - pillows.mean()) < 0.1
    # pixels outside the box do not contribute
    np.testing.assert_array_equal(ours, augment.resize(cut, (0, 0, h, w), size, "opencv"))
    np.testing.assert_array_equal(pillows, augment.resize(cut, (0, 0, h, w), size, "pillow"))


@pytest.mark.parametrize("h, w", [(20, 90), (33, 47), (60, 60), (150, 41), (200, 250)])
def test_resize_keeps_flat_colours(h, w):
    flat = np.full((200, 250, 3), (250, 77, 3), np.uint8)
    for resample in ("opencv", "pillow"):
        assert (augment.resize(flat, (0, 0, h, w), 40, resample) == flat[:40, :40]).all()


def test_resize_of_everything_at_its_own_size_changes_nothing():
    image = photo(32, 32)
    for resample in ("opencv", "pillow"):
        np.testing.assert_array_equal(augment.resize(image, (0, 0, 32, 32), 32, resample), image)


def test_crop_boxes_follow_the_scale_and_the_aspect():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.crop_box(400, 400, (0.05, 0.25), rng) for _ in range(20000)])
    top, left, h, w = boxes.T
    assert (boxes[:, :2] >= 0).all() and (top + h <= 400).all() and (left + w <= 400).all()
    share, aspect = h * w / 400**2, np.log(w / h)
    deciles = np.linspace(0.05, 0.95, 10)
    # at this scale every first try fits, so both are exactly uniform
    np.testing.assert_allclose(np.quantile(share, deciles), 0.05 + 0.2 * deciles, atol=0.004)
    bound = np.log(4 / 3)
    np.testing.assert_allclose(np.quantile(aspect, deciles), bound * (2 * deciles - 1), atol=0.015)
    for start, free in ((top, 400 - h), (left, 400 - w)):
        assert abs(np.mean(start / free) - 0.5) < 0.01 and (start == 0).any()
        assert (start == free).any()


def test_crops_of_extreme_images_fall_back_to_the_centre():
    rng = np.random.default_rng(0)
    assert augment.crop_box(10, 1000, (0.9, 1.0), rng) == (0, 493, 10, 13)
    assert augment.crop_box(1000, 10, (0.9, 1.0), rng) == (493, 0, 13, 10)
    assert augment.crop_box(1, 1, (0.05, 0.25), rng) == (0, 0, 1, 1)
    views, _ = augment.multi_crop(photo(1, 300), rng, recipe())
    assert views.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("resample", ["opencv", "pillow"])
@pytest.mark.parametrize("local_crops", [0, 3])
def test_multi_crop_shapes_and_determinism(resample, local_crops):
    c = recipe(resample=resample, local_crops=local_crops)
    views = augment.multi_crop(photo(), np.random.default_rng(1), c)
    assert [view.shape for view in views] == [(2, 32, 32, 3), (local_crops, 16, 16, 3)]
    assert all(view.dtype == np.uint8 for view in views)
    again = augment.multi_crop(photo(), np.random.default_rng(1), c)
    other = augment.multi_crop(photo(), np.random.default_rng(2), c)
    np.testing.assert_array_equal(views[0], again[0])
    np.testing.assert_array_equal(views[1], again[1])
    assert (views[0] != other[0]).any()


def test_multi_crop_leaves_the_image_alone():
    image = photo()
    image.flags.writeable = False  # as Pillow returns it
    for seed in range(20):
        augment.multi_crop(image, np.random.default_rng(seed), recipe())
    np.testing.assert_array_equal(image, photo())


def test_local_views_see_less_than_global_ones():
    ramp = np.tile(np.linspace(0, 255, 100).astype(np.uint8)[:, None, None], (1, 100, 3))
    rng = np.random.default_rng(0)
    spans = []
    for _ in range(300):
        views = augment.multi_crop(ramp, rng, plain())
        spans.append([np.mean([np.ptp(view) / 255 for view in views[i]]) for i in (0, 1)])
    seen = np.mean(spans, axis=0)
    assert 0.70 < seen[0] < 0.85 and 0.33 < seen[1] < 0.45  # about the square root of the mean area


def share(image: np.ndarray, c: SimpleNamespace, changed, draws: int = 1500) -> np.ndarray:
    """Returns how often `changed(view)` holds for both global views and for local views."""
    rng, hits = np.random.default_rng(0), np.zeros(3)
    for _ in range(draws):
        (first, second), locals_ = augment.multi_crop(image, rng, c)
        hits += changed(first), changed(second), np.mean([changed(view) for view in locals_])
    return hits / draws


def test_probabilities_of_every_operation():
    flat = np.full((40, 40, 3), (200, 90, 30), np.uint8)
    checked = np.indices((40, 40)).sum(0) % 2 * 255  # blur turns it grey
    board = np.repeat(checked[..., None], 3, axis=2).astype(np.uint8)
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (40, 1, 3))
    whole = dict(global_size=40, local_size=40, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0))
    tolerance = 0.045  # more than 3.5 standard errors of 1500 draws
    cases = [
        (flat, dict(grayscale=0.2), lambda v: v[0, 0, 0] == v[0, 0, 2], (0.2, 0.2, 0.2)),
        (flat, dict(jitter=0.8), lambda v: (v[0, 0] != flat[0, 0]).any(), (0.8, 0.8, 0.8)),
        (ramp, dict(flip=0.5), lambda v: v[0, 0, 0] > v[0, -1, 0], (0.5, 0.5, 0.5)),
        (flat, dict(solarize=0.2), lambda v: v[0, 0, 0] == 55, (0.0, 0.2, 0.0)),
        (
            board,
            dict(blur=(1.0, 0.1, 0.5), blur_sigma=(1.0, 1.0)),
            lambda v: np.ptp(v[10:30, 10:30]) < 50,
            (1.0, 0.1, 0.5),
        ),
    ]
    for image, on, changed, expected in cases:
        got = share(image, plain(**whole, **on), changed)
        np.testing.assert_allclose(got, expected, atol=tolerance, err_msg=str(on))
        exact = np.isin(expected, (0.0, 1.0))
        np.testing.assert_array_equal(got[exact], np.array(expected)[exact])


def test_later_global_views_are_blurred_and_solarized_as_the_second_one():
    checked = np.indices((40, 40)).sum(0) % 2 * 255  # blur turns it grey
    board = np.repeat(checked[..., None], 3, axis=2).astype(np.uint8)
    flat, rng = np.full((40, 40, 3), 200, np.uint8), np.random.default_rng(0)
    whole = dict(global_size=40, global_scale=(1.0, 1.0), global_crops=4, local_crops=0)
    blur = plain(**whole, blur=(0.0, 1.0, 0.0), blur_sigma=(1.0, 1.0))
    views, _ = augment.multi_crop(board, rng, blur)
    assert [np.ptp(view[10:30, 10:30]) < 50 for view in views] == [False, True, True, True]
    views, _ = augment.multi_crop(flat, rng, plain(**whole, solarize=1.0))
    assert [view[0, 0, 0] for view in views] == [200, 55, 55, 55]


def test_jitter_order_and_strengths_are_random():
    rng = np.random.default_rng(0)
    grey = np.full((8, 8, 3), 100, np.uint8)
    levels = [augment.color_jitter(grey, rng, 0.4, 0.0, 0.0, 0.0)[0, 0, 0] for _ in range(3000)]
    assert min(levels) in (60, 61) and max(levels) in (139, 140)
    assert abs(np.mean(levels) - 100) < 1.5
    assert {int(24 * rng.random()) for _ in range(500)} == set(range(24))
    image = photo()
    np.testing.assert_array_equal(augment.color_jitter(grey, rng, 0.0, 0.0, 0.0, 0.0), grey)
    assert (augment.color_jitter(image, rng, 0.4, 0.4, 0.2, 0.1) != image).any()


@pytest.mark.parametrize("height, width", [(50, 80), (80, 50), (64, 64), (33, 200)])
def test_eval_image_is_the_centre(height, width):
    image = photo(height, width)
    short = min(height, width)
    size = (int(40 * width / short), int(40 * height / short))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    expected = np.asarray(resized)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(augment.eval_image(image, 40, 32), expected)


def test_eval_image_of_the_right_size_is_the_image():
    image = photo(32, 32)
    np.testing.assert_array_equal(augment.eval_image(image, 32, 32), image)


@pytest.mark.parametrize("height, width", [(30, 500), (500, 30), (400, 4000)])
def test_of_a_thin_image_the_centre_is_what_it_would_be(height, width):
    image = photo(height, width)
    scale = 40 / min(height, width)
    size = (int(scale * width), int(scale * height))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    left, top = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    expected = resized[top : top + 32, left : left + 32].astype(int)
    assert np.abs(augment.eval_image(image, 40, 32) - expected).max() <= 2


@pytest.mark.parametrize("shape", [(1, 40000, 3), (40000, 1, 3), (1, 4000, 3)])
def test_a_thin_image_does_not_take_memory_by_its_length(shape, monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: Any) -> Image.Image:
        sizes.append(size)
        assert size[0] * size[1] < 1e6
        return resize(self, size, *args)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    view = augment.eval_image(image, 256, 224)
    assert view.shape == (224, 224, 3) and sizes
    middle = image.reshape(-1, 3)[max(shape) // 2]
    assert np.abs(view[112, 112].astype(int) - middle).max() < 128
