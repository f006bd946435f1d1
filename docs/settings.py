r"""Writes docs/settings.md: every setting with its default, the values it can have and its meaning.

    python docs/settings.py

Run it after a change of a setting. The meanings of the settings of methods are those of the tables
in docs/method.md; those of all others are below.
"""

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from sop_jax.check import RULES  # noqa: E402
from sop_jax.config import RESUMABLE, paper  # noqa: E402
from sop_jax.objectives.methods import METHODS  # noqa: E402
from sop_jax.settings import flatten  # noqa: E402

MEANINGS = {
    "seed": "Draws the first weights, the order of the images, crops, masks and prototypes.",
    "init_from": "Weights to start from: a file, or the folder of a run or of a conversion.",
    "epochs": "The length of the run.",
    "steps": "The length of the run in steps; takes precedence over `epochs` if set.",
    "method": "What is learnt. The section of settings with this name belongs to it.",
    "batch_size": "Images per step, over all devices. It is fixed for a run.",
    "accumulate": "Microbatches per step, computed one after another to save memory.",
    "log_every": "Steps between rows of metrics; 0 for never.",
    "eval_every": (
        "Steps between evaluations, with one before and one after the run; 0 for none at all."
    ),
    "checkpoint_every": (
        "Steps between checkpoints; 0 for only those of `checkpoint.minutes` and of the end."
    ),
    "tracker": (
        "Where curves are drawn: TensorBoard or Weights & Biases. `metrics.jsonl` always has them."
    ),
    "profile_steps": "The first and the last step that are traced for a profiler; 0,0 for none.",
    "data.source": (
        "Where images come from: TFDS, a folder, a packed `.npz` file, or scikit-learn's digits."
    ),
    "data.path": "The `data_dir` of TFDS, the folder of images, or the packed file.",
    "data.name": "The name of a TFDS data set.",
    "data.train_split": (
        "The split to train on. For a folder, empty if its folders are classes, not splits."
    ),
    "data.test_split": "The split whose images are classified in evaluations.",
    "data.workers": "Processes that make batches; with 0, the main process does.",
    "data.threads": "Threads per worker.",
    "data.max_corrupt_share": "The run stops if a larger share of its images cannot be read.",
    "data.orientation": (
        "Whether images are rotated by their EXIF orientation; `auto` does so for folders only."
    ),
    "data.white": (
        "The value that is white in single channels of more than 8 bits; 0 for that of the file."
    ),
    "data.max_pixels": "Larger images are not decoded.",
    "data.retry_seconds": "How long reads are retried while storage fails; 0 for never.",
    "augment.resample": (
        "How crops are resized: OpenCV (low-pass, bicubic) or Pillow (antialiased bicubic)."
    ),
    "augment.global_size": "The side of global views, in pixels.",
    "augment.local_size": "The side of local views, in pixels.",
    "augment.global_crops": "Global views per image.",
    "augment.local_crops": "Local views per image.",
    "augment.global_scale": (
        "The least and the largest share of an image's area that a global view covers."
    ),
    "augment.local_scale": "The same for local views.",
    "augment.flip": "The probability that a view is mirrored.",
    "augment.jitter": "The probability that the colours of a view are changed.",
    "augment.brightness": "The largest relative change of brightness.",
    "augment.contrast": "The largest relative change of contrast.",
    "augment.saturation": "The largest relative change of saturation.",
    "augment.hue": "The largest change of hue, as a share of a full turn.",
    "augment.grayscale": "The probability that a view loses its colours.",
    "augment.blur": (
        "The probabilities of blur: of the first global view, of other global views, of local "
        "views."
    ),
    "augment.blur_sigma": "The least and the largest standard deviation of the blur, in pixels.",
    "augment.solarize": "The probability that a global view other than the first is solarized.",
    "mask.kind": (
        "Which patches are hidden: blocks, random ones, or all but one block (as in CAPI)."
    ),
    "mask.ratio": "The range of the share of patches that are hidden, drawn anew for each view.",
    "mask.none": "The probability that a view is not masked.",
    "mask.start_epochs": "No view is masked before.",
    "mask.start_steps": "The same in steps; takes precedence if set.",
    "model.family": "The kind of network.",
    "model.size": (
        "`ti`, `s`, `b`, `l`, `h` of a ViT; `t`, `s`, `b` of a Swin; `18`, `34`, `50` of a ResNet; "
        "or `custom`."
    ),
    "model.width": (
        "`custom` only: the width of a ViT, of the first stage of a Swin, of the stem of a ResNet."
    ),
    "model.depth": "`custom` only: the layers of a ViT.",
    "model.heads": "`custom` only: the attention heads of a ViT.",
    "model.stage_depths": (
        "`custom` only: the layers of the four stages of a Swin, or the blocks of each stage of a "
        "ResNet, which can have any number of stages."
    ),
    "model.block": (
        "`custom` only: the convolutions of a ResNet's block, 1 x 1, 3 x 3 and 1 x 1 in "
        "`bottleneck`, and twice 3 x 3 in `basic`."
    ),
    "model.stage_heads": "`custom` only: the attention heads of each stage of a Swin.",
    "model.patch": "The side of the patches of a ViT, in pixels.",
    "model.window": "The side of the windows in which a Swin attends, in patches.",
    "model.stem": (
        "The start of a ResNet: `imagenet` has a stride of 4; for small images, 3 x 3 of stride 2 "
        "(`strided`) or 1 (`small`), without pooling."
    ),
    "model.registers": "Extra tokens of a ViT, which represent no patch.",
    "model.layer_scale": "The initial scale of the branches of a ViT; 0 for no layer scale.",
    "model.pool": (
        "What represents an image in a ViT: [CLS], or the mean of the patches (table C.2)."
    ),
    "model.positions": (
        "How positions of a ViT are resized: as iBOT, transformers (`size`) or timm do."
    ),
    "model.norm_eps": "Added to the variance in layer norms.",
    "model.drop_path": (
        "The probability that an image skips the last layer; it is smaller in earlier layers."
    ),
    "model.init_std": "The standard deviation of the first weights of linear layers.",
    "model.position_std": "The standard deviation of the first positional embeddings.",
    "model.remat": (
        "What is recomputed in a layer to save memory: nothing, all but products, attention too, "
        "all."
    ),
    "model.attention": "What computes attention: XLA, cuDNN, or cuDNN where it works.",
    "model.unroll": (
        "Whether the layers of a ViT are compiled one by one rather than as a loop, which is "
        "estimated to be faster on GPUs and needs more memory."
    ),
    "model.dtype": "The type of the computation; parameters are float32.",
    "model.precision": "The precision of matrix products in float32.",
    "head.layers": "Linear layers; with 0, embeddings are the tokens.",
    "head.hidden": "The outputs of each linear layer but the last.",
    "head.dim": "The numbers in an embedding.",
    "head.batch_norm": "Whether batch norm follows each layer but the last.",
    "head.batch_norm_views": "Whether global and local views are normalized apart or together.",
    "head.unit": "Whether embeddings are L2-normalized.",
    "optim.kind": "The optimizer.",
    "optim.sgd_momentum": "The momentum of `sgd` and `lars`.",
    "optim.trust": "`lars`: the norm of an update at a rate of 1, as a share of its parameter's.",
    "optim.lr": (
        "The peak learning rate for 256 images per step, scaled in proportion to `batch_size`."
    ),
    "optim.min_lr": "The learning rate at the end of a cosine decay; not scaled.",
    "optim.warmup_epochs": "The time in which the learning rate rises from 0 to its peak.",
    "optim.warmup_steps": "The same in steps; takes precedence if set.",
    "optim.weight_decay": "Weight decay at the start and at the end, with a cosine between them.",
    "optim.clip": "The largest norm of a gradient; 0 for no clipping.",
    "optim.clip_kind": "Whether each tensor is clipped by itself, or all together.",
    "optim.momentum": (
        "The share of the teacher that remains in a step, at the start and at the end."
    ),
    "eval.resize": "The shorter side to which images are resized in evaluations, in pixels.",
    "eval.crop": "The side of the centre crop in evaluations, in pixels.",
    "eval.batch_size": "Images per batch in evaluations.",
    "eval.tasks": "What is measured at `eval_every`.",
    "eval.knn_k": "The numbers of neighbours that vote; the accuracy of the best is reported.",
    "eval.knn_temperature": "The temperature of the votes of neighbours.",
    "checkpoint.minutes": "The most minutes between the starts of two saves; 0 for no limit.",
    "checkpoint.keep_last": "The number of newest checkpoints that are kept.",
    "checkpoint.keep_every": "Checkpoints at multiples of this step are kept as well; 0 for none.",
    "mesh.data": "Groups of devices, each with all parameters; 0 for as many as possible.",
    "mesh.fsdp": "Devices per group, over which parameters and optimizer state are sharded.",
}

SECTIONS = {
    "": "The run",
    "data": "Images",
    "augment": "Views",
    "mask": "Masks",
    "model": "Backbone",
    "head": "Head",
    "optim": "Optimizer",
    "eval": "Evaluation during training",
    "checkpoint": "Checkpoints",
    "mesh": "Devices",
}

INTRODUCTION = """# Settings

`--config.NAME=VALUE` changes a setting of a recipe; several values are separated by commas. The
defaults below are those of `config.paper()`, the paper's recipe for ViT-S/16 on ImageNet, and
recipes change them: `python -m sop_jax.train --config=RECIPE --help` lists those of a recipe. A
setting that would have no effect, because of others, is an error, and so is a value that it cannot
have; both are named when a run starts.

A dash means that a setting is not set. Settings with a star can be changed when a run resumes;
`data.path` and `init_from` only if the images are the same.

This page is written by `python docs/settings.py`.
"""


def shown(value: Any) -> str:
    """Returns a default as it is given on a command line."""
    if value is None or value == "":
        return "-"
    if isinstance(value, list):
        return ",".join(map(shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def meanings_of_methods() -> dict[str, str]:
    """Returns the meanings in the tables of docs/method.md by dotted name.

    Settings that several methods share are in the table of all of them, without their name.
    """
    text = (DOCS / "method.md").read_text()
    parts = dict(part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.M)[1:])
    rows = {
        title: dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| (.+) \|$", part, flags=re.M))
        for title, part in parts.items()
    }
    shared = rows["The settings of methods with prototypes"]
    found = {}
    for name, method in METHODS.items():
        for key in flatten(method.settings()):
            own = (rows[title] for title in (name, *INHERITED.get(name, ())))
            found[f"{name}.{key}"] = next((row[key] for row in (*own, shared) if key in row), "")
    return found


# Methods whose sections leave settings to those of other methods.
INHERITED = {"pmsn": ("msn",), "decoupled": ("carp", "ibot")}


def table(names: list[str], prefix: str, meanings: dict[str, str]) -> list[str]:
    """Returns the rows of some settings, without a prefix of their names."""
    defaults = flatten(paper())
    lines = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for name in names:
        star = r" \*" if name in RESUMABLE else ""
        values = RULES[name].expected.replace("|", r"\|")
        lines.append(
            f"| `{name.removeprefix(prefix)}`{star} | {shown(defaults[name])} | {values} | "
            f"{meanings[name]} |"
        )
    return lines


def page() -> str:
    """Returns the text of docs/settings.md."""
    meanings = MEANINGS | meanings_of_methods()
    lines = [INTRODUCTION]
    for section, title in SECTIONS.items():
        prefix = f"{section}." if section else ""
        names = [
            name
            for name in RULES
            if name.rpartition(".")[0] == section and name.partition(".")[0] not in METHODS
        ]
        words = f"## {title}" + (f": `{section}`" if section else "")
        lines += [words, "", *table(names, prefix, meanings), ""]
    lines += [
        "## Methods",
        "",
        "The settings of a method have an effect with `method=NAME` only. Their meanings are in",
        "context in [method.md](method.md).",
        "",
    ]
    for method in METHODS:
        names = [name for name in RULES if name.partition(".")[0] == method]
        lines += [f"### `{method}`", "", *table(names, f"{method}.", meanings), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "settings.md").write_text(page())
