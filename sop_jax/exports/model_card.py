"""Model cards: what a network was trained on, with which settings, and how well it does."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from etils import epath

from sop_jax import __version__
from sop_jax.check import without_use
from sop_jax.config import version_of
from sop_jax.evaluation.views import view_of
from sop_jax.exports.trained import Trained
from sop_jax.models import size_of
from sop_jax.pretrained import fingerprint
from sop_jax.settings import PATHS, flatten

# What the table of settings shows, if the run has it.
SHOWN = (
    *("method", "epochs", "steps", "batch_size", "seed"),
    *("model.family", "model.size", "model.width", "model.depth", "model.heads", "model.patch"),
    *("model.window", "model.registers", "model.layer_scale", "model.pool", "model.drop_path"),
    *("model.dtype", "augment.global_size", "augment.local_size", "augment.global_crops"),
    *("augment.local_crops", "optim.kind", "optim.lr", "optim.weight_decay"),
)


def model_card(trained: Trained, architecture: str) -> str:
    """Returns the text of README.md in a folder for transformers.

    It names no folders of the machine, except the last part of that of the data, which is described
    by its kind, its name and its size.

    Args:
        trained: the network, as its folder or file has it.
        architecture: the class of transformers, such as ViTModel.
    """
    config, view = trained.config, view_of(trained.config)
    token = "the mean of the patches" if config.model.family != "vit" else "[CLS]"
    parts = [
        _FRONT,
        f"# {architecture} trained with sop_jax",
        _filled(
            f"A {_network_name(config)} that was trained without labels by the method "
            f"`{config.method}` with sop_jax {version_of(trained.source)}: the {trained.network} "
            f"after step {trained.step}. It was exported by sop_jax {__version__}. "
            "It maps images to features; it does not classify them."
            if _is_run(trained)
            else f"A {_network_name(config)}, exported by sop_jax {__version__}."
        ),
        "## Use\n\n" + _use(),
        _filled(
            f"`pooler_output` is {token} after the final norm. Images are scaled so that the "
            f"shorter side has {view.resize} pixels, and the centre of {view.crop} pixels is "
            "taken. Images are not rotated by their EXIF orientation: apply "
            "`PIL.ImageOps.exif_transpose` first if the camera turned them."
        ),
        "## Training data\n\n" + _data(trained),
        "## Settings\n\n" + _table(("setting", "value"), _settings(config)),
        "## Evaluation\n\n" + _evaluations(trained),
        "## Limits\n\n"
        + _filled(
            "The features reflect the images that the network was trained on, and their biases. "
            "Evaluate them for your own purpose before you rely on them."
        ),
    ]
    return "\n\n".join(parts) + "\n"


_FRONT = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- self-supervised-learning
- sop_jax
---"""


def _use() -> str:
    return """```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "."  # this folder, or its name on the hub
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)
inputs = processor(Image.open("image.jpg"), return_tensors="pt")
features = model(**inputs).pooler_output
```"""


def _network_name(config: ml_collections.ConfigDict) -> str:
    model = config.model
    name = {"vit": "ViT", "swin": "Swin", "resnet": "ResNet"}[model.family]
    patch = f"/{model.patch}" if model.family == "vit" else ""
    if model.size != "custom":
        return f"{name}-{model.size.upper()}{patch}"
    size = size_of(model)._asdict()
    parts = [f"{part} {x if isinstance(x, int) else tuple(x)}" for part, x in size.items()]
    return f"{name}{patch} ({', '.join(parts)})"


def _is_run(trained: Trained) -> bool:
    return (trained.source / "data.json").exists()


def _data(trained: Trained) -> str:
    if not _is_run(trained):
        return "The folder that was exported does not record the images of the training."
    own = trained.config.data
    images = _read(trained.source / "data.json")
    counts = [
        f"{part['images']} images to {'train on' if split == 'train' else 'test'}"
        for split in ("train", "test")
        if isinstance(part := images.get(split), dict) and "images" in part
    ]
    name = own.name or epath.Path(own.path).name
    return _filled(f"{own.source}{f' `{name}`' if name else ''}: {', '.join(counts)}.")


def _settings(config: ml_collections.ConfigDict) -> list[tuple[str, Any]]:
    flat = flatten(config)
    unused = without_use(config)
    shown = [name for name in SHOWN if name in flat]
    own = [name for name in flat if name.startswith(f"{config.method}.")]
    used = [name for name in (*shown, *own) if name not in unused and name not in PATHS]
    values = [(f"`{name}`", flat[name]) for name in used]
    return [(name, value) for name, value in values if value is not None and value != ""]


def _evaluations(trained: Trained) -> str:
    """Returns a table of the numbers of this network that the folder of the run has."""
    rows: list[tuple[str, float]] = []
    source = trained.source
    mark = fingerprint(trained.config, trained.leaves)
    folder = source / "evaluations"
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    for file in files:
        record = _read(file)
        results, weights = record.get("results"), record.get("weights")
        same = isinstance(weights, Mapping) and weights.get("fingerprint") == mark
        if same and isinstance(results, Mapping):
            rows += [(f"{record.get('task')}: {name}", x) for name, x in _numbers(results)]
    summary = _read(source / "summary.json") if (source / "summary.json").exists() else {}
    last = trained.network == "teacher" and summary.get("steps") == trained.step
    if last and isinstance(summary.get("knn_top1"), float):  # of the teacher at the end
        rows.append(("k-NN accuracy during training", summary["knn_top1"]))
    if not rows:
        return _filled(
            "There are no measurements of this network. `python -m sop_jax.evaluate --workdir=DIR "
            "--task=knn --data.path=PATH` makes one on images with labels."
        )
    return _table(("measured", "value"), [(name, f"{value:.4g}") for name, value in rows])


def _numbers(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the scores of a result by name, also those of its sections; no lists."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _read(file: epath.Path) -> dict[str, Any]:
    """Returns the content of a JSON file; {} if it is damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in lines)


def _filled(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
