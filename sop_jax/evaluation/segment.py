"""Semantic segmentation of ADE20K with a linear head or UPerNet, as in iBOT.

iBOT's code means to leave [CLS] and the positions out of the weight decay of UPerNet, but compares
their names without a prefix, so that both decay. They do not decay here unless
`decay_tokens` is set.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int64, Key, UInt8
from ml_collections import config_dict
from PIL import Image

from sop_jax import rules
from sop_jax.data import ade20k
from sop_jax.data.ade20k import CLASSES, IGNORED, Pairs
from sop_jax.data.named import name_folder
from sop_jax.data.pipeline import Batches
from sop_jax.data.sources import Source
from sop_jax.errors import UserError
from sop_jax.evaluation import areas, sliding
from sop_jax.evaluation.fit import Loss, Problem, fit
from sop_jax.evaluation.tables import Part, percent
from sop_jax.evaluation.task import Subject, Task, Tools, check_unused
from sop_jax.models import Params, segmentation, size_of
from sop_jax.models.positions import resize_positions
from sop_jax.models.segmentation import Design, Segmenter, resize
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import replicated
from sop_jax.schedules import linear_decay
from sop_jax.training import layer_decay
from sop_jax.training.checkpoint import named_leaves, with_leaves
from sop_jax.weights import files, mapping
from sop_jax.weights.tables import MMSEG, Arrays

# ViT-B/16, mIoU and mAcc in percent. mIoU is from table 2 of the SOP paper and mAcc from its table
# B.3, whose row "DINO" has the numbers that table 2 gives BEiT.
PAPER = {
    "linear": {
        "supervised": (35.4, 44.6),
        "BEiT": (27.4, 35.5),
        "DINO": (34.5, None),
        "iBOT": (38.3, 48.0),
        "SOP": (38.7, 48.1),
    },
    "upernet": {
        "supervised": (46.6, 57.0),
        "BEiT": (45.8, 55.9),
        "DINO": (46.8, None),
        "iBOT": (50.0, 60.3),
        "SOP": (50.6, 60.5),
    },
}
AUXILIARY_WEIGHT = 0.4
LEVELS = (1 / 3, 1 / 2, 2 / 3, 1)  # of the depth; layers 3, 5, 7 and 11 of 12
LINEAR_RATE = 8e-4
WEIGHTS = "segmenter.safetensors"
WINDOWS = 2  # that pass the network at a time; most images of ADE20K have two


class Tuning(NamedTuple):
    """What iBOT changes with the size of the network that it fine-tunes with UPerNet.

    Attributes:
        rate: the learning rate.
        decay: the factor of the learning rate per layer.
        drop_path: the drop path rate of the last layer.
    """

    rate: float
    decay: float
    drop_path: float


CHOSEN = {  # what follows from the size of the network
    "linear": ("lr", "layers"),
    "upernet": ("lr", "layer_decay", "drop_path", "channels", "layers"),
}
SMALL, BASE, LARGE = Tuning(3e-5, 0.9, 0.1), Tuning(8e-5, 0.65, 0.1), Tuning(2e-5, 0.95, 0.2)


class Inputs(NamedTuple):
    """The data of the task.

    Attributes:
        train: the pairs to train on.
        test: the pairs to segment.
        trained: the leaves of a trained segmenter, which is measured as it is; None to train one.
    """

    train: Pairs
    test: Pairs
    trained: Arrays | None


def settings() -> ml_collections.ConfigDict:
    """Returns the settings; what is unset follows from the head and the size of the network."""
    return ml_collections.ConfigDict(
        dict(
            head="linear",
            layers=(),  # by default four that are spread over the last two thirds
            norm=True,  # each layer passes the final norm of the backbone
            iterations=160_000,
            batch_size=16,
            lr=config_dict.placeholder(float),
            warmup=1500,  # iterations
            weight_decay=0.05,
            decay_tokens=False,  # [CLS] and positions decay too, see above
            layer_decay=config_dict.placeholder(float),
            drop_path=config_dict.placeholder(float),
            dropout=0.1,
            channels=config_dict.placeholder(int),  # inside UPerNet; the width of the network
            crop=512,  # pixels
            stride=341,  # pixels, of the windows
            every=0,  # iterations between validations; 0 for one at the end
            pictures=4,  # predictions to write as images
            weights="",  # a checkpoint of mmsegmentation to measure instead of training
        )
    )


RULES = {
    "head": rules.one_of(segmentation.NETWORKS),
    "layers": rules.Rule(
        lambda values: not values or rules.some(rules.COUNT_OR_ZERO).fits(values),
        "indices of layers, counted from 0",
    ),
    "norm": rules.TRUTH,
    "iterations": rules.COUNT,
    "batch_size": rules.COUNT,
    "lr": rules.unset_or(rules.POSITIVE),
    "warmup": rules.COUNT_OR_ZERO,
    "weight_decay": rules.NOT_NEGATIVE,
    "decay_tokens": rules.TRUTH,
    "layer_decay": rules.unset_or(rules.positive(1)),
    "drop_path": rules.unset_or(rules.less_than(1)),
    "dropout": rules.less_than(1),
    "channels": rules.unset_or(rules.COUNT),
    "crop": rules.COUNT,
    "stride": rules.COUNT,
    "every": rules.COUNT_OR_ZERO,
    "pictures": rules.COUNT_OR_ZERO,
    "weights": rules.TEXT,
}


def tuning(width: int, depth: int) -> Tuning:
    """Returns what UPerNet is fine-tuned with; other sizes have that of the nearest one."""
    if depth > 12:
        return LARGE
    return SMALL if width <= 384 else BASE


UPERNET_ONLY = ("decay_tokens", "layer_decay", "drop_path", "dropout", "channels")
TRAINING_ONLY = (
    *("iterations", "batch_size", "lr", "warmup", "weight_decay", "every"),
    *("decay_tokens", "layer_decay", "drop_path", "dropout"),
)


def check_used(asked: ml_collections.ConfigDict) -> None:
    """Raises UserError if a setting that is not the default would have no effect."""
    if asked.head == "linear":
        reason = "it is for --eval.head=upernet, because a linear head is trained without it"
        check_unused(TASK, asked, UPERNET_ONLY, reason)
    if asked.weights:
        reason = "nothing is trained if --eval.weights names a segmenter"
        check_unused(TASK, asked, TRAINING_ONLY, reason)


def layers_of(asked: ml_collections.ConfigDict, depth: int) -> tuple[int, ...]:
    """Returns the indices of the layers whose tokens are the feature maps.

    Raises:
        UserError: none are set, and the network has too few for different ones.
    """
    if asked.layers:
        return tuple(asked.layers)
    if depth < len(LEVELS):
        raise UserError(
            f"the network has {depth} layers, but the default is {len(LEVELS)} different ones. "
            "Expected the indices of layers, which may repeat; give them with --eval.layers"
        )
    found, above = [], depth
    for share in reversed(LEVELS):
        above = min(int(np.ceil(depth * share)), above) - 1
        found.append(above)
    return tuple(reversed(found))


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Inputs:
    """Opens both splits of ADE20K, to which `config.data` is updated; see `task.Open`.

    Raises:
        UserError: the network cannot have the head, the settings do not fit each other, or the data
            is missing or of another layout.
    """
    check_used(settings)
    layers: tuple[int, ...] = (0,)
    if config.model.family == "vit":
        layers = layers_of(settings, size_of(config.model).depth)
    segmentation.check(config.model, settings.head, layers)
    smallest = 2 * config.model.patch if settings.head == "upernet" else config.model.patch
    if config.model.patch == 8 and settings.head == "upernet":
        smallest *= 2  # its coarsest level is a quarter of the map
    if settings.crop < smallest:
        raise UserError(
            f"eval.crop is {settings.crop}, which leaves no pixel in the coarsest level of a "
            f"network with patches of {config.model.patch} pixels. Expected at least {smallest}; "
            "the papers use 512"
        )
    if settings.stride > settings.crop:
        raise UserError(
            f"eval.stride {settings.stride} is larger than eval.crop {settings.crop}, so that the "
            "windows would leave gaps. Expected at most the crop; the papers use 341 and 512"
        )
    count = jax.device_count()
    if settings.batch_size % count and not settings.weights:
        raise UserError(
            f"eval.batch_size {settings.batch_size} cannot be split over {count} devices. Expected "
            f"a multiple of {count}; choose one"
        )
    if settings.warmup >= settings.iterations and not settings.weights:
        raise UserError(
            f"eval.warmup is {settings.warmup}, but there are only {settings.iterations} "
            "iterations. Expected fewer. Set --eval.warmup"
        )
    if unused := sorted(data.keys() - {"path"}):
        raise UserError(
            f"--data.{unused[0]}={data[unused[0]]} would have no effect: the task segment reads "
            "the pairs below --data.path as they are; leave it out"
        )
    root = name_folder(config.data, data, ade20k.EXPECTS)
    trained = read_weights(settings.weights, config, settings) if settings.weights else None
    train, test = (ade20k.open_pairs(root, split) for split in ade20k.SPLITS)
    return Inputs(train, test, trained)


def read_weights(
    path: epath.PathLike, config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict
) -> Arrays:
    """Reads a segmenter by mmsegmentation's names.

    Of a linear segmenter only the head is read; its backbone is the network that is evaluated.

    Returns:
        The leaves by path.

    Raises:
        UserError: the file cannot be read, or is of another network or head.
    """
    _, segmenter = make_segmenter(config, settings)
    needed = named_leaves(jax.eval_shape(segmenter.init, jax.random.key(0)))
    parts = ("decode_head",) if settings.head == "linear" else tuple(segmentation.PARTS)
    shapes = {path: leaf.shape for path, leaf in needed.items() if path.split("/")[0] in parts}
    if not settings.norm:  # mmsegmentation's network then has no final norm
        shapes = {path: x for path, x in shapes.items() if not path.startswith("backbone/norm/")}

    def resized(table: np.ndarray, rows: int) -> np.ndarray:
        return np.asarray(resized_positions(jnp.asarray(table), round((rows - 1) ** 0.5)))

    with files.opened(path) as arrays:
        names = {name.removeprefix("state_dict."): name for name in arrays}
        found = {new: arrays[old] for new, old in names.items() if new.split(".")[0] in parts}
    try:
        return mapping.load_leaves(MMSEG, found, shapes, resized).leaves
    except UserError as error:
        raise UserError(
            f"{path}: {error}. Expected eval.head={settings.head} for {CLASSES} classes on this "
            "network, by mmsegmentation's names; give such a file with --eval.weights, or the "
            "settings with which it was trained"
        ) from error


def run(
    subject: Subject, inputs: Inputs, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Trains the head, and with UPerNet the backbone, and segments the validation images.

    Returns:
        `mIoU`, `mAcc` and `aAcc` of the last iteration, shares in [0, 1]; `IoU`, a share for each
        class, None for classes that do not occur; `loss`, the mean since the validation before;
        `validations`, the scores of each validation by `step`; `chosen`, the settings that follow
        from the size of the network; and `files`, what was written. Without training, `loss`,
        `validations` and `chosen` are None or empty.
    """
    chosen, segmenter = make_segmenter(subject.config, settings)
    side, everywhere = chosen.crop // segmenter.patch, replicated(tools.mesh)
    resize_backbone = jax.jit(lambda params: backbone_of(params, side), out_shardings=everywhere)
    backbone = {"backbone": resize_backbone(subject.params)}
    linear = chosen.head == "linear"
    frozen, pretrained = (backbone, {}) if linear else ({}, backbone)

    def init(key: Key[Array, ""]) -> Params:
        made = segmenter.init(key)
        return {name: part for name, part in made.items() if name != "backbone"}

    logits_for = make_logits(segmenter, jax.local_devices())

    def measure(params: Params, step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pictures = chosen.pictures if step == chosen.iterations else 0
        logits_of = logits_for(frozen | params)
        total = validate(logits_of, inputs.test, chosen, tools, pictures)
        shares = areas.ratios(total[0], total[1])
        found = [None if np.isnan(share) else float(share) for share in shares]
        return {**areas.scores(total), "IoU": found}

    if inputs.trained is not None:
        made = jax.jit(init, out_shardings=everywhere)(jax.random.key(0)) | pretrained
        row = measure(with_leaves(made, inputs.trained), chosen.iterations, [])
        files = pictures_of(inputs, chosen, tools)
        return {**row, "loss": None, "validations": [], "chosen": {}, "files": files}
    fitted = fit(
        Problem(
            init=init,
            frozen=frozen,
            loss=make_loss(segmenter),
            optimizer=optimizer(chosen),
            steps=chosen.iterations,
            batch_size=chosen.batch_size,
            batches=batches_of(subject.config, inputs.train, chosen, tools.seed),
            pretrained=pretrained,
        ),
        tools,
        tools.seed,
        chosen.every or chosen.iterations,
        measure,
    )
    if tools.folder is not None and hosts.is_first():
        if left_out := write_weights(tools.folder, fitted.params):
            tools.note(f"{WEIGHTS} lacks what mmsegmentation has no names for: {left_out}")
    return {
        **{name: fitted.rows[-1][name] for name in ("mIoU", "mAcc", "aAcc", "loss", "IoU")},
        "validations": fitted.rows,
        "chosen": {name: chosen[name] for name in CHOSEN[chosen.head]},
        "files": [WEIGHTS, *pictures_of(inputs, chosen, tools)] if tools.folder is not None else [],
    }


def make_segmenter(
    config: ml_collections.ConfigDict, asked: ml_collections.ConfigDict
) -> tuple[ml_collections.ConfigDict, Segmenter]:
    """Returns the settings with nothing unset that has an effect, and the network."""
    size = size_of(config.model)
    usual = tuning(size.width, size.depth)
    found = asked.copy_and_resolve_references()
    config = config.copy_and_resolve_references()
    found.layers = layers_of(asked, size.depth)
    design = Design(asked.head, found.layers, CLASSES, asked.norm)
    if asked.head == "linear":
        found.lr = asked.lr or LINEAR_RATE
        config.model.drop_path = 0.0
    else:
        found.lr = asked.lr or usual.rate
        found.layer_decay = asked.layer_decay or usual.decay
        found.drop_path = usual.drop_path if asked.drop_path is None else asked.drop_path
        found.channels = asked.channels or size.width
        config.model.drop_path = found.drop_path
        design = design._replace(channels=found.channels, dropout=asked.dropout)
    return found, segmentation.build(config, design, asked.crop)


def backbone_of(params: Params, side: int) -> Params:
    """Returns the backbone of a network, with positions for `side` x `side` patches."""
    backbone = dict(params["backbone"])
    backbone["pos_embed"] = resized_positions(backbone["pos_embed"], side)
    return backbone


def resized_positions(table: Float[Array, "n D"], side: int) -> Float[Array, "m D"]:
    """Returns positions of a square grid, [CLS] first, resized to `side` x `side` patches.

    They are resized as mmsegmentation does when it loads weights: bicubic by size, whatever the
    rule is in the forward pass.
    """
    old = round((len(table) - 1) ** 0.5)
    grid = resize_positions(table[1:].reshape(old, old, -1), (side, side), "size")
    return jnp.concatenate([table[:1], grid.reshape(side * side, -1)])


# ---------------------------------------------------------------------------------------- training


def pixel_loss(
    logits: Float[Array, "B h w classes"], labels: Int[Array, "B H W"]
) -> Float[Array, ""]:
    """Returns the cross-entropy of the logits, resized to the labels, as in mmsegmentation.

    It is the sum over all pixels that are not ignored, divided by the number of all pixels.
    """
    counted = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(
        resize(logits, labels.shape[1:]), jnp.where(counted, labels, 0)
    )
    return jnp.where(counted, losses, 0.0).mean()


def pixel_accuracy(
    logits: Float[Array, "B h w classes"], labels: Int[Array, "B H W"]
) -> Float[Array, ""]:
    """Returns the share of all pixels, ignored ones included, that are classified correctly."""
    return (resize(logits, labels.shape[1:]).argmax(-1) == labels).mean()


def batches_of(
    config: ml_collections.ConfigDict, pairs: Pairs, chosen: ml_collections.ConfigDict, seed: int
) -> Callable[[int, list[int]], Batches]:
    """Returns the function that maps a step and rows to batches, see `fit.Problem`."""

    def batches(step: int, rows: list[int]) -> Batches:
        return ade20k.train_batches(
            *(pairs, chosen.crop, chosen.batch_size, seed, step, rows),
            *(config.data.threads, config.data.workers),
        )

    return batches


def make_loss(segmenter: Segmenter) -> Loss:
    """Returns the loss of a batch: the sum of the losses of the heads."""

    def loss(
        params: Params, frozen: Params, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Params]:
        keys = jax.random.split(key, len(batch["image"]))
        outputs = segmenter.apply(frozen | params, batch["image"], keys, training=True)
        labels = batch["mask"].astype(jnp.int32)
        total = pixel_loss(outputs.logits, labels)
        if outputs.auxiliary is not None:
            total += AUXILIARY_WEIGHT * pixel_loss(outputs.auxiliary, labels)
        return total, outputs.statistics

    return loss


def optimizer(chosen: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns AdamW with layer-wise decay of the learning rate.

    Everything that a linear head trains decays, its bias too, as in iBOT.

    Args:
        chosen: the settings, from `make_segmenter`.
    """
    rate = linear_decay(chosen.lr, chosen.warmup, chosen.iterations)
    if chosen.head == "linear":
        return optax.adamw(rate, weight_decay=chosen.weight_decay)
    return layer_decay.adamw(rate, chosen.weight_decay, chosen.layer_decay, chosen.decay_tokens)


# -------------------------------------------------------------------------------------- validation


LogitsOf = Callable[[UInt8[np.ndarray, "n H W 3"]], Float[np.ndarray, "n h w classes"]]


def make_logits(segmenter: Segmenter, devices: Sequence[Any]) -> Callable[[Params], LogitsOf]:
    """Returns a function that maps parameters to one that maps windows to their logits.

    Args:
        segmenter: the network.
        devices: devices of this process, on which the parameters are; each computes WINDOWS windows
            at a time. There can be any number of windows, all of one size.
    """
    mesh = Mesh(np.array(devices), ("windows",))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("windows"))
    size = WINDOWS * len(devices)

    @functools.partial(jax.jit, out_shardings=split)
    def compiled(params: Params, images: Array) -> Array:
        return segmenter.apply(params, images).logits

    def own(x: Array) -> Array:
        copies = {shard.device: shard.data for shard in x.addressable_shards}
        parts = [copies[device] for device in devices]
        return jax.make_array_from_single_device_arrays(x.shape, everywhere, parts)

    def logits_for(params: Params) -> LogitsOf:
        local = jax.tree.map(own, params)

        def logits_of(windows: np.ndarray) -> np.ndarray:
            batches = [jax.device_put(batch, split) for batch in filled(windows, size)]
            logits = [compiled(local, batch) for batch in batches]
            return np.concatenate(jax.device_get(logits))[: len(windows)]

        return logits_of

    return logits_for


def validate(
    logits_of: LogitsOf,
    pairs: Pairs,
    asked: ml_collections.ConfigDict,
    tools: Tools,
    pictures: int = 0,
) -> Int64[np.ndarray, "4 classes"]:
    """Returns the areas of all images of a split, see `areas.areas`.

    Images are shared out over the processes, and their windows over the devices of each process.

    Args:
        logits_of: the network, see `make_logits`.
        pairs: the images and masks.
        asked: the settings of the task.
        tools: the tools.
        pictures: the number of predictions to write to the folder of the tools.
    """
    process, processes = jax.process_index(), jax.process_count()
    total = np.zeros((4, CLASSES), np.int64)
    most = jax.local_device_count()
    size = processes * most  # images per round
    with tools.progress(len(pairs), "image") as bar, ThreadPoolExecutor(most) as pool:

        def load(first: int) -> list[Any]:
            """Starts to read this process's images of a round."""
            mine = range(first + process, min(first + size, len(pairs)), processes)
            return [(i, pool.submit(pairs.pair, i)) for i in mine]

        following = load(0)
        for first in range(0, len(pairs), size):
            tools.between()
            here = [(index, pair.result()) for index, pair in following]
            following = load(first + size)
            predictions = predict(logits_of, [pair.image for _, pair in here], asked)
            for (index, pair), prediction in zip(here, predictions, strict=True):
                found = np.asarray(prediction)
                total += areas.areas(found, pair.mask, CLASSES)
                if index < pictures and tools.folder is not None:
                    write_picture(tools.folder, pairs, index, found)
            bar.update(min(size, len(pairs) - first))
    return summed(total)


def predict(
    logits_of: LogitsOf, images: Sequence[UInt8[np.ndarray, "_H _W 3"]], asked: Any
) -> list[UInt8[Array, "_H _W"]]:
    """Returns the class of each pixel of images.

    Windows slide over each image, scaled so that its shorter side has `crop` pixels, or its longer
    side four times as many. The logits are resized to the size of the image.

    Args:
        logits_of: see `make_logits`.
        images: images of any sizes.
        asked: the settings of the task.
    """
    scaled = [ade20k.rescale(x, (ade20k.ASPECT * asked.crop, asked.crop)) for x in images]
    boxes = [
        tuple(sliding.windows(x.shape[0], x.shape[1], asked.crop, asked.stride)) for x in scaled
    ]
    parts = [
        [image[t : t + h, x : x + w] for t, x, h, w in own]
        for image, own in zip(scaled, boxes, strict=True)
    ]
    alike: dict[tuple[int, ...], list[int]] = {}  # images by the size of their windows
    for number, own in enumerate(parts):
        alike.setdefault(own[0].shape, []).append(number)
    logits: dict[int, np.ndarray] = {}
    for numbers in alike.values():
        found = logits_of(np.concatenate([np.stack(parts[number]) for number in numbers]))
        ends = np.cumsum([len(parts[number]) for number in numbers])
        logits |= dict(zip(numbers, np.split(found, ends[:-1]), strict=True))
    return [
        classify(logits[number], boxes[number], scaled[number].shape[:2], image.shape[:2])
        for number, image in enumerate(images)
    ]


def filled(parts: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yields batches of `size` parts; the last one is filled up with its last part."""
    for start in range(0, len(parts), size):
        batch = parts[start : start + size]
        yield np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])


@functools.partial(jax.jit, static_argnames=("boxes", "size", "shape"))
def classify(
    logits: Float[np.ndarray | Array, "n h w classes"],
    boxes: tuple[sliding.Window, ...],
    size: tuple[int, int],
    shape: tuple[int, int],
) -> UInt8[Array, "H W"]:
    """Returns the most likely class of each pixel, see `sliding.merge`."""
    return sliding.merge(logits, boxes, size, shape).argmax(-1).astype(jnp.uint8)


def summed(total: Int64[np.ndarray, "4 classes"]) -> Int64[np.ndarray, "4 classes"]:
    """Returns the sum over all processes; int64 numbers are sent as two of int32."""
    if jax.process_count() == 1:
        return total
    halves = np.stack([total >> 24, total & (2**24 - 1)]).astype(np.int32)
    high, low = process_allgather(halves).astype(np.int64).sum(0)
    return (high << 24) + low


def pictures_of(inputs: Inputs, chosen: ml_collections.ConfigDict, tools: Tools) -> list[str]:
    """Returns the names of the pictures that are in the folder of the tools at the end."""
    if tools.folder is None:
        return []
    count = min(chosen.pictures, len(inputs.test))
    return [picture_name(inputs.test, index) for index in range(count)]


def picture_name(pairs: Pairs, index: int) -> str:
    """Returns the name of a prediction in the folder of the tools."""
    return f"predictions/{ade20k.mask_of(pairs.images[index])}"


def write_picture(folder: epath.Path, pairs: Pairs, index: int, prediction: np.ndarray) -> None:
    """Writes a prediction as a palette PNG with the labels 1 to 150 of the benchmark."""
    picture = Image.fromarray(prediction + 1, mode="P")
    picture.putpalette(palette().tobytes())
    target = folder / picture_name(pairs, index)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        picture.save(file, format="PNG")


def palette() -> UInt8[np.ndarray, "n 3"]:
    """Returns a colour for each label; 0 is black, and labels that follow each other differ."""
    hue = np.arange(CLASSES) * 0.618034 % 1 * 180  # the golden ratio
    bright = 120 + 45 * (np.arange(CLASSES) % 4)
    hsv = np.stack([hue, np.full(CLASSES, 200), bright], axis=-1).astype(np.uint8)
    colours = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
    return np.concatenate([np.zeros((1, 3), np.uint8), colours])


def write_weights(folder: epath.Path, params: Params) -> str:
    """Writes what was trained by mmsegmentation's names, and returns the paths of other leaves."""
    leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(params).items()}
    exported = mapping.write_arrays(MMSEG, leaves)
    files.write(folder / WEIGHTS, exported.arrays)
    return ", ".join(exported.not_exported)


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns the scores in percent, and those of the papers with the same head."""
    names = ("mIoU", "mAcc", "aAcc")
    rows: list[list[Any]] = [["", *names], ["this network", *(percent(result[x]) for x in names)]]
    papers: list[list[Any]] = [["", "mIoU", "mAcc"]]
    papers += [[name, *row] for name, row in PAPER[settings.head].items()]
    return [rows, "ViT-B/16 pretrained on ImageNet-1k, in percent, from the SOP paper:", papers]


def sources_of(inputs: Inputs) -> dict[str, Source | None]:
    """Returns the pairs by split, which identify the data in a result."""
    return {"train": inputs.train, "test": inputs.test}


TASK = Task(
    does="semantic segmentation of ADE20K with a linear head on a frozen ViT, or with UPerNet",
    expects=ade20k.EXPECTS,
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="ade20k",
    sources=sources_of,
    paths=("weights",),
)
