"""Data as named on a command line: which kind of source a path is, and which splits it has."""

import zipfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from sop_jax.data import folders
from sop_jax.data.tfds import builder_of
from sop_jax.errors import UserError

# The settings that each kind of source reads.
SPLITS = ("train_split", "test_split")
LOOKED_AT = {
    "tfds": ("path", "name", *SPLITS),
    "folder": ("path", *SPLITS),
    "packed": ("path", *SPLITS),
    "digits": (),
}
TO_CLASSIFY = (*folders.HELD_OUT, "test")  # names of splits, in order of preference


def without_use(source: str, name: str) -> str:
    """Returns why a setting of `config.data` has no effect, or an empty string if it has one."""
    if name not in LOOKED_AT["tfds"] or name in LOOKED_AT.get(source, LOOKED_AT["tfds"]):
        return ""
    users = [kind for kind, names in LOOKED_AT.items() if name in names]
    return f"it is for data.source={' or '.join(users)}, but data.source is {source}"


def name_data(data_config: Any, given: Mapping[str, str]) -> None:
    """Updates `config.data` of a run to the data that the flags of a command name.

    A path without a source is a packed file if it is an .npz file, a TFDS data set if it contains
    one, and a folder of images otherwise. If no split to classify is named, it is the run's, or
    else the first of `TO_CLASSIFY` that the data has.

    Args:
        data_config: `config.data` of the run; updated.
        given: the flags that were given, by the names of the settings `source`, `path`, `name`,
            `train_split` and `test_split`.

    Raises:
        UserError: nothing exists at the path, or a flag would have no effect.
    """
    if "source" in given:
        source = given["source"]
    elif given.get("name"):
        source = "tfds"
    elif "path" in given:
        source = source_at(given["path"], data_config)
    else:
        source = data_config.source
    for name, value in given.items():
        if value and (reason := without_use(source, name)):
            raise UserError(f"--data.{name}={value} would have no effect: {reason}")
    if source != data_config.source:
        data_config.update(path="", name="")
    if "path" in given and (epath.Path(given["path"]) / "dataset_info.json").exists():
        data_config.name = ""
    data_config.update({**given, "source": source})
    if "test_split" in given or not given.keys() & {"source", "path", "name"}:
        return
    there = splits_of(data_config)
    wanted = [data_config.test_split.split("[")[0], *TO_CLASSIFY]
    found = [there[name.casefold()] for name in wanted if name.casefold() in there]
    if found and found[0] != wanted[0]:
        data_config.test_split = found[0]


def name_folder(data_config: Any, given: Mapping[str, Any], expected: str) -> epath.Path:
    """Updates `config.data` to a data set that has a layout of its own, and returns its folder.

    Args:
        data_config: `config.data` of the run; updated.
        given: the flags that were given, see `name_data`.
        expected: describes the data, for messages.

    Raises:
        UserError: the folder is not named or does not exist, or a flag would have no effect.
    """
    for name in ("source", "name", "train_split", "test_split"):
        if given.get(name):
            raise UserError(
                f"--data.{name}={given[name]} would have no effect: the data is a folder with a "
                f"layout of its own. Expected {expected}. Give only --data.path"
            )
    if not given.get("path"):
        raise UserError(f"--data.path is missing. Expected {expected}. Name its folder")
    folder = epath.Path(given["path"])
    if not folder.is_dir():
        raise UserError(
            f"--data.path={folder} is not a folder. Expected {expected}. Name its folder"
        )
    use_folder(data_config, folder, given)
    return folder


def use_folder(data_config: Any, folder: epath.PathLike, given: Mapping[str, Any]) -> None:
    """Updates `config.data` to a folder without splits, read as the flags that were given say."""
    own = dict(source="folder", path=str(folder), name="", train_split="", test_split="")
    data_config.update({**given, **own})


def source_at(path: str, data_config: Any) -> str:
    """Returns the kind of source that a path is: "packed", "tfds" or "folder".

    Args:
        path: local or gs://.
        data_config: `config.data` of the run; if its source is TFDS, the path may be another
            data_dir.

    Raises:
        UserError: nothing exists at the path, or it is a file of another kind.
    """
    place = epath.Path(path)
    if place.is_file():
        if place.suffix == ".npz":
            return "packed"
        raise UserError(
            f"--data.path={path} is a file, but not a packed .npz file; give a folder of images, a "
            "packed .npz file or the folder of a TFDS data set"
        )
    if not place.is_dir():
        raise UserError(
            f"--data.path={path} does not exist; give a folder of images, a packed .npz file or "
            "the folder of a TFDS data set"
        )
    if (place / "dataset_info.json").exists():
        return "tfds"
    moved = data_config.source == "tfds" and data_config.name
    return "tfds" if moved and (place / data_config.name).is_dir() else "folder"


def splits_of(data_config: Any) -> dict[str, str]:
    """Returns the names of the splits of a data set by their lower-case form; empty if unknown."""
    path = epath.Path(data_config.path)
    names: list[str] = []
    if data_config.source == "folder" and path.is_dir():
        asked = {name.casefold() for name in (data_config.train_split, data_config.test_split)}
        known = asked | set(folders.SPLITS)  # any other folder is a class
        names = [f.name for f in path.iterdir() if f.name.casefold() in known and f.is_dir()]
    elif data_config.source == "packed" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            names = [name.removesuffix("_blob.npy") for name in packed.namelist()]
    elif data_config.source == "tfds":
        names = list(builder_of(data_config).info.splits)
    return {name.casefold(): name for name in names}


def describe(data_config: Any) -> str:
    """Returns the settings that name the data, for messages."""
    names = LOOKED_AT[data_config.source]
    words = [f"data.{name}={getattr(data_config, name)}" for name in names]
    return ", ".join([f"data.source={data_config.source}", *words])
