"""The golden numbers of fine-tuning and of the transforms of evaluations."""

import functools
import math

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import Found, exact

from sop_jax import models, schedules
from sop_jax.config import paper
from sop_jax.data import augment, randaugment
from sop_jax.evaluation import mixing
from sop_jax.training.checkpoint import named_leaves
from sop_jax.training.layer_decay import decayed, layer_scales
from sop_jax.weights import mapping

Golden = dict[str, np.ndarray]
Numbers = dict[str, Found]
PEAK, FLOOR, WARMUP_EPOCHS = 4e-3, 1e-6, 2
MORE_DRAWS = 4  # times as many as the expected means, so that these decide how far both are apart
INPUTS = (
    *(f"finetune/{name}" for name in ("names", "depth", "decays", "loss/logits")),
    *(f"finetune/mix/{name}" for name in ("images", "labels", "classes", "smoothing")),
    *(f"finetune/mix/{name}" for name in ("mixup_lambda", "cutmix_boxes", "cutmix_lambda_drawn")),
    *("finetune/schedule/epochs_steps", "finetune/erase/size", "finetune/erase/draws"),
    "transforms/resize_crop",
)
INPUT_STARTS = ("transforms/image_", "transforms/boxes_")


@functools.cache
def golden() -> Golden:
    """Returns the golden arrays; means and deviations of draws are in units of their tolerances."""
    arrays = golden_numbers.load("evaluate.npz")
    for prefix, draws in statistics(arrays).items():
        std = arrays[f"{prefix}std"]
        arrays[f"{prefix}mean"] = arrays[f"{prefix}mean"] / (std / math.sqrt(draws))
        arrays[f"{prefix}std"] = np.ones_like(std)
        arrays[f"{prefix}unit"] = std
    return arrays


def statistics(arrays: Golden) -> dict[str, int]:
    """Returns the number of draws by the prefix of the names of their mean and deviation."""
    boxes = {f"transforms/box_{name}_": 20_000 for name in ("linear", "global", "local")}
    return {"finetune/erase/": int(arrays["finetune/erase/draws"]), **boxes}


def measured(prefix: str, draws: np.ndarray) -> Numbers:
    """Returns the mean, within 4 standard errors, and the deviation, within 3 %, of draws."""
    unit = golden()[f"{prefix}unit"]
    mean = draws.mean(0) / (unit / math.sqrt(statistics(golden())[prefix]))
    return {
        f"{prefix}mean": Found(mean, 4.0, absolute=True),
        f"{prefix}std": Found(draws.std(0) / unit, 0.03),
    }


def layers() -> Numbers:
    """Returns the factors and the weight decay of each parameter by its PyTorch name."""
    arrays = golden()
    config = paper()
    depth = int(arrays["finetune/depth"])
    config.model.update(size="custom", width=4, depth=depth, heads=1, patch=4)
    config.head.update(hidden=4, dim=4)
    params = jax.eval_shape(models.build(config, 16).init, jax.random.key(0))
    classifier = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}

    def by_name(tree) -> dict[str, float]:
        whole = jax.tree.map(
            lambda x, leaf: np.broadcast_to(np.asarray(x, np.float64), leaf.shape), tree, trained
        )
        leaves = named_leaves(whole)
        own = {name: leaves.pop(f"classifier/{name}") for name in ("kernel", "bias")}
        found = mapping.export("ibot", "vit", leaves).arrays
        found |= {"head.weight": own["kernel"], "head.bias": own["bias"]}
        assert all((found[name] == found[name].flat[0]).all() for name in names)
        return {name: float(found[name].flat[0]) for name in names}

    trained = params | {"classifier": classifier}
    names = arrays["finetune/names"].tolist()
    scales = [by_name(layer_scales(trained, float(d))) for d in arrays["finetune/decays"]]
    decays = by_name(jax.tree.map(float, decayed(trained)))
    largest = arrays["finetune/weight_decays"].max()
    return {
        "finetune/lr_scales": exact([[row[name] for name in names] for row in scales]),
        "finetune/weight_decays": exact([largest * decays[name] for name in names]),
    }


def mixes() -> Numbers:
    arrays = golden()
    images = jnp.moveaxis(jnp.asarray(arrays["finetune/mix/images"]), 1, -1)
    labels = jnp.asarray(arrays["finetune/mix/labels"], jnp.int32)
    classes, smoothing = (
        arrays[f"finetune/mix/{name}"].item() for name in ("classes", "smoothing")
    )
    targets = mixing.smooth(labels, classes, smoothing)
    height, width = images.shape[1:3]
    first = lambda x: np.moveaxis(np.asarray(x), -1, 1)  # noqa: E731
    shares = jnp.asarray(arrays["finetune/mix/mixup_lambda"], jnp.float32)
    boxes = jnp.asarray(arrays["finetune/mix/cutmix_boxes"], jnp.int32)
    kept = [mixing.kept_share(box, height, width) for box in boxes]
    return {
        "finetune/mix/mixup_images": Found([first(mixing.mixup(images, s)) for s in shares]),
        "finetune/mix/mixup_targets": Found([mixing.mix_targets(targets, s) for s in shares]),
        "finetune/mix/cutmix_images": Found([first(mixing.cutmix(images, box)) for box in boxes]),
        "finetune/mix/cutmix_targets": Found([mixing.mix_targets(targets, s) for s in kept]),
        "finetune/mix/cutmix_lambda": Found(kept),
    }


def losses() -> Numbers:
    arrays = golden()
    logits = jnp.asarray(arrays["finetune/loss/logits"], jnp.float32)
    labels = jnp.asarray(arrays["finetune/mix/labels"], jnp.int32)
    valid = jnp.ones(len(labels), bool)
    classes = arrays["finetune/mix/classes"].item()
    smoothed = [
        mixing.mean_loss(logits, mixing.smooth(labels, classes, smoothing), valid)
        for smoothing in (0.1, 0.3)
    ]
    soft = jnp.asarray(arrays["finetune/mix/cutmix_targets"][0])
    return {
        "finetune/loss/label_smoothing": Found(smoothed),
        "finetune/loss/soft_target": Found(mixing.mean_loss(logits, soft, valid)),
    }


def rates() -> Numbers:
    epochs, epoch = golden()["finetune/schedule/epochs_steps"].tolist()
    steps = jnp.arange(epochs * epoch)
    warm = schedules.learning_rate(PEAK, FLOOR, WARMUP_EPOCHS * epoch, epochs * epoch)
    cold = schedules.learning_rate(PEAK, FLOOR, 0, epochs * epoch)
    return {
        "finetune/schedule/lr": Found(jax.vmap(warm)(steps)),
        "finetune/schedule/lr_no_warmup": Found(jax.vmap(cold)(steps)),
    }


def erasing() -> Numbers:
    arrays, rng = golden(), np.random.default_rng(0)
    height, width = arrays["finetune/erase/size"].tolist()
    draws = int(arrays["finetune/erase/draws"])
    boxes = [randaugment.erase_box(height, width, rng) for _ in range(MORE_DRAWS * draws)]
    hits = np.array([box for box in boxes if box is not None])
    top, left, h, w = hits.T
    values = np.stack(
        [
            *(h * w / (height * width), np.log(h / w)),
            *((top + h / 2) / height, (left + w / 2) / width, h, w),
        ],
        1,
    )
    expected = float(arrays["finetune/erase/hit_rate"])
    error = math.sqrt(expected * (1 - expected) / draws)
    hit_rate = {"finetune/erase/hit_rate": Found(len(hits) / len(boxes), 4 * error, absolute=True)}
    return measured("finetune/erase/", values) | hit_rate


def crops() -> Numbers:
    arrays = golden()
    resize, crop = arrays["transforms/resize_crop"].tolist()
    numbers = {}
    for i in range(sum(key.startswith("transforms/image_") for key in arrays)):
        image = arrays[f"transforms/image_{i}"]
        for kind in ("bicubic", "bilinear"):
            whole = augment.resize_short(image, resize, kind)
            centre = augment.eval_image(image, resize, crop, kind)
            boxes = map(tuple, arrays[f"transforms/boxes_{i}"].tolist())
            cut = [augment.resized_crop(image, box, crop, kind) for box in boxes]
            cut[1] = cut[1][:, ::-1]
            level = functools.partial(Found, tolerance=1.0, absolute=True)
            numbers[f"transforms/eval_{kind}_resized_{i}"] = level(whole)
            numbers[f"transforms/eval_{kind}_{i}"] = level(centre)
            numbers[f"transforms/train_{kind}_{i}"] = level(np.stack(cut))
        centre = jnp.asarray(augment.eval_image(image, resize, crop))
        pixels = models.normalize(centre[None], jnp.dtype("float32"))[0]
        grey = 1 / (255 * min(models.STD))
        numbers[f"transforms/eval_tensor_{i}"] = Found(
            np.moveaxis(np.asarray(pixels), -1, 0), grey, absolute=True
        )
    return numbers


def boxes() -> Numbers:
    arrays, numbers = golden(), {}
    height, width = arrays["transforms/image_0"].shape[:2]
    for prefix, draws in statistics(arrays).items():
        if not prefix.startswith("transforms/box_"):
            continue
        rng, scale = np.random.default_rng(0), tuple(arrays[f"{prefix}scale"].tolist())
        drawn = [augment.crop_box(height, width, scale, rng) for _ in range(MORE_DRAWS * draws)]
        top, left, h, w = np.array(drawn).T
        values = np.stack(
            [
                *(h * w / (height * width), np.log(w / h)),
                *((top + h / 2) / height, (left + w / 2) / width),
            ],
            1,
        )
        numbers |= measured(prefix, values)
    return numbers


PARTS = (layers, mixes, losses, rates, erasing, crops, boxes)
computed = functools.cache(lambda part: part())


@pytest.mark.medium
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_numbers_agree(part):
    assert golden_numbers.differences(golden(), computed(part)) == []


@pytest.mark.medium
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_moved_entry_is_noticed(part):
    assert golden_numbers.unnoticed(golden(), computed(part)) == []


@pytest.mark.medium
def test_every_expected_array_is_compared():
    compared = {key for part in PARTS for key in computed(part)}
    inputs = {
        key
        for key in golden()
        if key in INPUTS or key.startswith(INPUT_STARTS) or key.endswith(("_unit", "/unit"))
    }
    inputs |= {f"transforms/box_{name}_scale" for name in ("linear", "global", "local")}
    sections = {key for key in golden() if key.startswith(("finetune/", "transforms/"))}
    assert compared | inputs == sections and not compared & inputs


def test_boxes_of_cutmix_are_those_of_some_centre():
    arrays = golden()
    height, width = arrays["finetune/mix/images"].shape[2:]
    centres = jnp.stack(jnp.mgrid[:height, :width], -1).reshape(-1, 2)
    shares = arrays["finetune/mix/cutmix_lambda_drawn"]
    for share, box in zip(shares, arrays["finetune/mix/cutmix_boxes"], strict=True):
        at = functools.partial(mixing.cut_box, jnp.float32(share), height=height, width=width)
        found = np.asarray(jax.vmap(at)(centres))
        assert (found == box).all(1).any()
