"""Turns a tree of images into a TFDS data set (array_record), without TensorFlow.

    python -m sop_jax.data.prepare --images=ROOT --out=DATA_DIR --name=NAME --splits=train,val

ROOT contains one folder per split, each with one folder per class (ImageNet's layout), or any
other images, which then form a single split `train`; with --splits= no folder is a split. The bytes
of the files and of their names are copied unchanged.

For example, of the pictures of the documents:

    python -m sop_jax.data.prepare --images=docs --out=runs/data --name=pictures
"""

import errno
import re
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import flags
from etils import epath

from sop_jax import paths
from sop_jax.data.folders import FolderSource, find_splits, folder_source, printable
from sop_jax.data.read import missing_target
from sop_jax.errors import UserError

VERSION = "1.0.0"


def prepare(images: str, out: str, name: str, splits: list[str]) -> str:
    """Writes the data set.

    Args:
        images: the root of the tree, local or gs://.
        out: the TFDS data_dir; the data set is written to out/name/1.0.0.
        name: the name of the data set: lower-case letters, digits and underscores.
        splits: folders below `images`, in any letter case; the first defines the classes. If the
            list is empty, or none of them exists, the whole tree becomes the split "train".

    Returns:
        The flags with which a run trains on the data set.

    Raises:
        UserError: there are no images, the name is invalid, the data set already exists, or it
            cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"{name!r} is not a valid name for a data set. Use lower-case letters, digits and "
            "underscores, and begin with a letter, for example --name=my_images."
        )
    folder = epath.Path(out) / name / VERSION
    if folder.exists():
        raise UserError(
            f"{folder} already exists. Choose another --name, or remove it to make it again."
        )
    paths.check_writable(out, "--out")
    trees = _trees(images, splits)
    for note in (note for tree in trees.values() for note in tree.notes):
        print(note, file=sys.stderr)
    try:
        _builder(name, out, trees).download_and_prepare()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        more = (
            "It needs about twice the size of the images; free some space, or choose"
            if full
            else "Choose"
        )
        raise UserError(
            f"Writing {folder} failed: {error}. {more} another --out, then run the same command "
            "again."
        ) from error
    found = list(trees)
    flags_ = [
        "--config.data.source=tfds",
        f"--config.data.path={out}",
        f"--config.data.name={name}",
        f"--config.data.train_split={found[0]}",
        f"--config.data.test_split={found[1] if len(found) > 1 else ''}",
        "--config.data.orientation=exif",  # the files are copied unchanged, with their EXIF tags
    ]
    return " ".join(flags_)


def _trees(images: str, splits: list[str]) -> dict[str, FolderSource]:
    """Returns the files and labels of every split, in the order of `splits`."""
    if not splits:
        return {"train": folder_source(images)}
    folders, unused, notes = find_splits(images, splits, "--splits")
    if not folders:
        return {"train": folder_source(images)}
    there = list(dict.fromkeys([*folders.values(), *unused]))
    missing = [split for split in splits if split not in folders]
    if missing or len(set(folders.values())) < len(splits):
        wrong = f"but not {', '.join(missing)}" if missing else "and two of --splits are the same"
        raise UserError(
            f"{printable(images)} has the {'folder' if len(there) == 1 else 'folders'} "
            f"{', '.join(there)}, {wrong}. Name each folder once: --splits={','.join(there)}"
        )
    root = epath.Path(images)
    first = folder_source(str(root / folders[splits[0]]))
    first.notes[:0] = notes
    rest = {split: folder_source(str(root / folders[split]), like=first) for split in splits[1:]}
    return {splits[0]: first, **rest}


def _builder(name: str, out: str, trees: dict[str, FolderSource]) -> Any:
    """Returns a TFDS builder that copies the files of `trees`."""
    dataset_name = name
    class_names = next(iter(trees.values())).class_names
    if class_names is not None:  # TFDS stores them as lines of text
        class_names = [printable(label) for label in class_names]
    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "file_name": tfds.features.Text(),
    }
    if class_names is not None:
        features["label"] = tfds.features.ClassLabel(names=class_names)

    with tfds.core.registered.skip_registration():  # the class is only used here

        class ImageTree(tfds.core.GeneratorBasedBuilder):
            """The encoded images of a folder tree."""

            name = dataset_name
            VERSION = tfds.core.Version(VERSION)

            def _info(self) -> tfds.core.DatasetInfo:
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
                return {split: self._generate_examples(tree) for split, tree in trees.items()}

            def _generate_examples(
                self, tree: FolderSource
            ) -> Iterator[tuple[bytes, dict[str, Any]]]:
                for i, file in enumerate(tree.files):
                    path = file.encode("utf-8", "surrogateescape")
                    example: dict[str, Any] = {"image": _read(tree, i), "file_name": path}
                    if tree.labels is not None:
                        example["label"] = int(tree.labels[i])
                    yield path, example

    return ImageTree(data_dir=out, file_format="array_record")


def _read(tree: FolderSource, index: int) -> bytes:
    try:
        return tree[index]
    except OSError as error:
        target = missing_target(error.filename)
        why = f"it is a link to {target}, which does not exist" if target else error.strerror
        raise UserError(
            f"{tree.name(index)} cannot be read: {why or error}. Repair or remove it, "
            "then run the same command again."
        ) from error


def main() -> None:
    """Prepares the data set that the flags describe."""
    args = flags.FLAGS
    config_flags = prepare(args.images, args.out, args.name, args.splits)
    print(f"Done. To train on it:\n{config_flags}")


if __name__ == "__main__":
    from sop_jax import cli

    cli.define_path("images", "The root of the image tree.", required=True)
    cli.define_path("out", "The TFDS data_dir to write to.", required=True)
    flags.DEFINE_string("name", None, "The name of the data set.", required=True)
    flags.DEFINE_list("splits", ["train", "val"], "Folders of the tree, the one to train on first.")
    cli.run(main, devices=False)
