"""TensorFlow Datasets in array_record files, read without TensorFlow."""

import errno
import functools
import hashlib
import os
import re
from typing import Any

import numpy as np

from sop_jax.errors import UserError

SYSTEM_CALL = re.compile(r"\w+\(\) failed: ([^;]+)")  # in the words of array_record


class TfdsSource:
    """One split of a prepared TFDS data set in array_record files."""

    def __init__(self, folder: str, split: str) -> None:
        """Takes the folder with dataset_info.json and a split, slices such as train[:10%] too."""
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
        except RuntimeError as error:  # what array_record raises, whatever is wrong
            call = SYSTEM_CALL.search(str(error))
            if call is None:
                raise ValueError(str(error)) from error
            self.__dict__.pop("_records", None)  # a reader that failed never reads again
            numbers = {os.strerror(number): number for number in errno.errorcode}
            raise OSError(numbers.get(call[1], errno.EIO), call[1]) from error
        if self.has_labels:
            self._seen[index] = record["label"]
        return record["image"]

    def name(self, index: int) -> str:
        """Folder, split and number, and the original file's name where it is kept."""
        name = f"{self.folder}:{self.split}[{index}]"
        try:
            file = self._records[index].get("file_name", b"")
        except RuntimeError:  # the record that cannot be read is the one to be named
            return name
        return f"{name} {bytes(file).decode(errors='backslashreplace')}".strip()

    @property
    def has_labels(self) -> bool:
        """Whether the data set has a feature `label` with named classes."""
        return self.class_names is not None

    def label(self, index: int) -> int:
        """The label of a record, remembered from when the record was read last."""
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
        """Of the data set's name, version and shards, and of the split."""
        info = self._builder.info
        shards = info.splits[self.split.split("[")[0]].shard_lengths
        told = f"{info.full_name} {shards} {self.split} {len(self)}"
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def _tfds() -> Any:
    import tensorflow_datasets  # only when used: it costs a start-up of all other sources

    return tensorflow_datasets


def builder_of(data_config: Any) -> Any:
    """The TFDS builder of `data_config.name` in `data_config.path`.

    Raises:
        UserError: TFDS does not know it.
    """
    path, name = str(data_config.path), data_config.name
    try:
        if name:
            return _tfds().builder(name, data_dir=path or None)
        return _tfds().builder_from_directory(path)
    except Exception as error:  # TFDS has many ways to say that there is nothing there
        raise UserError(
            f"TFDS cannot open {_where(data_config)}: {str(error).splitlines()[0]} Set "
            "--config.data.path and --config.data.name to a prepared data set, or make one from an "
            "image tree with python -m sop_jax.data.prepare."
        ) from error


def _where(data_config: Any) -> str:
    name, path = data_config.name, data_config.path
    return f"{name or 'a data set'} in {path or 'the default data_dir of TFDS'}"


def open_tfds(data_config: Any, split: str) -> TfdsSource | None:
    """The split that `open_source` asks for; None where there is no test split."""
    builder, where = builder_of(data_config), _where(data_config)
    splits = set(builder.info.splits)
    wanted = getattr(data_config, f"{split}_split") or ""
    if not splits:
        raise UserError(
            f"TFDS knows {where} but it is not prepared there. Prepare it once with "
            'file_format="array_record", or with python -m sop_jax.data.prepare.'
        )
    if wanted.split("[")[0] not in splits:
        if split == "test":
            return None
        raise UserError(
            f"{where} has no split {wanted!r} but {', '.join(sorted(splits))}. "
            "Set --config.data.train_split."
        )
    if "image" not in builder.info.features:
        raise UserError(
            f"{where} has no feature 'image' but {', '.join(builder.info.features)}. "
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
