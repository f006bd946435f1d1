"""Compares every expected number of segmentation with what the package computes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_numbers import Found, differences, exact, load, unnoticed

from sop_jax import models, schedules
from sop_jax.config import paper
from sop_jax.data import ade20k
from sop_jax.evaluation import areas, segment, sliding
from sop_jax.models import segmentation
from sop_jax.models.segmentation import Design
from sop_jax.training import layer_decay
from sop_jax.training.checkpoint import named_leaves
from sop_jax.training.optim import decays
from sop_jax.weights import mapping
from sop_jax.weights.tables import MMSEG

Golden = Mapping[str, np.ndarray]

INPUTS = (
    *("seg/backbone/image", "seg/backbone/out_indices", "seg/pyramid/input", "seg/loss/labels"),
    *("seg/slide/image", "seg/slide/kernel", "seg/slide/crop_stride", "seg/slide/ori_shape"),
    *("seg/optimizer/names", "seg/schedule/base_warmup_total"),
    *("seg/rescale/input", "seg/rescale/scale"),
)


@functools.cache
def golden() -> Golden:
    backbone = {key: x for key, x in load("backbone.npz").items() if key.startswith("vit/")}
    return load("evaluate.npz") | backbone


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1), jnp.float32)


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def weights(prefix: str, name: str) -> dict[str, np.ndarray]:
    """Returns the arrays below a golden prefix, by mmsegmentation's names."""
    return {
        f"{name}.{key.removeprefix(prefix)}": x
        for key, x in golden().items()
        if key.startswith(prefix)
    }


def loaded(leaves: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns leaves by path, read by mmsegmentation's names; all arrays must be used."""
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    read = mapping.load_leaves(MMSEG, arrays, shapes, lambda table, rows: table)
    assert not read.ignored
    return {path: jnp.asarray(leaf) for path, leaf in read.leaves.items()}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def module(make: Callable[..., Any], root: str, arrays: dict[str, np.ndarray]) -> Any:
    """Returns a part of a network with weights by mmsegmentation's names."""
    config = paper()
    config.model.dtype = "float32"
    made = make(start=models.start_of(config.model), rngs=nnx.Rngs(params=jax.random.key(0)))
    graph, state = nnx.split(made)
    tree = {root: nnx.to_pure_dict(state)}
    leaves = loaded(named_leaves(tree), arrays)
    nnx.replace_by_pure_dict(state, nested(leaves)[root])
    return nnx.merge(graph, state)


def segmenter(norm: bool) -> tuple[segmentation.Segmenter, models.Params]:
    """Returns the golden backbone with the linear head."""
    image_size, patch, width, depth, heads = (int(x) for x in golden()["vit/config"])
    config = paper()
    size = dict(width=width, depth=depth, heads=heads, patch=patch)
    config.model.update(size | dict(size="custom", dtype="float32"))
    classes = len(golden()["seg/linear_head/weights/conv_seg.bias"])
    layers = tuple(int(i) for i in golden()["seg/backbone/out_indices"])
    made = segmentation.build(config, Design("linear", layers, classes, norm), image_size)
    arrays = weights("vit/weights/", "backbone")
    arrays |= weights("seg/linear_head/weights/", "decode_head")
    leaves = named_leaves(jax.eval_shape(made.init, jax.random.key(0)))
    return made, nested(loaded(leaves, arrays))


def maps(norm: bool, image: jax.Array) -> np.ndarray:
    """Returns the feature maps [levels,B,D,h,w], which a head with the identity passes on."""
    made, params = segmenter(norm)
    width = params["backbone"]["cls_token"].shape[0]
    size = len(params["decode_head"]["conv_seg"]["kernel"])
    params["decode_head"]["conv_seg"] = {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}
    logits = nchw(made.apply(params, image).logits)
    return np.stack(np.split(logits, size // width, axis=1))


def pixels(x: np.ndarray) -> jax.Array:
    """Inverts the normalization of the package, because golden images are normalized."""
    return jnp.asarray((np.moveaxis(x, 1, -1) * models.STD + models.MEAN) * 255, jnp.float32)


def miou() -> dict[str, Found]:
    names = [key for key in golden() if key.startswith("seg/miou/label_")]
    total = sum(
        areas.areas(
            golden()[name.replace("label", "pred")],
            ade20k.reduce_zero_label(golden()[name]),
            ade20k.CLASSES,
        )
        for name in names
    )
    scores = areas.scores(total)
    return {
        "seg/miou/areas": exact(total),
        **{f"seg/miou/{name}": Found(scores[name], 1e-12) for name in ("aAcc", "mAcc", "mIoU")},
        "seg/miou/iou_per_class": Found(absent(areas.ratios(total[0], total[1])), 1e-12),
        "seg/miou/acc_per_class": Found(absent(areas.ratios(total[0], total[3])), 1e-12),
    }


def absent(shares: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(shares), -1, shares)


def linear_head() -> dict[str, Found]:
    image = pixels(golden()["seg/backbone/image"])
    made, params = segmenter(True)
    logits = made.apply(params, image).logits
    resized = segmentation.resize(logits, image.shape[1:3])
    return {
        "seg/backbone/features_norm": Found(maps(True, image)),
        "seg/backbone/features_raw": Found(maps(False, image)),
        "seg/linear_head/logits": Found(nchw(logits)),
        "seg/linear_head/logits_resized": Found(nchw(resized)),
    }


def pyramid() -> dict[str, Found]:
    x = nhwc(golden()["seg/pyramid/input"])
    found = {}
    for patch in segmentation.ADAPTED:
        make = functools.partial(segmentation.Pyramid, x.shape[-1], patch)
        made = module(make, "pyramid", weights(f"seg/pyramid/patch{patch}/weights/", "backbone"))
        levels, _ = made([x] * 4, False)
        for i, level in enumerate(levels):
            found[f"seg/pyramid/patch{patch}/out_{i}"] = Found(nchw(level))
    return found


def heads() -> dict[str, Found]:
    levels = [nhwc(golden()[f"seg/pyramid/patch16/out_{i}"]) for i in range(4)]
    classes, channels = golden()["seg/uper/weights/conv_seg.weight"].shape[:2]
    _, inner = golden()["seg/aux/weights/conv_seg.weight"].shape[:2]
    design = Design("upernet", (0, 1, 2, 3), classes, True, channels, inner)
    width = levels[0].shape[-1]
    head = module(
        functools.partial(segmentation.UPerHead, width, design),
        "decode_head",
        weights("seg/uper/weights/", "decode_head"),
    )
    auxiliary = module(
        functools.partial(segmentation.AuxiliaryHead, width, design),
        "auxiliary_head",
        weights("seg/aux/weights/", "auxiliary_head"),
    )
    return {
        "seg/uper/ppm_fused": Found(nchw(head.pool(levels[-1], False)[0])),
        "seg/uper/logits": Found(nchw(head(levels, None, False)[0])),
        "seg/aux/logits": Found(nchw(auxiliary(levels[2], None, False)[0])),
    }


def loss() -> dict[str, Found]:
    logits = nhwc(golden()["seg/linear_head/logits"])
    labels = jnp.asarray(golden()["seg/loss/labels"])[None]
    return {
        "seg/loss/loss": Found(segment.pixel_loss(logits, labels)),
        "seg/loss/acc": Found(100 * segment.pixel_accuracy(logits, labels)),
    }


def slide() -> dict[str, Found]:
    image = nhwc(golden()["seg/slide/image"])
    kernel = jnp.asarray(golden()["seg/slide/kernel"].transpose(2, 3, 1, 0))
    crop, stride = (int(x) for x in golden()["seg/slide/crop_stride"])
    size = image.shape[1:3]
    boxes = tuple(sliding.windows(*size, crop, stride))
    parts = jnp.concatenate([image[:, t : t + h, x : x + w] for t, x, h, w in boxes])
    logits = jax.lax.conv_general_dilated(
        *(parts, kernel, (8, 8), "VALID"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    shape = tuple(int(x) for x in golden()["seg/slide/ori_shape"])
    probabilities = jax.nn.softmax(sliding.merge(logits, boxes, size, shape))
    return {
        "seg/slide/windows": exact(len(boxes)),
        "seg/slide/counts": exact(sliding.counts(boxes, size)),
        "seg/slide/logits": Found(nchw(sliding.merge(logits, boxes, size, size)[None])),
        "seg/slide/probabilities": Found(nchw(probabilities[None])),
        "seg/slide/prediction": exact(probabilities.argmax(-1)),
    }


def optimizer() -> dict[str, Found]:
    names = [str(name) for name in golden()["seg/optimizer/names"]]
    depth = 1 + max(int(name.split(".")[2]) for name in names if ".blocks." in name)
    decay = float(max(x for x in golden()["seg/optimizer/lr_scales"] if x < 1))
    weight_decay = float(golden()["seg/optimizer/weight_decays"].max())
    config = paper()
    config.model.update(dict(size="custom", width=8, depth=depth, heads=2, patch=16))
    design = Design("upernet", tuple(range(4)), 3, True, 4, 4)
    made = segmentation.build(config, design, 32)
    params = jax.eval_shape(made.init, jax.random.key(0))
    scales = layer_decay.layer_scales(params, decay)
    decayed = decays(params)  # `decay_tokens`, as in the official code

    def by_name(tree: Any) -> np.ndarray:
        whole = jax.tree.map(lambda leaf, x: np.broadcast_to(x, leaf.shape), params, tree)
        arrays = mapping.write_arrays(MMSEG, named_leaves(whole)).arrays
        for name in names:
            assert len(np.unique(arrays[name])) == 1, name
        trained = [
            name
            for name in arrays
            if not name.endswith(("running_mean", "running_var", "masked_embed"))
            and not name.startswith("auxiliary_head.")
        ]
        assert sorted(trained) == sorted(names)
        return np.array([arrays[name].flat[0] for name in names])

    return {
        "seg/optimizer/lr_scales": Found(by_name(scales), 1e-6),
        "seg/optimizer/weight_decays": Found(
            by_name(jax.tree.map(lambda x: weight_decay * x, decayed)), 1e-12
        ),
    }


def schedule() -> dict[str, Found]:
    base, warmup, total = golden()["seg/schedule/base_warmup_total"]
    rate = schedules.linear_decay(float(base), int(warmup), int(total))
    return {"seg/schedule/lr": Found(jax.vmap(rate)(jnp.arange(int(total))), 1e-5)}


def rescale() -> dict[str, Found]:
    long, short = (int(x) for x in golden()["seg/rescale/scale"])
    image = ade20k.rescale(golden()["seg/rescale/input"], (long, short))
    normalized = models.normalize(jnp.asarray(image)[None], jnp.dtype("float32"))
    return {
        "seg/rescale/output": Found(image, 1.0, absolute=True),
        "seg/rescale/normalised_mean": Found(normalized.mean((0, 1, 2))),
    }


def positions() -> dict[str, Found]:
    table = jnp.asarray(golden()["vit/weights/pos_embed"][0])
    sides = [key.rpartition("/")[2] for key in golden() if key.startswith("seg/pos_embed/")]
    return {
        f"seg/pos_embed/{side}": Found(segment.resized_positions(table, int(side)))
        for side in sides
    }


PARTS = (
    *(miou, linear_head, pyramid, heads, loss, slide, optimizer, schedule, rescale, positions),
)


@functools.cache
def numbers() -> dict[str, Found]:
    return {key: found for part in PARTS for key, found in part().items()}


@pytest.mark.medium
def test_every_number_of_segmentation():
    expected = {
        key
        for key in golden()
        if key.startswith("seg/")
        and key not in INPUTS
        and "/weights/" not in key
        and not key.startswith(("seg/miou/label_", "seg/miou/pred_"))
    }
    assert expected == set(numbers())
    assert differences(golden(), numbers()) == []


@pytest.mark.medium
def test_any_changed_number_of_segmentation_is_noticed():
    assert unnoticed(golden(), numbers()) == []
