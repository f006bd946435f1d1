"""Trained networks for programs and notebooks: images in, NumPy arrays out.

import sop_jax
network = sop_jax.load("runs/mine")
features = network.features("photos")  # float32 [n, D]
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from etils import epath
from jaxtyping import Array, Float32
from ml_collections import config_dict

from sop_jax.data.decode import Decoding, decoding
from sop_jax.data.folders import FolderSource
from sop_jax.data.given import GivenImages, Images, names_of, open_given
from sop_jax.data.pipeline import eval_batches
from sop_jax.errors import UserError
from sop_jax.evaluation.features import own_rows, pooled
from sop_jax.evaluation.views import view_of
from sop_jax.models import FAMILIES, Model, Params, build
from sop_jax.monitor.corrupt import lines_of, print_corrupt
from sop_jax.parallel.mesh import make_mesh, replicated, split, to_devices
from sop_jax.paths import expand
from sop_jax.pretrained import load_network, network_of_file
from sop_jax.rules import COUNT
from sop_jax.weights.files import index_of

SILENT = 5.0  # seconds until a bar shows the progress

Named = tuple[np.ndarray, list[str]]


class Network:
    """A trained network as functions of images; `load` returns one.

    Images are given as a path, a Pillow image, the bytes of an image file, a uint8 array [h, w, 3]
    (or [h, w] or [h, w, 1] if it is grey, or [h, w, 4] with alpha, which is dropped), a list of
    these or an array of paths, several images as one uint8 array [n, h, w, 3], or a folder. They
    are decoded, scaled and cropped as `python -m sop_jax.extract` does, by the settings of the run.

    Rows are in the order of the images; those of a folder are sorted by name. An image of a folder
    that cannot be read has no row and is listed on stderr; any other such image is an error. With
    `names=True`, the names of the rows are returned too: paths relative to the folder, paths as
    they were given, or numbers such as `[3]`.

    A program is compiled when it is first needed, for batches of `batch_size` images, of which the
    last one is padded. If there are fewer images, a smaller batch is compiled, whose size is a
    power of two for each device.

    Attributes:
        config: the settings of the network's run; they cannot be changed.
        name: describes the network.
        step: the step of the checkpoint; None for a file of weights.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        params: Params,
        name: str,
        step: int | None = None,
        batch_size: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Places a network on devices.

        Args:
            config: the settings of its run.
            params: its parameters.
            name: describes it.
            step: the step of the checkpoint.
            batch_size: the most images that are computed at a time; `eval.batch_size` of the run by
                default.
            devices: the devices of this process to use; all of them by default.

        Raises:
            UserError: the batch size is less than 1, or the list of devices is empty.
        """
        _check_size_and_devices(batch_size, devices)
        self.config = config_dict.FrozenConfigDict(config)
        self.name, self.step = name, step
        self._data, self._view = config.data, view_of(config)
        self._model = build(config, config.augment.global_size)
        self._mesh = make_mesh(devices=list(devices or jax.local_devices()))
        self._params = jax.device_put(jax.tree.map(_local, params), replicated(self._mesh))
        self._batch_size = batch_size or config.eval.batch_size
        self._programs: dict[str, Callable[[Params, Array], Array]] = {}

    def __repr__(self) -> str:
        return f"<sop_jax.Network: {self.name}>"

    @overload
    def features(self, images: Images, names: Literal[False] = False) -> np.ndarray: ...
    @overload
    def features(self, images: Images, names: Literal[True]) -> Named: ...
    def features(self, images: Images, names: bool = False) -> np.ndarray | Named:
        """Returns the features of images, which `python -m sop_jax.extract` writes.

        Args:
            images: the images, see `Network`.
            names: whether to return the names of the rows too.

        Returns:
            float32 [n, D], one row per image: [CLS] after the final norm, or the mean of the
            patches for a network whose image token that is. With `names`, also n names.

        Raises:
            UserError: the images are not of a known kind, or cannot be read.
        """
        return self._run("features", _features(self._model, self._view), images, names)

    @overload
    def patch_features(self, images: Images, names: Literal[False] = False) -> np.ndarray: ...
    @overload
    def patch_features(self, images: Images, names: Literal[True]) -> Named: ...
    def patch_features(self, images: Images, names: bool = False) -> np.ndarray | Named:
        """Returns the features of the patches of images after the final norm.

        Args:
            images: the images, see `Network`.
            names: whether to return the names of the rows too.

        Returns:
            float32 [n, h, w, D] for the h x w patches of each image. With `names`, also n names.

        Raises:
            UserError: the images are not of a known kind or cannot be read, or the network has no
                patches.
        """
        side = self._grid("patch_features")
        return self._run("patches", _patches(self._model, self._view, side), images, names)

    @overload
    def attention(self, images: Images, names: Literal[False] = False) -> np.ndarray: ...
    @overload
    def attention(self, images: Images, names: Literal[True]) -> Named: ...
    def attention(self, images: Images, names: bool = False) -> np.ndarray | Named:
        """Returns how much the last layer attends to each patch, in each head.

        These are the attention weights of [CLS]. In a network that represents an image by the mean
        of its patches, they are the mean over the weights of all patches. [CLS] and registers also
        receive attention, so that the weights of an image may sum to less than 1.

        Args:
            images: the images, see `Network`.
            names: whether to return the names of the rows too.

        Returns:
            float32 [n, heads, h, w] for the h x w patches of each image. With `names`, also n
            names.

        Raises:
            UserError: the images are not of a known kind or cannot be read, or the network has no
                attention.
        """
        side = self._grid("attention")
        forward = _attention(self._model, self.config.model, side)
        return self._run("attention", forward, images, names)

    def open(self, images: Images) -> tuple[FolderSource | GivenImages, Decoding]:
        """Returns images as a source, and how they are decoded.

        Raises:
            UserError: the images are not of a known kind.
        """
        upright = self._data.orientation != "ignore"  # as files of folders are
        given = decoding(self._data, FolderSource("", [], None, None))._replace(upright=upright)
        return open_given(images, given), given

    def _grid(self, what: str) -> int:
        """Returns the number of patches on each side of an image."""
        family = self.config.model.family
        if not FAMILIES[family].patches:
            raise UserError(
                f"{self.name} has model.family={family}, which has no patches, so that "
                f"{what}() has no result; use features(), or another network"
            )
        return self._view.crop // self._model.patch

    def _run(
        self, name: str, forward: Callable[[Params, Array], Array], images: Images, names: bool
    ) -> Any:
        source, how = self.open(images)
        for note in getattr(source, "notes", []):
            print(note, file=sys.stderr)
        if name not in self._programs:
            self._programs[name] = jax.jit(forward, out_shardings=split(self._mesh))
        rows, read, corrupt = self._rows(self._programs[name], source, how)
        if corrupt and not isinstance(source, FolderSource):
            lines = lines_of(source, corrupt, how)
            raise UserError(
                "\n  ".join([f"{len(corrupt)} of {len(source)} images cannot be read:", *lines])
                + "\nRepair or convert them, or leave them out"
                + "; settings such as data.white are those of the network's run, and cannot be "
                "changed here: pass such images as uint8 arrays"
                * any("data." in line for line in lines)
            )
        print_corrupt(source, corrupt, how)
        if not len(rows):
            raise UserError(
                f"none of the {len(source)} images can be read, for the reasons listed above; give "
                "images in a format that Pillow can read"
            )
        everything = names_of(source)
        return (rows, [everything[i] for i in read]) if names else rows

    def _rows(
        self, program: Callable[[Params, Array], Array], source: Any, how: Decoding
    ) -> tuple[np.ndarray, list[int], list[int]]:
        """Returns the rows of the images that can be read, and which can be read and which not."""
        view, size = self._view, self._size(len(source))
        rows: list[np.ndarray] = []
        read: list[int] = []
        pending: tuple[Array, np.ndarray] | None = None

        def keep(made: Array, valid: np.ndarray) -> None:
            rows.append(own_rows({"rows": made})["rows"][valid])

        batches = eval_batches(source, view.resize, view.crop, size, how, view.interpolation)
        bar = tqdm.tqdm(total=len(source), unit="image", dynamic_ncols=True, delay=SILENT)
        with bar:
            for batch in batches:
                valid = batch["valid"]
                read += batch["index"][valid].tolist()
                images = to_devices(self._mesh, {"images": batch["image"]})["images"]
                before, pending = pending, (program(self._params, images), valid)
                if before is not None:  # fetched while the devices compute the next batch
                    keep(*before)
                bar.update(min(size, len(source) - bar.n))
            if pending is not None:
                keep(*pending)
        corrupt = sorted(set(range(len(source))) - set(read))
        return np.concatenate(rows), read, corrupt

    def _size(self, images: int) -> int:
        """Returns the size of the batches for a number of images."""
        devices = self._mesh.devices.size
        size = devices
        while size < min(images, self._batch_size):
            size *= 2
        return min(size, -(-self._batch_size // devices) * devices)


def load(
    path: epath.PathLike,
    *,
    step: int | None = None,
    key: str | None = None,
    heads: int | None = None,
    positions: str | None = None,
    prefix: str | None = None,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Network:
    """Loads the network of a run, of a conversion, or of a file of weights.

    Args:
        path: the workdir of a run, a folder that `sop_jax.convert` created, or a `.pth`,
            `.safetensors` or `.npz` file of another project; local or `gs://`.
        step: the step of the checkpoint of a run; the newest by default.
        key: which of several networks, `teacher` or `student`, or for a file a part of the prefix
            of its names; the teacher by default.
        heads: the number of heads of a ViT in a file whose size has no name.
        positions: the rule for resizing positions of a file, if not that of the file's project.
        prefix: the prefix of the network's names in a file, if it is not found otherwise.
        batch_size: the most images that are computed at a time, which bounds the memory;
            `eval.batch_size` of the run by default.
        devices: the devices to use, such as `jax.local_devices()[:1]`; by default all devices of
            this process.

    Raises:
        UserError: there is no network there, it cannot be read, or an argument is invalid.
    """
    _check_size_and_devices(batch_size, devices)
    place = epath.Path(expand(str(path)))
    if not place.exists():
        raise UserError(
            f"there is no file or folder {place}; give the folder of a run, or a file of weights"
        )
    if place.is_dir():
        place = index_of(place) or place
    if place.is_dir():
        given = {"heads": heads, "positions": positions, "prefix": prefix}
        for name, value in given.items():
            if value is not None:
                raise UserError(
                    f"{name} is for files of weights, but {place} is a folder whose config.json "
                    f"sets it; leave out {name}"
                )
        network = key or "teacher"
        config, _, params, step = load_network(place, step, network)
        return Network(
            config, params, f"the {network} of {place}, step {step}", step, batch_size, devices
        )
    if step is not None:
        raise UserError(
            f"step={step} is for folders with checkpoints, but {place} is a file; leave out step"
        )
    config, params, absent, words = network_of_file(place, key, prefix, heads, positions, False)
    lines = [*words, *([f"absent: {', '.join(absent)}"] if absent else [])]
    print("\n  ".join([f"{place}:", *lines]), file=sys.stderr)
    return Network(config, params, str(place), None, batch_size, devices)


def _check_size_and_devices(batch_size: int | None, devices: Sequence[jax.Device] | None) -> None:
    if batch_size is not None and not COUNT.fits(batch_size):
        raise UserError(
            f"batch_size is {batch_size!r}; expected the most images at a time, {COUNT.expected}, "
            "or None for eval.batch_size of the run"
        )
    if devices is not None and not len(devices):
        raise UserError("devices is empty; give at least one, or None for all of this process")


def _local(leaf: Any) -> Any:
    """Returns the copy of a replicated array that is on a device of this process."""
    return leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf


# Programs, as functions of parameters and uint8 images [B, H, W, 3]


def _features(model: Model, view: Any) -> Callable[[Params, Array], Float32[Array, "B D"]]:
    return lambda params, images: pooled(model, params, images, view)[0]


def _patches(model: Model, view: Any, side: int) -> Callable[[Params, Array], Array]:
    def forward(params: Params, images: Array) -> Float32[Array, "B h w D"]:
        patches = pooled(model, params, images, view)[1]
        return patches.reshape(len(images), side, side, -1)

    return forward


def _attention(model: Model, config: Any, side: int) -> Callable[[Params, Array], Array]:
    def forward(params: Params, images: Array) -> Float32[Array, "B heads h w"]:
        weights = model.attention(params, images)  # of a ViT: [CLS], registers, patches
        to_patches = weights[..., -side * side :]
        if config.family == "vit" and config.pool == "cls":
            found = to_patches[:, :, 0]
        else:
            found = to_patches[:, :, -side * side :].mean(axis=2)
        return found.astype(jnp.float32).reshape(*found.shape[:2], side, side)

    return forward
