"""Makes checkpoints of other projects without their code."""

import collections
import io
import pathlib
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


class Named:
    """A class or function that a pickle refers to by name, whether or not it exists."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self) -> None:
        raise AssertionError


class Call:
    """An object that a pickle makes by calling a function."""

    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class Stated:
    """A named object to which a pickle assigns a state, which would change the object itself."""

    def __init__(self, named: Named, state: Any):
        self.named, self.state = named, state


class Storage:
    """The bytes of an array, as a storage of PyTorch."""

    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array


class Pickler(pickle._Pickler):
    """Pickles `Named`, `Stated` and `Storage` as the objects that they represent."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Named):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Stated):
            self.save(obj.named)
            self.save(obj.state)
            self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        kind = Named("torch", STORAGES[obj.array.dtype.name])
        return "storage", kind, obj.key, "cpu", obj.array.size


def pickled(content: Any) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol=2).dump(content)
    return out.getvalue()


def as_torch(content: Any, storages: list[np.ndarray]) -> Any:
    """Returns containers in which arrays are described as by torch.save."""
    if isinstance(content, np.ndarray):
        rebuild = Named("torch._utils", "_rebuild_tensor_v2")
        strides = tuple(step // content.itemsize for step in content.strides)
        base = content if content.base is None else content.base
        base = np.asarray(base)
        same = [i for i, other in enumerate(storages) if other is base]
        if not same:
            storages.append(base)
        place = same[0] if same else len(storages) - 1
        start = content.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        storage = Storage(str(place), base)
        hooks: dict[str, Any] = collections.OrderedDict()
        offset = start // content.itemsize
        return Call(rebuild, storage, offset, content.shape, strides, False, hooks)
    if isinstance(content, dict):
        return type(content)({name: as_torch(part, storages) for name, part in content.items()})
    return content


def save_pth(path: pathlib.Path, content: Any, legacy: bool = False) -> pathlib.Path:
    """Writes a file as torch.save does or, with `legacy`, as it did before version 1.6."""
    storages: list[np.ndarray] = []
    data = pickled(as_torch(content, storages))
    if legacy:
        parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
        parts += [pickle.dumps({"little_endian": True}, 2), data]
        parts += [pickle.dumps([str(place) for place in range(len(storages))], 2)]
        for array in storages:
            parts += [array.size.to_bytes(8, "little"), array.tobytes()]
        path.write_bytes(b"".join(parts))
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for place, array in enumerate(storages):
            archive.writestr(f"archive/data/{place}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def vit(width: int = 32, depth: int = 2, patch: int = 4, rows: int = 17) -> dict[str, np.ndarray]:
    """Returns a ViT under the names that iBOT, DINO and timm share; all its arrays differ."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, rows, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (width,),
            f"blocks.{i}.norm1.bias": (width,),
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.qkv.bias": (3 * width,),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.attn.proj.bias": (width,),
            f"blocks.{i}.norm2.weight": (width,),
            f"blocks.{i}.norm2.bias": (width,),
            f"blocks.{i}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{i}.mlp.fc1.bias": (4 * width,),
            f"blocks.{i}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{i}.mlp.fc2.bias": (width,),
        }
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {name: 0.1 * numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def head(width: int = 32, hidden: int = 24, dim: int = 16) -> dict[str, np.ndarray]:
    """Returns the head of iBOT, including its prototypes."""
    layers = {"0": (hidden, width), "2": (hidden, hidden), "4": (dim, hidden)}
    arrays = {}
    for layer, (outputs, inputs) in layers.items():
        arrays[f"mlp.{layer}.weight"] = 0.1 * numbers(outputs, inputs, seed=int(layer))
        arrays[f"mlp.{layer}.bias"] = 0.1 * numbers(outputs, seed=int(layer))
    return arrays | {
        "last_layer.weight_g": np.ones((8, 1), np.float32),
        "last_layer.weight_v": numbers(8, dim),
    }


def ibot(wrapper: str = "", depth: int = 2, rows: int = 17, hidden: int = 24) -> Any:
    """Returns a backbone and a head under the names of iBOT's checkpoints."""
    backbone = vit(depth=depth, rows=rows) | {"masked_embed": numbers(1, 32, seed=99)}
    named = {f"{wrapper}backbone.{name}": array for name, array in backbone.items()}
    return named | {f"{wrapper}head.{name}": array for name, array in head(hidden=hidden).items()}


def bfloat16(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)


# Weights that no network has, and what the message about them says.
MISSHAPEN: dict[str, tuple[dict[str, np.ndarray | None], tuple[str, ...]]] = {
    "some arrays are missing and some are unknown": (
        {"pos_embed": None, "blocks.0.mlp.fc1.bias": None, "foo.bar": numbers(3)},
        ("missing: pos_embed; blocks.0.mlp.fc1.bias", "unexpected: foo.bar"),
    ),
    "patches of one dimension": (
        {"patch_embed.proj.weight": numbers(64)},
        ("wrong shape: patch_embed.proj.weight is [64]",),
    ),
    "positions of one dimension": (
        {"pos_embed": numbers(1)},
        ("wrong shape: pos_embed is [1]",),
    ),
    "no positions": (
        {"pos_embed": numbers(1, 0, 32)},
        ("wrong shape: pos_embed is [1, 0, 32]",),
    ),
}


def misshapen(kind: str, depth: int) -> dict[str, np.ndarray]:
    """Returns a backbone with one of the defects of MISSHAPEN."""
    changed = vit(depth=depth) | MISSHAPEN[kind][0]
    return {name: array for name, array in changed.items() if array is not None}
