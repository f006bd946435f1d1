"""Reads TensorFlow Datasets in array_record files, without TensorFlow."""

import errno
import functools
import hashlib
import os
import re
from typing import Any

import numpy as np

from sop_jax.errors import UserError

SYSTEM_CALL = re.compile(r"\w+\(\) failed: ([^;]+)")  # in messages of array_record


class TfdsSource:
    """One split of a prepared TFDS data set in array_record files."""

    def __init__(self, folder: str, split: str) -> None:
        """Takes the folder with dataset_info.json and a split.

        That can be a slice, such as train[:10%], or a sum, such as train+validation.
        """
        self.folder, self.split = folder, split

    @functools.cached_property
    def _builder(self) -> Any:
        return _tfds().builder_from_directory(self.folder)

    @functools.cached_property
    def _records(self) -> Any:
        skip = _tfds().decode.SkipDecoding()
        features = self._builder.info.features
        images = [key for key in features if isinstance(features[key], _tfds().features.Image)]
        return self._builder.as_data_source(
            split=self.split, decoders={key: skip for key in images}
        )

    def __getstate__(self) -> dict[str, str]:
        return dict(folder=self.folder, split=self.split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        try:
            record = self._records[index]
        except RuntimeError as error:  # array_record raises this for every kind of failure
            call = SYSTEM_CALL.search(str(error))
            if call is None:
                raise ValueError(str(error)) from error
            self.__dict__.pop("_records", None)  # a reader that failed cannot be used again
            numbers = {os.strerror(number): number for number in errno.errorcode}
            raise OSError(numbers.get(call[1], errno.EIO), call[1]) from error
        if self.has_labels:
            self._seen[index] = record["label"]
        return record["image"]

    def name(self, index: int) -> str:
        """Returns folder, split and number, and the name of the original file if it was stored."""
        name = f"{self.folder}:{self.split}[{index}]"
        try:
            file = self._records[index].get("file_name", b"")
        except RuntimeError:  # the record to be named may be the one that cannot be read
            return name
        return f"{name} {bytes(file).decode(errors='backslashreplace')}".strip()

    @property
    def has_labels(self) -> bool:
        """Whether the data set has a feature `label` with named classes."""
        return self.class_names is not None

    def label(self, index: int) -> int:
        """Returns the label of a record, which is cached when the record is read."""
        if self._seen[index] < 0:
            _ = self[index]
        return int(self._seen[index])

    @functools.cached_property
    def _seen(self) -> np.ndarray:
        return np.full(len(self), -1, np.int32)

    @functools.cached_property
    def class_names(self) -> list[str] | None:
        """The names of the labels in order, or None."""
        features = self._builder.info.features
        label = features["label"] if "label" in features else None
        return list(label.names) if isinstance(label, _tfds().features.ClassLabel) else None

    @property
    def digest(self) -> str:
        """A hash of the data set's name, version and shard lengths, and of the split."""
        info = self._builder.info
        lengths = [info.splits[name].shard_lengths for name in _parts(self.split)]
        shards = lengths if len(lengths) > 1 else lengths[0]
        text = f"{info.full_name} {shards} {self.split} {len(self)}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tfds() -> Any:
    import tensorflow_datasets  # only when used, because it delays the start of other sources

    return tensorflow_datasets


def _parts(split: str) -> list[str]:
    """Returns the names of the splits that a split is made of: one, or the terms of a sum."""
    return [term.split("[")[0] for term in split.split("+")]


def builder_of(data_config: Any) -> Any:
    """Returns the TFDS builder of `data_config.name` in `data_config.path`.

    Raises:
        UserError: TFDS cannot find it.
    """
    path, name = str(data_config.path), data_config.name
    try:
        if name:
            return _tfds().builder(name, data_dir=path or None)
        return _tfds().builder_from_directory(path)
    except Exception as error:  # TFDS raises many kinds of exceptions if nothing is there
        raise UserError(
            f"TFDS cannot open {_where(data_config)}: {str(error).splitlines()[0]} Set "
            "--config.data.path and --config.data.name to a prepared data set, or make one from a "
            "folder of images with python -m sop_jax.data.prepare."
        ) from error


def _where(data_config: Any) -> str:
    name, path = data_config.name, data_config.path
    return f"{name or 'a data set'} in {path or 'the default data_dir of TFDS'}"


def open_tfds(data_config: Any, split: str) -> TfdsSource | None:
    """Opens one split as `sources.open_source` does; returns None if there is no test split."""
    builder, where = builder_of(data_config), _where(data_config)
    splits = set(builder.info.splits)
    wanted = getattr(data_config, f"{split}_split") or ""
    if not splits:
        raise UserError(
            f"TFDS knows {where}, but the data set is not prepared there. Prepare it once with "
            'file_format="array_record", or with python -m sop_jax.data.prepare.'
        )
    if not splits.issuperset(_parts(wanted)):
        if split == "test":
            return None
        raise UserError(
            f"{where} has no split {wanted!r}; it has {', '.join(sorted(splits))}. "
            "Set --config.data.train_split to one of them."
        )
    if "image" not in builder.info.features:
        raise UserError(
            f"{where} has no feature 'image'; it has {', '.join(builder.info.features)}. "
            "Choose a data set of images."
        )
    source = TfdsSource(str(builder.data_dir), wanted)
    try:
        _ = source[0], source[len(source) - 1]
    except Exception as error:
        raise UserError(
            f"Cannot read {where}, split {wanted!r}: {str(error).splitlines()[0]} It must be "
            'prepared with file_format="array_record", and all of its files must be there.'
        ) from error
    return source
