"""Encoded images end to end in one .npz."""

import functools
import hashlib
from typing import Any

import numpy as np
from etils import epath

from sop_jax.errors import UserError


class PackedSource:
    """Encoded images end to end in a .npz: {split}_blob uint8, {split}_offsets [n + 1].

    {split}_labels [n] and class_names may be there too.
    """

    def __init__(self, path: str, split: str) -> None:
        self.path, self.split = path, split

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        with epath.Path(self.path).open("rb") as file, np.load(file) as packed:
            wanted = [f"{self.split}_{part}" for part in ("blob", "offsets", "labels")]
            arrays = {name: packed[name] for name in (*wanted, "class_names") if name in packed}
        blob, offsets = arrays[wanted[0]], arrays[wanted[1]]
        ascending = len(offsets) > 1 and bool(np.all(np.diff(offsets) >= 0))
        if not ascending or offsets[0] < 0 or offsets[-1] > len(blob):
            raise UserError(
                f"{self.path} is damaged: {wanted[1]} does not cut {wanted[0]} into records. "
                "Copy or make the file again."
            )
        return arrays

    def __getstate__(self) -> dict[str, str]:
        return dict(path=self.path, split=self.split)

    def __len__(self) -> int:
        return len(self._arrays[f"{self.split}_offsets"]) - 1

    def __getitem__(self, index: int) -> bytes:
        start, end = self._arrays[f"{self.split}_offsets"][index : index + 2]
        return self._arrays[f"{self.split}_blob"][start:end].tobytes()

    def name(self, index: int) -> str:
        """File, split and number."""
        return f"{self.path}:{self.split}[{index}]"

    @property
    def labels(self) -> np.ndarray | None:
        """The {split}_labels of the file, int32 [n], or None."""
        labels = self._arrays.get(f"{self.split}_labels")
        return None if labels is None else labels.astype(np.int32)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the labels in order, or None."""
        names = self._arrays.get("class_names")
        return None if names is None else [str(name) for name in names]

    @property
    def digest(self) -> str:
        """Of the sizes of the records and their labels."""
        sizes = np.diff(self._arrays[f"{self.split}_offsets"]).astype(np.int64).tobytes()
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hashlib.sha256(sizes + labels).hexdigest()[:12]


def open_packed(data_config: Any, split: str) -> PackedSource | None:
    """The split that `open_source` asks for; None where there is no test split."""
    path, name = str(data_config.path), getattr(data_config, f"{split}_split")
    if not epath.Path(path).is_file():
        raise UserError(f"There is no file {path}. Set --config.data.path to a packed .npz.")
    try:
        with epath.Path(path).open("rb") as file, np.load(file) as packed:
            keys = set(packed.files)
    except Exception as error:  # zip, pickle and value errors, as the bytes happen to be
        raise UserError(f"{path} is no .npz file ({error}). Set --config.data.path.") from error
    if f"{name}_blob" not in keys or f"{name}_offsets" not in keys:
        if split == "test":
            return None
        raise UserError(
            f"{path} has no {name}_blob and {name}_offsets; it holds {', '.join(sorted(keys))}. "
            "Set --config.data.train_split to the name of a split that is there."
        )
    source = PackedSource(path, name)
    len(source)  # a damaged file is reported now
    return source
