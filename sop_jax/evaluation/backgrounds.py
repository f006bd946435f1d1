"""How much a classifier relies on the background of images: ImageNet-9 (Xiao et al., ICLR 2021).

A linear head on frozen features classifies the clean images and seven variations of them, whose
background or foreground was changed. iBOT's `in9_eval.py` skips the alphabetically first folder of
the data, which silently drops `mixed_next` where all folders are variants; that is not reproduced.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import Float, Integer

from sop_jax import models
from sop_jax.data.imagenet9 import (
    CLASSES,
    CLEAN,
    EXPECTED,
    IMAGENET,
    VARIATIONS,
    open_variants,
    read_map,
)
from sop_jax.data.listed import ListedFiles
from sop_jax.data.named import name_folder
from sop_jax.errors import UserError
from sop_jax.evaluation.features import pooled
from sop_jax.evaluation.heads import Head, classify, read_head
from sop_jax.evaluation.tables import Part, percent
from sop_jax.evaluation.task import Subject, Task, Tools, View
from sop_jax.evaluation.views import view_of
from sop_jax.rules import COUNT, TEXT

RULES = {"head": TEXT, "crop": COUNT}

VARIANTS = (*VARIATIONS, CLEAN)

# Table 6 of the SOP paper: ViT-B/16, accuracy in percent, in the order of VARIANTS.
PAPER = {
    "iBOT": (91.9, 89.7, 81.9, 79.7, 54.7, 17.6, 20.4, 96.8),
    "MaSSL": (91.0, 90.2, 83.0, 80.4, 53.4, 15.8, 23.7, 97.6),
    "SOP": (93.3, 91.4, 85.6, 83.1, 55.8, 19.9, 22.8, 97.1),
}


class Inputs(NamedTuple):
    """The data of the task.

    Attributes:
        variants: the images by the name of the variant.
        head: the classifier.
        to_nine: the ImageNet-9 class of each of its classes, or -1; None if they are the nine.
        view: what the features of the head are.
    """

    variants: dict[str, ListedFiles]
    head: Head
    to_nine: np.ndarray | None
    view: View


def settings() -> ml_collections.ConfigDict:
    """Returns the defaults.

    `head` is the file of a linear head: `--task=linear` leaves head.npz in its folder. Images are
    used at the size `crop`, which is theirs, so that nothing is cut off.
    """
    return ml_collections.ConfigDict(dict(head="", crop=224))


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Inputs:
    """Opens the variants and the head; see `task.Open`."""
    if not settings.head:
        raise UserError(
            "eval.head is not set. Expected the file of a linear head of ImageNet's 1000 classes, "
            "or of ImageNet-9's nine. Train one with --task=linear, which leaves head.npz"
        )
    root = name_folder(config.data, data, EXPECTED)
    head = read_head(settings.head)
    own = {name: getattr(head.view, name) for name in ("layers", "pool", "interpolation")}
    view = view_of(config, None, resize=settings.crop, crop=settings.crop, **own)
    classes, width = head.weights.shape
    if (found := count_features(config, view)) != width:
        raise UserError(
            f"the head {settings.head} is for {width} features, but this network has {found} "
            f"(layers={view.layers}, pool={view.pool}). Expected a head that was trained on "
            "features of this network. Name another head"
        )
    if classes not in (IMAGENET, CLASSES):
        raise UserError(
            f"the head {settings.head} has {classes} classes. Expected ImageNet's {IMAGENET} or "
            f"ImageNet-9's {CLASSES}. Name another head"
        )
    to_nine = read_map(root) if classes == IMAGENET else None
    return Inputs(open_variants(root), head, to_nine, view)


def count_features(config: ml_collections.ConfigDict, view: View) -> int:
    """Returns the number of features of an image, without computing any."""
    model = models.build(config, config.augment.global_size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, view.crop, view.crop, 3), np.uint8)

    def features(params: models.Params, images: jax.Array) -> jax.Array:
        return pooled(model, params, images, view)[0]

    return jax.eval_shape(features, params, image).shape[1]


def run(
    subject: Subject, inputs: Inputs, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Returns the accuracies.

    Returns:
        The accuracy of each variant, a share in [0, 1], or None if its folder does not exist;
        `bg_gap`, that of `mixed_same` minus that of `mixed_rand`; and the number of `unreadable`
        images, which are left out.

    Raises:
        UserError: the head was trained on the features of another network.
    """
    if (trained := inputs.head.fingerprint) not in ("", subject.fingerprint):
        raise UserError(
            f"the head {settings.head} was trained on the features of another network ({trained}) "
            f"than {subject.name} ({subject.fingerprint}). Expected a head of this network. Train "
            "one with --task=linear, or give the --step and the --network that it belongs to"
        )
    result: dict[str, Any] = dict.fromkeys(VARIANTS)
    unreadable = 0
    for name, images in inputs.variants.items():
        features = tools.whole(tools.features(images, inputs.view))
        unreadable += len(features.corrupt)
        if len(features.index):
            logits = classify(inputs.head, features.vectors)
            right = predict(logits, inputs.to_nine) == features.labels
            result[name] = float(right.mean())
    same, random = result["mixed_same"], result["mixed_rand"]
    gap = None if same is None or random is None else same - random
    return result | {"bg_gap": gap, "unreadable": unreadable}


def predict(
    logits: Float[np.ndarray, "n C"], to_nine: Integer[np.ndarray, " C"] | None
) -> Integer[np.ndarray, " n"]:
    """Returns the ImageNet-9 class that each row of logits stands for, or -1 for none of the nine.

    The best of all C classes is found first, as in the official code, so that an image can be
    classified as none of the nine.

    Args:
        logits: the scores of the C classes.
        to_nine: the ImageNet-9 class of each class, or -1; None if the classes are the nine.
    """
    best = logits.argmax(axis=1)
    return best if to_nine is None else np.asarray(to_nine)[best]


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns the accuracies in percent, and the paper's."""
    rows: list[list[Any]] = [["variant", "here %", *PAPER]]
    for place, name in enumerate(VARIANTS):
        rows.append([name, percent(result[name]), *(values[place] for values in PAPER.values())])
    same, random = VARIANTS.index("mixed_same"), VARIANTS.index("mixed_rand")
    gaps = (values[same] - values[random] for values in PAPER.values())
    rows.append(["BG-gap", percent(result["bg_gap"]), *gaps])
    where = "The methods' numbers are those of ViT-B in table 6 of the SOP paper"
    parts: list[Part] = [rows, where]
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} images could not be read and were left out")
    return parts


TASK = Task(
    does="accuracy on ImageNet-9, whose backgrounds or foregrounds were changed",
    expects=f"{EXPECTED}; and --eval.head=FILE, a linear head",
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="imagenet9",
    sources=lambda inputs: dict(inputs.variants),
    paths=("head",),
)
