"""Turns a tree of images into a TFDS data set (array_record), without TensorFlow.

    python -m sop_jax.data.prepare --images=ROOT --out=DATA_DIR --name=NAME --splits=train,val

ROOT holds one folder a split and in each one folder a class (ImageNet's layout), or any images
at all, which then make one split `train`; --splits= says that no folder is a split. The bytes of
the files and of their names are copied as they are.
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
        images: root of the tree, local or gs://.
        out: the TFDS data_dir; the data set goes to out/name/1.0.0.
        name: lower-case letters, digits and underscores.
        splits: folders below `images`, in any letter case; the first decides the classes. When
            it is empty, or none of them is there, the whole tree becomes the split "train".

    Returns:
        The flags that make a run train on it.

    Raises:
        UserError: nothing to read, a bad name, the data set exists, or it cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"{name!r} is no name for a data set. Use lower-case letters, digits and underscores, "
            "a letter first, for example --name=my_images."
        )
    folder = epath.Path(out) / name / VERSION
    if folder.exists():
        raise UserError(
            f"{folder} is there already. Choose another --name, or remove it to make it anew."
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
            "It needs about twice the size of the images; make room, or choose"
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
        "--config.data.orientation=exif",  # the bytes of the files are kept as they are
    ]
    return " ".join(flags_)


def _trees(images: str, splits: list[str]) -> dict[str, FolderSource]:
    """The files and labels of every split, in the order of `splits`."""
    if not splits:
        return {"train": folder_source(images)}
    folders, unused, notes = find_splits(images, splits, "--splits")
    if not folders:
        return {"train": folder_source(images)}
    there = [*folders.values(), *unused]
    missing = [split for split in splits if split not in folders]
    if missing or len(set(folders.values())) < len(splits):
        wrong = (
            f"but not {', '.join(missing)}" if missing else "and two of the splits are the same one"
        )
        raise UserError(
            f"{printable(images)} has the folder {', '.join(there)} {wrong}. Name those that are "
            f"there: --splits={','.join(there)}"
        )
    root = epath.Path(images)
    first = folder_source(str(root / folders[splits[0]]))
    first.notes[:0] = notes
    rest = {split: folder_source(str(root / folders[split]), like=first) for split in splits[1:]}
    return {splits[0]: first, **rest}


def _builder(name: str, out: str, trees: dict[str, FolderSource]) -> Any:
    """A TFDS builder that copies the files of `trees`."""
    dataset_name = name
    class_names = next(iter(trees.values())).class_names
    if class_names is not None:  # TFDS writes them as lines of text
        class_names = [printable(label) for label in class_names]
    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "file_name": tfds.features.Text(),
    }
    if class_names is not None:
        features["label"] = tfds.features.ClassLabel(names=class_names)

    with tfds.core.registered.skip_registration():  # it has no use beyond this call

        class ImageTree(tfds.core.GeneratorBasedBuilder):
            """Encoded images of a folder tree."""

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
        why = f"it is a link to {target}, which is not there" if target else error.strerror
        raise UserError(
            f"{tree.name(index)} cannot be read: {why or error}. Repair or remove it, "
            "then run the same command again."
        ) from error


def main() -> None:
    """Prepares the data set that the flags name."""
    args = flags.FLAGS
    config_flags = prepare(args.images, args.out, args.name, args.splits)
    print(f"Done. To train on it:\n{config_flags}")


if __name__ == "__main__":
    from sop_jax import cli

    cli.define_path("images", "The image tree.", required=True)
    cli.define_path("out", "The TFDS data_dir to write to.", required=True)
    flags.DEFINE_string("name", None, "What to call the data set.", required=True)
    flags.DEFINE_list("splits", ["train", "val"], "Folders of the tree, the one to train on first.")
    cli.run(main, devices=False)
