"""The settings of a run: their defaults, which are those of the paper, and their files.

A file in `configs/` calls `paper()` and changes the settings that differ. Values that follow from
others (steps per epoch, peak learning rate, grid sizes) are never stored: they are derived when a
run starts, so that no setting is left inconsistent when another one is overridden.
"""

import json
import numbers
from typing import Any

import ml_collections
from etils import epath
from ml_collections import config_dict

from sop_jax import __version__
from sop_jax.errors import UserError, nearest
from sop_jax.objectives.methods import METHODS
from sop_jax.paths import write_whole
from sop_jax.settings import flatten

# The settings that each version introduced, with the values that match the behaviour of earlier
# versions.
BEFORE: dict[str, dict[str, Any]] = {
    "0.2.0": {
        "model.precision": "default",
        "data.orientation": "ignore",
        "data.white": 0.0,
        "data.max_pixels": 178_956_970,
        "data.retry_seconds": 60.0,
    },
    "0.3.0": {
        "augment.global_crops": 2,
        "model.pool": "cls",
        "checkpoint.minutes": 15.0,  # this does not change the results
    },
    "0.4.0": {
        "eval.tasks": ("knn",),
    },
    "0.5.0": {
        "method": "sop",
        "head.layers": 3,
        "head.batch_norm": False,
        "head.batch_norm_views": "apart",
        "head.unit": True,
        "optim.kind": "adamw",
        "optim.sgd_momentum": 0.9,
        "optim.trust": 0.001,
    },
    "0.6.0": {
        "tracker": "tensorboard",  # this does not change the results
    },
    "0.7.0": {
        "model.block": "bottleneck",
        "model.stem": "imagenet",
        "model.unroll": "auto",  # this does not change the results
    },
}
_FIRST = "0.1.0"  # the only version that wrote no version into config.json

# The settings that a resumed run can change: those that do not affect the results, except for
# rounding. The images at `data.path` are compared separately, and `init_from` is only read when a
# run begins.
RESUMABLE = (
    "init_from",
    "data.path",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "profile_steps",
    "tracker",
    "checkpoint.minutes",
    "checkpoint.keep_every",
    "eval.batch_size",
    "data.workers",
    "data.threads",
    "data.retry_seconds",
    "data.max_corrupt_share",
    "mesh.data",
    "mesh.fsdp",
    "accumulate",
    "model.remat",
    "model.attention",
    "model.unroll",
    "sop.search_precision",
)

# Lists that can have any number of items.
_ANY_LENGTH = ("eval.tasks", "eval.knn_k", "model.stage_depths")

_FILE = "config.json"


def paper() -> ml_collections.ConfigDict:
    """Returns the paper's recipe for ViT-S/16 on ImageNet.

    The values are from appendix A, or from iBOT if the paper does not specify them.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.init_from = ""  # weights to start from: a file, or the folder of a run or of `convert`
    config.epochs = 800.0
    config.steps = config_dict.placeholder(int)  # takes precedence over `epochs` if set
    config.method = "sop"  # one of `objectives.methods`, whose settings are the section of its name
    config.batch_size = 1024  # images per step, over all devices
    config.accumulate = 1  # microbatches per step, computed one after another to save memory
    config.log_every = 50  # steps, like the next two; 0 means never
    config.eval_every = 12500
    config.checkpoint_every = 2500
    config.tracker = "tensorboard"  # tensorboard | wandb: where curves are drawn
    config.profile_steps = (0, 0)  # the first and last step of a trace; (0, 0) for no trace

    config.data = ml_collections.ConfigDict(
        dict(
            source="tfds",  # tfds | folder | packed | digits
            path="",  # tfds: data_dir; folder: its root; packed: the .npz file
            name="",  # tfds: the data set's name
            train_split="train",  # for a folder, "" means no splits: all its folders are classes
            test_split="validation",
            workers=8,  # processes; with 0, the main process makes the batches
            threads=4,  # per process
            max_corrupt_share=0.01,
            orientation="auto",  # exif | ignore | auto: exif for folders of images, else ignore
            white=0.0,  # for a single channel of more than 8 bits; 0 means as the file specifies
            max_pixels=178_956_970,  # per image; larger images are not decoded
            retry_seconds=60.0,  # how long reads from failing storage are retried; 0 for never
        )
    )
    config.augment = ml_collections.ConfigDict(
        dict(
            resample="opencv",  # opencv (low-pass, bicubic) | pillow (antialiased bicubic)
            global_size=224,
            local_size=96,
            global_crops=2,
            local_crops=10,
            global_scale=(0.25, 1.0),
            local_scale=(0.05, 0.25),
            flip=0.5,
            jitter=0.8,  # probability
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            grayscale=0.2,
            blur=(
                1.0,
                0.1,
                0.5,
            ),  # probabilities: first global view, other global views, local views
            blur_sigma=(0.1, 2.0),  # pixels
            solarize=0.2,  # for global views except the first
        )
    )
    config.mask = ml_collections.ConfigDict(
        dict(
            kind="block",  # block | random | inverse_block (all but one block, CAPI)
            ratio=(0.3, 0.3),  # drawn uniformly from this range for each view
            none=0.0,  # probability that a view is not masked
            start_epochs=0.0,  # no view is masked before
            start_steps=config_dict.placeholder(int),
        )
    )
    config.model = ml_collections.ConfigDict(
        dict(
            family="vit",  # vit | swin | resnet
            size="s",  # vit: ti | s | b | l | h; swin: t | s | b; resnet: 18 | 34 | 50; custom
            # Only for size=custom, like the next five: the width of a ViT, of the first stage of a
            # Swin, or of the stem of a ResNet.
            width=384,
            depth=12,  # vit
            heads=6,  # vit
            stage_depths=(2, 2, 6, 2),  # swin, resnet
            stage_heads=(3, 6, 12, 24),  # swin
            block="bottleneck",  # resnet: bottleneck | basic (two 3 x 3 convolutions)
            patch=16,  # vit; the patches of a Swin have 4 pixels, and its tokens cover 32
            window=7,  # swin: patches on each side of the windows in which it attends
            stem="imagenet",  # resnet: imagenet | strided | small (3 x 3, stride 2 | 1, unpooled)
            registers=0,  # vit: extra tokens that represent no patch
            layer_scale=0.0,  # vit: the initial scale of the branches; 0 for no layer scale
            pool="cls",  # vit: cls | mean (of the patches, table C.2), which represents an image
            positions="ibot",  # vit: ibot | size | antialiased, how positions are resized
            norm_eps=1e-6,  # of LayerNorm, added to the variance; not for resnet
            drop_path=0.1,
            init_std=0.02,  # of linear layers
            position_std=0.02,  # of positional embeddings
            remat="products",  # none | products | dots | full: how much is recomputed
            attention="auto",  # auto (cudnn where it works) | xla | cudnn
            unroll="auto",  # vit: auto (on GPUs, except with remat=full) | yes | no: the layers
            dtype="bfloat16",  # of the computation; parameters are float32
            precision="float32",  # of matrix products in float32: float32 | high | default
        )
    )
    config.head = ml_collections.ConfigDict(
        dict(
            layers=3,  # linear layers; with 0, embeddings are the tokens, and dim their width
            hidden=2048,
            dim=256,
            batch_norm=False,  # after each hidden layer
            batch_norm_views="apart",  # apart | together: global and local views
            unit=True,  # whether embeddings are L2-normalized
        )
    )
    for name, method in METHODS.items():
        config[name] = method.settings()
    config.optim = ml_collections.ConfigDict(
        dict(
            kind="adamw",  # adamw | sgd | lars
            sgd_momentum=0.9,  # sgd, lars
            trust=0.001,  # lars: an update's norm as a share of its parameter's
            lr=5e-4,  # for 256 images per step; scaled in proportion to the batch size
            min_lr=1e-6,
            warmup_epochs=10.0,
            warmup_steps=config_dict.placeholder(int),
            weight_decay=(0.04, 0.4),
            clip=3.0,  # 0 for no clipping
            clip_kind="tensor",  # tensor | global, without prototypes that have an own optimizer
            momentum=(0.994, 1.0),  # of the teacher
        )
    )
    config.eval = ml_collections.ConfigDict(
        dict(
            resize=256,
            crop=224,
            batch_size=256,
            tasks=("knn",),  # what is measured at `eval_every`
            knn_k=(10, 20, 100, 200),
            knn_temperature=0.07,
        )
    )
    config.checkpoint = ml_collections.ConfigDict(
        dict(
            minutes=15.0,  # between the starts of two saves at most; 0 for no limit
            keep_last=2,
            keep_every=0,
        )
    )
    config.mesh = ml_collections.ConfigDict(
        dict(
            data=0,  # groups of devices, each with all parameters; 0 for as many as possible
            fsdp=1,  # devices per group, over which parameters and optimizer state are sharded
        )
    )
    return config


def save(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Writes `workdir/config.json`, and keeps the version that created the workdir."""
    path = workdir / _FILE
    version = _read(path)[0] if path.exists() else __version__
    write_whole(path, json.dumps({"version": version, **config.to_dict()}, indent=2) + "\n")


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """Returns the settings of the run in a workdir; those newer than the run are as in BEFORE.

    Raises:
        UserError: there is no config.json, or this version cannot read it.
    """
    path = epath.Path(workdir) / _FILE
    if not path.exists():
        raise UserError(
            f"{path} does not exist, so {workdir} is not the folder of a run; check --workdir"
        )
    _, settings = _read(path)
    config = paper()
    config.update_from_flattened_dict(
        {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    )
    return config


def version_of(workdir: epath.PathLike) -> str:
    """Returns the version that created a workdir."""
    return _read(epath.Path(workdir) / _FILE)[0]


def _read(path: epath.Path) -> tuple[str, dict[str, Any]]:
    """Returns the version that wrote a config.json, and all settings, those in BEFORE included."""
    remedy = "restore it, or use another workdir"
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(saved, dict):
        raise UserError(
            f"{path} must contain an object of settings, not {json.dumps(saved):.80}; {remedy}"
        )
    version = saved.pop("version", _FIRST)
    try:
        if not isinstance(version, str):
            raise ValueError
        if _order(version) > _order(__version__):
            raise UserError(
                f"{path} was written by sop_jax {version}, and this is {__version__}: use "
                f"sop_jax {version} or newer for this workdir"
            )
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: its version is {version!r}, not one such as {__version__!r}; "
            f"{remedy}"
        ) from error
    settings = flatten(saved)
    if wrong := misnamed(settings):
        raise UserError(f"{path}: {'; '.join(wrong)}; correct it or {remedy}")
    settings = later_settings(version) | settings
    if isinstance(settings.get("method"), str):
        settings = other_methods(settings["method"]) | settings
    default = flatten(paper())
    if missing := sorted(default.keys() - settings.keys()):
        raise UserError(
            f"{path} lacks {', '.join(missing)}, which every run of sop_jax {version} has; {remedy}"
        )
    for key, value in settings.items():
        if isinstance(value, list) and key not in _ANY_LENGTH and len(value) != len(default[key]):
            raise UserError(
                f"{path}: {key} is {value!r}; expected {len(default[key])} numbers; {remedy}"
            )
        if not _fits(value, default[key]):
            kind = _kind(default[key])
            raise UserError(f"{path}: {key} is {value!r}; expected a {kind}; {remedy}")
    return version, settings


def later_settings(version: str) -> dict[str, Any]:
    """Returns the settings newer than a version, with the values that match its behaviour."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for later, settings in BEFORE.items()
        if _order(later) > _order(version)
        for key, value in settings.items()
    }


def other_methods(chosen: str) -> dict[str, Any]:
    """Returns the defaults of the settings of all methods but one, which have no effect with it.

    So a run of a version that did not know a method has its settings too.
    """
    sections = {name: METHODS[name].settings() for name in METHODS if name != chosen}
    return flatten(sections)


def misnamed(settings: dict[str, Any]) -> list[str]:
    """Returns a message for each flattened setting that does not exist, with the nearest name."""
    known = flatten(paper())
    return [
        f"{key} is {settings[key]!r}; expected a section of settings"
        if any(name.startswith(f"{key}.") for name in known)
        else f"unknown setting {key}{nearest(key, list(known))}"
        for key in settings
        if key not in known
    ]


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def _fits(value: Any, example: Any) -> bool:
    if isinstance(example, list):
        one = example[0] if isinstance(example[0], str) else 0.0
        return isinstance(value, list) and all(_fits(item, one) for item in value)
    if example is None:
        return value is None or _fits(value, 0)
    if isinstance(value, bool) != isinstance(example, bool):
        return False
    return isinstance(value, numbers.Real if isinstance(example, float) else type(example))


def _kind(example: Any) -> str:
    if isinstance(example, list):
        return "list of words" if isinstance(example[0], str) else "list of numbers"
    if isinstance(example, bool):
        return "truth value (true or false)"
    if isinstance(example, float):
        return "number"
    return "string" if isinstance(example, str) else "whole number"
