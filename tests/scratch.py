"""A folder in which the commands of the documents find everything that they name."""

import pathlib
import shutil
import stat
import sys

import jax
import numpy as np
from checkpoints import head, save_pth, vit
from datasets import colours, pack, write_clip, write_pairs, write_small_set, write_tree
from etils import epath
from runs import APART, make_config

from sop_jax.data.prepare import prepare
from sop_jax.evaluation import segment
from sop_jax.evaluation.heads import Head, write_head
from sop_jax.evaluation.task import View
from sop_jax.settings import flatten

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIDE = 32  # of the crops of the run in DIR
RECIPES = ("X", "NAME", "RECIPE")
EXTRAS = ("plot", "cuda")  # of the environment, which counts as installed

RECIPE = """
from sop_jax.config import paper


def get_config():
    config = paper()
    config.update_from_flattened_dict({settings!r})
    return config
"""


def small_run() -> dict[str, object]:
    """Returns the settings of the run in DIR, whose network has few and large patches."""
    config = make_config(**APART)
    config.model.update(patch=16, depth=4)  # segmentation takes four layers
    config.augment.update(global_size=SIDE, local_size=16)
    config.eval.update(resize=SIDE, crop=SIDE, batch_size=64)
    config.data.update(source="folder", path="FOLDER", test_split="val", workers=0)
    config.log_every = 2
    return flatten(config)


def make_checkout(root: pathlib.Path) -> None:
    """Writes a checkout whose environment is already installed, with the recipes of synopses."""
    for folder in ("launch", "configs", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "docs").mkdir()
    for file in ("settings.py", "method.md", "report.png", "collapse.png"):
        shutil.copy(ROOT / "docs" / file, root / "docs")
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, root)
    (root / "sop_jax").symlink_to(ROOT / "sop_jax")
    for name in RECIPES:
        (root / "configs" / f"{name}.py").write_text(RECIPE.format(settings=small_run()))
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    python = programs / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    for extra in EXTRAS:
        shutil.copy(ROOT / "setup.py", root / ".venv" / f"installed-{extra}")


def write_images(root: pathlib.Path) -> None:
    """Writes the folders and data sets that the documents name."""
    colours(root / "IMAGENET", labelled=True, count=100)
    colours(root / "FOLDER", labelled=True, count=20, held=20)
    for name in ("IMAGES", "PATH", "FOLDER_OR_NPZ_OR_TFDS", "imagenette224"):
        shutil.copytree(root / "FOLDER", root / name)
    shutil.copy(root / "FOLDER" / "val" / "red" / "red0.png", root / "IMAGE")
    # More than the 50 steps of configs/cifar10_cpu.py between two lines of its log.
    pack(root / "IMAGENET", root / "cifar10.npz", test="test", times=8)
    prepare(str(root / "PATH"), str(root / "DATA"), "imagenet", ["train", "val"])
    for name in ("roxford5k", "rparis6k"):
        write_small_set(root / "ROOT", name)
    for clip in ("bear", "swan"):
        write_clip(root / "DAVIS", clip, 3)
    lists = root / "DAVIS" / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    for split, clip in (("train", "bear"), ("val", "swan")):
        (lists / f"{split}.txt").write_text(f"{clip}\n")
    write_pairs(root / "ADE20K", classes=150)
    write_tree(root / "IN9", ["original/val/00_dog/1.JPEG", "no_fg/val/05_insect/2.JPEG"])
    names = sorted((root / "IMAGENET" / "val").rglob("*.png"))
    lines = [
        f"{path.relative_to(root / 'IMAGENET' / 'val')},{i % 2}" for i, path in enumerate(names)
    ]
    (root / "FILE.csv").write_text("\n".join(["name,cluster", *lines, ""]))


def write_weights(root: pathlib.Path) -> None:
    """Writes files of weights of other projects, and heads for the network in DIR."""
    named = {"backbone": vit(192, 12, patch=16), "head": head(192)}  # ViT-Ti/16 at 64 pixels
    arrays = {f"{part}.{name}": x for part, found in named.items() for name, x in found.items()}
    for name in ("checkpoint.pth", "dino_deitsmall16_pretrain_full_checkpoint.pth", "FILE"):
        save_pth(root / name, arrays)
    rng = np.random.default_rng(0)
    folder = root / "DIR" / "evaluations" / "linear_STEP_DIGEST"
    folder.mkdir(parents=True)
    weights = rng.normal(size=(9, 32)).astype(np.float32)
    write_head(folder / "head.npz", Head(weights, np.zeros(9, np.float32), View()))
    config = make_config()
    config.update_from_flattened_dict(small_run())
    _, segmenter = segment.make_segmenter(config, segment.settings())
    folder = root / "DIR" / "evaluations" / "segment_STEP_DIGEST"
    folder.mkdir()
    segment.write_weights(epath.Path(folder), segmenter.init(jax.random.key(0)))


def copy_runs(root: pathlib.Path) -> None:
    """Copies the run in DIR to the other places where the documents have runs."""
    for name in (
        "OTHER",
        "THIRD",
        "runs/digits",
        "runs/mine",
        "runs/cifar10_cpu",
        "runs/imagenette",
    ):
        shutil.copytree(root / "DIR", root / name)
