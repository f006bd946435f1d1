"""Fine-tuning of a whole network on labelled images, by the recipes of iBOT and the SOP paper.

There are three kinds of recipes, each a set of settings with a name (RECIPES):

- full fine-tuning on ImageNet, BEiT's recipe as in iBOT's `run_class_finetuning.py`, for each size
  of a ViT, and each with the learning rates that the papers try;
- semi-supervised fine-tuning with 1 % or 10 % of the labels, as in iBOT's
  `semi_supervised/eval_cls.py`: from the first layer of the projection head, which the classifier
  follows;
- transfer to smaller data sets, DeiT's recipe as in iBOT's `eval_cls.py`.

What differs from those scripts: a step mixes the global batch with one share, whereas they draw one
on each GPU; the last batch of an epoch is smaller instead of left out; of repeated augmentations,
all are in one global batch; and a learning rate of DeiT's recipe does not end above its peak where
the batch is so small that `min_lr` is. The scripts validate full fine-tuning with bilinear and the
others with bicubic scaling, as here. They keep an average of the parameters in the last two, but
evaluate the parameters themselves; here there is no average.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from ml_collections import config_dict

from sop_jax.data import transfer
from sop_jax.data.augment import FILTERS
from sop_jax.data.decode import decoding
from sop_jax.data.labelled import Recipe, labelled_batches, steps_per_epoch
from sop_jax.data.randaugment import STRONGEST
from sop_jax.data.sources import Source
from sop_jax.data.subsets import Subset, labels_of
from sop_jax.errors import UserError
from sop_jax.evaluation import mixing
from sop_jax.evaluation.accuracy import count_right, summary
from sop_jax.evaluation.features import host_batches
from sop_jax.evaluation.fit import Problem, fit
from sop_jax.evaluation.splits import (
    Splits,
    count_labels,
    few_labels,
    open_transfer_set,
    sources_of,
)
from sop_jax.evaluation.tables import Part, Table, papers_table, percent
from sop_jax.evaluation.task import Subject, Task, Tools, View
from sop_jax.evaluation.views import view_of
from sop_jax.models import Model, Params, build
from sop_jax.models.linear import linear
from sop_jax.parallel.mesh import replicated, to_devices
from sop_jax.rules import (
    COUNT,
    COUNT_OR_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    TEXT,
    Rule,
    ascending,
    less_than,
    number,
    one_of,
    positive,
    some,
    unset_or,
    whole,
)
from sop_jax.schedules import Schedule, learning_rate
from sop_jax.training.layer_decay import adamw

SCHEDULES = ("step", "epoch")
AUTO = "auto"

_COMMON = dict(
    set="",
    percent=100.0,
    list="",
    resize=None,
    crop=None,
    weight_decay=0.05,
    drop_path=0.1,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    magnitude=9.0,
    erase=0.25,
    scale=(0.08, 1.0),
    interpolation="bicubic",
    validate_epochs=1,
    threads=8,
    workers=0,
)
_FULL = _COMMON | dict(
    batch_size=1024,
    lr=(8e-4, 9e-4, 1e-3, 2e-3),
    lr_batch=0,
    schedule="step",
    warmup_epochs=20,
    warmup_lr=0.0,
    min_lr=1e-6,
    decay_tokens=False,
    copies=1,
    head_layers=0,
    head_scale=0.001,
    validate_interpolation="bilinear",
)
_DEIT = _COMMON | dict(
    lr_batch=512,
    schedule="epoch",
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-5,
    layer_decay=1.0,
    decay_tokens=True,
    copies=3,
    head_layers=0,
    head_scale=1.0,
    validate_interpolation="bicubic",
)
_SEMI = _DEIT | dict(batch_size=1024, epochs=1000, lr=(5e-6,), head_layers=1)
_TRANSFER = _DEIT | dict(batch_size=768, epochs=1000, lr=(7.5e-6,))
_INAT = _TRANSFER | dict(epochs=360, erase=0.1)

RECIPES: dict[str, dict[str, Any]] = {
    "vits": _FULL | dict(epochs=200, layer_decay=0.75, drop_path=0.1),
    "vitb": _FULL | dict(epochs=100, layer_decay=0.65, drop_path=0.2),
    "vitl": _FULL | dict(epochs=50, layer_decay=0.75, drop_path=0.4, warmup_epochs=5),
    "semi1": _SEMI | dict(percent=1.0),
    "semi10": _SEMI | dict(percent=10.0),
    "cifar10": _TRANSFER | dict(set="cifar10"),
    "cifar100": _TRANSFER | dict(set="cifar100"),
    "flowers": _TRANSFER | dict(set="flowers"),
    "cars": _TRANSFER | dict(set="cars", lr=(7.5e-5,)),
    "inat18": _INAT | dict(set="inat18"),
    "inat19": _INAT | dict(set="inat19"),
    "inat18_vits": _INAT | dict(set="inat18", lr=(5e-5,)),
    "inat19_vits": _INAT | dict(set="inat19", lr=(2.5e-5,)),
}
_OF_SIZE = {"ti": "vits", "s": "vits", "b": "vitb", "l": "vitl"}

_VALUES: dict[str, Rule] = {
    "set": one_of(["", *transfer.SETS]),
    "percent": number(1e-6, 100),
    "list": TEXT,
    "resize": COUNT,
    "crop": COUNT,
    "batch_size": COUNT,
    "epochs": COUNT,
    "lr": some(POSITIVE),
    "lr_batch": COUNT_OR_ZERO,
    "schedule": one_of(SCHEDULES),
    "warmup_epochs": COUNT_OR_ZERO,
    "warmup_lr": NOT_NEGATIVE,
    "min_lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "layer_decay": positive(1),
    "decay_tokens": Rule(lambda value: isinstance(value, bool), "true or false"),
    "drop_path": less_than(1),
    "mixup": NOT_NEGATIVE,
    "cutmix": NOT_NEGATIVE,
    "smoothing": less_than(1),
    "magnitude": number(0, STRONGEST),
    "erase": SHARE,
    "copies": COUNT,
    "scale": ascending(positive(1)),
    "interpolation": one_of(FILTERS),
    "validate_interpolation": one_of(FILTERS),
    "validate_epochs": COUNT,
    "threads": COUNT_OR_ZERO,
    "workers": COUNT_OR_ZERO,
    "head_layers": whole(0, 2),
    "head_scale": POSITIVE,
}
RULES = {
    "recipe": one_of([AUTO, *RECIPES]),
    **{name: unset_or(rule) for name, rule in _VALUES.items()},
}

# Top-1 in percent: by the share of ImageNet's labels, table 1 of the SOP paper; of transfer to
# other sets with ViT-B/16, table 3.
PAPER = {
    1: {
        "ViT-S/16": {"DINO": 60.3, "iBOT": 61.9, "SOP": 62.1},
        "ViT-B/16": {"DINO": 64.4, "iBOT": 68.5, "SOP": 69.5},
    },
    10: {
        "ViT-S/16": {"DINO": 74.3, "iBOT": 75.1, "SOP": 75.1},
        "ViT-B/16": {"DINO": 76.3, "iBOT": 78.1, "SOP": 78.4},
    },
    100: {
        "ViT-S/16": {"DINO": 82.0, "iBOT": 82.3, "SOP": 82.3},
        "ViT-B/16": {"DINO": 83.6, "iBOT": 84.0, "SOP": 84.2},
        "ViT-L/16": {"iBOT": 84.8, "SOP": 84.9},
    },
}
PAPER_TRANSFER = {
    "cifar10": {"random": 99.0, "BEiT": 99.0, "DINO": 99.1, "iBOT": 99.2, "SOP": 99.3},
    "cifar100": {"random": 90.8, "BEiT": 90.1, "DINO": 91.7, "iBOT": 92.2, "SOP": 92.4},
    "inat18": {"random": 73.2, "BEiT": 72.3, "DINO": 72.6, "iBOT": 74.6, "SOP": 74.6},
    "inat19": {"random": 77.7, "BEiT": 79.2, "DINO": 78.6, "iBOT": 79.6, "SOP": 79.7},
    "flowers": {"random": 98.4, "BEiT": 98.0, "DINO": 98.8, "iBOT": 98.9, "SOP": 99.0},
    "cars": {"random": 92.1, "BEiT": 94.2, "DINO": 93.0, "iBOT": 94.3, "SOP": 94.5},
}


class Inputs(NamedTuple):
    """What is opened before the network is loaded.

    Attributes:
        splits: the images to learn from, and those to classify.
        classes: the number of classes.
        view: how images to classify are scaled and cropped.
    """

    splits: Splits
    classes: int
    view: View


def settings() -> ml_collections.ConfigDict:
    """Returns the settings, all of which are those of the recipe unless they are set.

    The recipe is that of the network's size by default, or that of ViT-S for other sizes.
    """
    kinds: dict[str, type] = {name: type(value) for name, value in RECIPES["vits"].items()}
    kinds |= {"resize": int, "crop": int}
    unset = {name: config_dict.placeholder(kinds[name]) for name in _VALUES}
    return ml_collections.ConfigDict({"recipe": AUTO, **unset})


def complete(config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict) -> None:
    """Sets the settings that are not set to those of the recipe.

    Args:
        config: the config of the run.
        settings: updated.

    Raises:
        UserError: the network cannot be trained like that.
    """
    if settings.recipe == AUTO:
        settings.recipe = _OF_SIZE.get(config.model.size, "vits")
    recipe = dict(RECIPES[settings.recipe], resize=config.eval.resize, crop=config.eval.crop)
    settings.update({name: recipe[name] for name in _VALUES if settings[name] is None})
    if config.model.family == "resnet" and settings.layer_decay != 1:
        raise UserError(
            f"eval.layer_decay is {settings.layer_decay}, but no layers are defined for a ResNet. "
            "Expected 1. Set --eval.layer_decay=1"
        )
    if settings.warmup_epochs >= settings.epochs:
        raise UserError(
            f"eval.warmup_epochs is {settings.warmup_epochs}, but there are only "
            f"{settings.epochs} epochs. Expected fewer. Set --eval.warmup_epochs"
        )
    if settings.batch_size % jax.device_count():
        raise UserError(
            f"eval.batch_size {settings.batch_size} cannot be split over {jax.device_count()} "
            f"devices. Expected a multiple of {jax.device_count()}. Set --eval.batch_size"
        )


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Inputs:
    """Opens the images and completes the settings, see `task.Open`."""
    complete(config, settings)
    view = view_of(
        config,
        resize=settings.resize,
        crop=settings.crop,
        interpolation=settings.validate_interpolation,
    )
    splits = _open(config, settings.set, data)
    classes = _classes(splits)
    train = few_labels(splits.train, settings.percent, settings.list, config.seed)
    return Inputs(splits._replace(train=train), classes, view)


def _open(config: ml_collections.ConfigDict, name: str, data: Mapping[str, Any]) -> Splits:
    """Opens a transfer set, or the data of the run or of the flags if `name` is empty."""
    if name and not data:
        raise UserError(
            f"Fine-tuning on {transfer.SETS[name].title} needs its images, and no data is named. "
            f"Expected {transfer.expected(name)}. Name it with --data.path"
        )
    return open_transfer_set(config, name, data, name or "fine-tuning")


def _classes(splits: Splits) -> int:
    """Returns the number of classes.

    Raises:
        UserError: there are images to classify of other classes.
    """
    train, test = splits
    assert test is not None  # `open_splits` raises if there are none
    classes = count_labels(train)
    names, other = train.class_names, test.class_names
    highest = max(_labels(test), default=0)
    if (names and other and names != other) or highest >= classes:
        count = len(other) if other else highest + 1
        raise UserError(
            f"The images to classify have {count} classes and those to learn from {classes}, or "
            "their names differ. Expected the same classes. Name splits of the same data set"
        )
    return classes


def _labels(source: Source) -> list[int]:
    """Returns the labels of a source that has all of them at hand, else nothing."""
    labels = getattr(source, "labels", None)
    return [] if labels is None else labels.tolist()


# The network and its loss


def trained_part(params: Params, layers: int) -> Params:
    """Returns the pretrained parameters that are trained: the backbone, and layers of the head."""
    head = {f"fc{i}": params["head"][f"fc{i}"] for i in range(1, layers + 1)}
    return {"backbone": params["backbone"]} | ({"head": head} if head else {})


def classifier(
    key: Key[Array, ""], width: int, classes: int, scale: float
) -> dict[str, Float[Array, "..."]]:
    """Returns a new classifier: weights [D, C] of standard deviation 0.02 `scale`, and biases 0."""
    kernel = 0.02 * scale * jax.random.normal(key, (width, classes))
    return {"kernel": kernel, "bias": jnp.zeros(classes)}


def logits_of(params: Params, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
    """Returns the scores of classes, float32, from [CLS] after the backbone.

    Args:
        params: the trained parameters; layers of the head, if any, come before the classifier.
        features: in the dtype of the network, in which the layers of the head are computed.
    """
    x = features
    for name in sorted(params.get("head", {})):
        layer = params["head"][name]
        x = jax.nn.gelu(linear(x, layer["kernel"], layer["bias"]), approximate=False)
    last = params["classifier"]
    return linear(x.astype(jnp.float32), last["kernel"], last["bias"])


def make_loss(
    model: Model, settings: ml_collections.ConfigDict, classes: int
) -> Callable[..., tuple[Float[Array, ""], Params]]:
    """Returns the loss of a batch of mixed images, see `fit.Loss`."""
    how = mixing.Mixing(settings.mixup, settings.cutmix, smoothing=settings.smoothing)
    drops = settings.drop_path > 0

    def loss(
        params: Params, frozen: Params, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Params]:
        mix_key, drop_key = jax.random.split(key)
        valid = batch["valid"]
        images, targets = mixing.mix(batch["image"], batch["label"], valid, classes, how, mix_key)
        keys = jax.random.split(drop_key, len(valid)) if drops else None
        whole = {"backbone": params["backbone"], "head": frozen["head"]}
        arrays, statistics = model.embed_training(whole, images, keys=keys, patches=False)
        # The head's own running statistics, if any, are of no use: its output is not used.
        learnt = {name: part for name, part in statistics.items() if name == "backbone"}
        return mixing.mean_loss(logits_of(params, arrays[2]), targets, valid), learnt

    return loss


def by_epoch(
    start: float, peak: float, floor: float, warmup: int, epochs: int, epoch: int
) -> Schedule:
    """Returns timm's cosine schedule, whose rate changes from epoch to epoch only.

    It grows linearly from `start` in the first epoch towards `peak`, which epoch number `warmup`
    would have, and then follows half a cosine that began with the first epoch.

    Args:
        start: the learning rate of the first epoch, if there is a warm-up.
        peak: the highest learning rate.
        floor: what it would be after the last epoch.
        warmup: the number of epochs of the warm-up.
        epochs: the number of epochs.
        epoch: the number of steps per epoch.
    """

    def rate(step: Any) -> Float[Array, ""]:
        now = jnp.asarray(step // epoch, jnp.float32)
        rising = start + now * (peak - start) / max(warmup, 1)
        falling = floor + 0.5 * (peak - floor) * (1 + jnp.cos(jnp.pi * now / epochs))
        return jnp.where(now < warmup, rising, falling)

    return rate


def schedule_of(settings: ml_collections.ConfigDict, lr: float, epoch: int) -> Schedule:
    """Returns the learning rate of a recipe.

    Args:
        settings: the settings.
        lr: one of its learning rates; for `lr_batch` images per step, if that is not 0.
        epoch: the number of steps per epoch.
    """
    s = settings
    peak = lr * s.batch_size / s.lr_batch if s.lr_batch else lr
    floor = min(s.min_lr, peak)
    if s.schedule == "epoch":
        return by_epoch(s.warmup_lr, peak, floor, s.warmup_epochs, s.epochs, epoch)
    return learning_rate(peak, floor, s.warmup_epochs * epoch, s.epochs * epoch)


def recipe_of(settings: ml_collections.ConfigDict) -> Recipe:
    """Returns how training crops are made."""
    return Recipe(
        size=settings.crop,
        scale=tuple(settings.scale),
        interpolation=settings.interpolation,
        magnitude=settings.magnitude,
        erase=settings.erase,
        copies=settings.copies,
    )


# The task


def run(
    subject: Subject, inputs: Inputs, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Fine-tunes the network with each learning rate.

    Returns:
        The accuracies of `accuracy.summary` after the last epoch, of the learning rate with the
        best top-1 accuracy; that rate as `lr`; `best_epoch_top1`, the best of all its epochs, which
        iBOT reports; `metric`, the accuracy that is usual for the data set, and its `score`;
        `top1_by_lr`, the accuracy after the last epoch for each rate; the numbers of classified
        `images` and of `unreadable` ones. Shares are in [0, 1].

    Raises:
        UserError: the recipe begins from the projection head, and the weights have none, or one
            with other layers.
    """
    if settings.head_layers and any(path.startswith("head/") for path in subject.absent):
        raise UserError(
            f"eval.head_layers is {settings.head_layers}, but {subject.name} has no projection "
            "head: the weights that it comes from have none. Expected a network of a pretraining "
            "run. Set --eval.head_layers=0"
        )
    head = subject.config.head
    if settings.head_layers and (head.batch_norm or settings.head_layers >= head.layers):
        raise UserError(
            f"eval.head_layers is {settings.head_layers}, but the projection head of "
            f"{subject.name} has head.layers={head.layers} and head.batch_norm={head.batch_norm}. "
            "Expected one with more layers and without batch norm. Set --eval.head_layers=0"
        )
    config = ml_collections.ConfigDict(subject.config.to_dict())
    config.model.drop_path = settings.drop_path
    model = build(config, config.augment.global_size)
    validate = make_validation(model, config, inputs, settings, tools, subject.params)
    train, test = inputs.splits
    assert test is not None
    seed = subject.config.seed
    found = []  # without the parameters
    for lr in settings.lr:
        if len(settings.lr) > 1:
            tools.note(f"learning rate {lr:g}")
        problem = make_problem(model, config, inputs, settings, subject.params, lr, seed)
        every = settings.validate_epochs * steps_per_epoch(len(train), settings.batch_size)
        fitted = fit(problem, tools, seed, every, validate, name=f"lr{lr:g}")
        found.append((fitted.rows, len(fitted.corrupt)))
        del fitted
    finals = [rows[-1] for rows, _ in found]
    best = max(range(len(found)), key=lambda i: finals[i]["top1"] or 0.0)
    rows, corrupt = found[best]
    metric = transfer.SETS[settings.set].metric if settings.set else "top1"
    last = {name: value for name, value in rows[-1].items() if name not in ("step", "loss")}
    tops = [row["top1"] for row in rows if row["top1"] is not None]
    return last | {
        "lr": settings.lr[best],
        "best_epoch_top1": max(tops, default=None),
        "metric": metric,
        "score": last[metric],
        "top1_by_lr": [final["top1"] for final in finals],
        "unreadable": len(test) - last["images"] + corrupt,
    }


def make_problem(
    model: Model,
    config: ml_collections.ConfigDict,
    inputs: Inputs,
    settings: ml_collections.ConfigDict,
    params: Params,
    lr: float,
    seed: int,
) -> Problem:
    """Returns what is trained with one learning rate, see `fit.Problem`."""
    train, s = inputs.splits.train, settings
    epoch = steps_per_epoch(len(train), s.batch_size)
    image = jax.ShapeDtypeStruct((1, s.crop, s.crop, 3), np.uint8)
    (tokens,) = jax.eval_shape(model.features, params, image)
    width = tokens.shape[-1]
    if s.head_layers:
        width = params["head"][f"fc{s.head_layers}"]["bias"].shape[0]

    def init(key: Key[Array, ""]) -> Params:
        return {"classifier": classifier(key, width, inputs.classes, s.head_scale)}

    def batches(start: int, rows: list[int]) -> Any:
        return labelled_batches(
            train,
            recipe_of(s),
            s.batch_size,
            seed,
            decoding(config.data, train),
            start,
            rows,
            threads=s.threads,
            workers=s.workers,
        )

    return Problem(
        init=init,
        frozen={"head": params.get("head", {})},
        loss=make_loss(model, s, inputs.classes),
        optimizer=optimizer_of(s, lr, epoch),
        steps=s.epochs * epoch,
        batch_size=s.batch_size,
        batches=batches,
        pretrained=trained_part(params, s.head_layers),
    )


def optimizer_of(
    settings: ml_collections.ConfigDict, lr: float, epoch: int
) -> optax.GradientTransformation:
    """Returns AdamW with the schedule, layer decay and weight decay of a recipe."""
    schedule = schedule_of(settings, lr, epoch)
    return adamw(schedule, settings.weight_decay, settings.layer_decay, settings.decay_tokens)


def make_validation(
    model: Model,
    config: ml_collections.ConfigDict,
    inputs: Inputs,
    settings: ml_collections.ConfigDict,
    tools: Tools,
    params: Params,
) -> Callable[..., dict[str, Any]]:
    """Returns a function from trained parameters to the accuracies on all images to classify."""
    mesh, view = tools.mesh, inputs.view
    train, test = inputs.splits
    assert test is not None
    host, count, devices = jax.process_index(), jax.process_count(), mesh.devices.size
    size = -(-config.eval.batch_size // devices) * devices // count
    frequencies = _frequencies(train, settings.set, inputs.classes)

    def counted(trained: Params, head: Params, batch: Mapping[str, Array]) -> Array:
        whole = {"backbone": trained["backbone"], "head": head}
        tokens = model.features(whole, batch["image"])[0]
        return count_right(logits_of(trained, tokens[:, 0]), batch["label"], batch["valid"])

    compiled = jax.jit(counted, out_shardings=replicated(mesh))

    def validate(trained: Params, step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        totals = np.zeros((3, inputs.classes), np.int64)
        how = decoding(config.data, test)
        for i, batch in enumerate(host_batches(test, view, size, host, count, how)):
            if i:
                tools.between()
            part = to_devices(mesh, {name: batch[name] for name in ("image", "label", "valid")})
            totals += np.asarray(compiled(trained, params["head"], part))
        return summary(totals, frequencies) | {"images": int(totals[0].sum())}

    return validate


def _frequencies(train: Source, name: str, classes: int) -> np.ndarray | None:
    """Returns the number of train images per class; None where all images had to be read for it.

    For iNaturalist, which is long-tailed, they are read.
    """
    at_hand = getattr(train.source if isinstance(train, Subset) else train, "labels", None)
    if at_hand is None and not (name and transfer.SETS[name].year):
        return None
    labels = labels_of(train)
    return np.bincount(labels[labels >= 0], minlength=classes)


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns the accuracies in percent, and the papers'."""
    errors = ("top1", "mean_per_class")
    names = {
        "top1": "top-1",
        "top5": "top-5",
        "mean_per_class": "mean per class",
        "head": "head (> 100 train images per class)",
        "middle": "middle (20 to 100)",
        "tail": "tail (< 20)",
        "best_epoch_top1": "top-1 of the best epoch",
    }
    rows: list[list[Any]] = [["accuracy %", "", "standard error"]]
    for name, words in names.items():
        error = percent(result[f"{name}_error"]) if name in errors else ""
        if result[name] is not None:
            rows.append([words, percent(result[name]), error])
    first = f"recipe {settings.recipe}, learning rate {result['lr']:g}"
    parts: list[Part] = [first, rows]
    if len(settings.lr) > 1:
        tried = zip(settings.lr, result["top1_by_lr"], strict=True)
        by_lr: Table = [["learning rate", "top-1 %"], *([f"{a:g}", percent(b)] for a, b in tried)]
        parts += ["The learning rates that were tried:", by_lr]
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} images could not be read and were left out")
    if settings.set in PAPER_TRANSFER:
        title = transfer.SETS[settings.set].title
        numbers = {"ViT-B/16": PAPER_TRANSFER[settings.set]}
        parts += [f"{title}, top-1 %, from the SOP paper:", papers_table(numbers)]
    elif not settings.set and settings.percent in PAPER:
        what = f"ImageNet-1k, {settings.percent:g} % of the labels, top-1 %, from the SOP paper:"
        parts += [what, papers_table(PAPER[settings.percent])]
    return parts


TASK = Task(
    does="accuracy after fine-tuning the whole network",
    expects=(
        "labelled images in a train split and a test split: a folder with train/ and val/, each "
        "with one folder per class, a packed .npz file, or a TFDS data set. The recipes are "
        f"{', '.join(RECIPES)}; those of transfer sets also read the sets from TFDS, and "
        "iNaturalist in the layout of its competitions"
    ),
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="imagenet",
    sources=lambda inputs: sources_of(inputs.splits),
    paths=("list",),
    free=("workers", "threads"),
)
