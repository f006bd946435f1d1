"""The labelled images of a classification task: a part to learn from, and a part to classify."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from sop_jax.data import sources, transfer
from sop_jax.data.named import describe, name_data, splits_of
from sop_jax.data.sources import Source, open_source
from sop_jax.data.subsets import Subset, draw_share, labels_of, read_list
from sop_jax.errors import UserError
from sop_jax.parallel import hosts


class Splits(NamedTuple):
    """The two splits of a data set.

    Attributes:
        train: the images whose labels are used.
        test: the images to classify; None only while a run trains without such images.
    """

    train: Source
    test: Source | None


def open_splits(config: ml_collections.ConfigDict, given: Mapping[str, Any], task: str) -> Splits:
    """Returns both splits of the data of a run, or of the data that flags name.

    Args:
        config: the settings of the run; `config.data` is updated to the data that is opened.
        given: the flags that were given, see `data.named.name_data`.
        task: the name of the task, for messages.

    Raises:
        UserError: the data does not exist, or it has no labels or no split to classify.
    """
    data_config = config.data
    try:
        name_data(data_config, given)
        train = open_source(data_config, "train")
        assert train is not None  # only the test split may be missing
        test = open_source(data_config, "test", train)
    except UserError as error:  # its message names the flags of `sop_jax.train`
        raise UserError(str(error).replace("--config.data.", "--data.")) from error
    if hosts.is_first():
        for note in sources.notes(train, test):
            print(note, file=sys.stderr)
    if test is None:
        found = ", ".join(sorted(splits_of(data_config).values()))
        remedy = "name it with --data.test_split" if found else "put it into a folder called val"
        raise UserError(
            f"there is no split {data_config.test_split!r} to classify in {describe(data_config)}"
            f"{f', but there are {found}' * bool(found)}. {task} needs one besides the train "
            f"split: {remedy}, or use --data.path to name other data that has both"
        )
    if not (train.has_labels and test.has_labels):
        raise UserError(
            f"the images have no labels ({describe(data_config)}), and {task} needs them. Sort "
            "them into one folder per class, in the train and in the test split, or use "
            "--data.path to name other data that has labels"
        )
    return Splits(train, test)


def open_split(
    config: ml_collections.ConfigDict, given: Mapping[str, Any], split: str, task: str
) -> Source:
    """Returns one split of the data of a run, or of the data that flags name.

    Args:
        config: the settings of the run; `config.data` is updated to the data that is opened.
        given: the flags that were given, see `data.named.name_data`.
        split: "train" or "test".
        task: the name of the task, for messages.

    Raises:
        UserError: the data does not exist, or does not have this split.
    """
    data_config = config.data
    try:
        name_data(data_config, given)
        train = open_source(data_config, "train")
        assert train is not None  # only the test split may be missing
        found = train if split == "train" else open_source(data_config, "test", train)
    except UserError as error:  # its message names the flags of `sop_jax.train`
        raise UserError(str(error).replace("--config.data.", "--data.")) from error
    if found is None:
        raise UserError(
            f"there is no split {data_config.test_split!r} in {describe(data_config)}, which "
            f"{task} uses. Name another one with --data.test_split, or choose --eval.split=train"
        )
    if hosts.is_first():
        for note in sources.notes(found):
            print(note, file=sys.stderr)
    return found


def open_transfer_set(
    config: ml_collections.ConfigDict, name: str, data: Mapping[str, Any], task: str
) -> Splits:
    """Opens the splits of a transfer set, or those that flags name if `name` is empty.

    Args:
        config: as for `open_splits`.
        name: one of `transfer.SETS`, or "".
        data: as for `open_splits`.
        task: as for `open_splits`.

    Raises:
        UserError: there is no such data.
    """
    path = data.get("path")
    if not (name and path):
        return open_splits(config, data, task)
    if transfer.is_inaturalist(name, path):
        found = transfer.open_inaturalist(path, transfer.SETS[name].year)
        config.data.update(source="folder", path=path, name="")
        return Splits(found.train, found.test)
    return open_splits(config, {**transfer.flags(name, path), **data}, task)


def count_labels(train: Source) -> int:
    """Returns the number of outputs that a classifier of these images needs."""
    names = train.class_names
    return len(names) if names else int(labels_of(train).max()) + 1


def few_labels(train: Source, percent: float, file: str, seed: int) -> Source:
    """Returns the train images whose labels a protocol with few labels uses.

    Args:
        train: all train images.
        percent: the share of each class in percent; 100 for all images.
        file: a list of file names, such as SimCLR's `1percent.txt`; "" to draw the images.
        seed: the seed of the draw.

    Raises:
        UserError: the list is not of these images.
    """
    if file:
        return Subset(train, read_list(file, train))
    if percent == 100:
        return train
    return Subset(train, draw_share(labels_of(train), percent / 100, seed))


def sources_of(splits: Splits) -> dict[str, Source | None]:
    """Returns the sources by split, which identify the data in a result."""
    return {"train": splits.train, "test": splits.test}
