"""Networks as StableHLO, which JAX and other compilers run without this package."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax import export
from jaxtyping import Array

from sop_jax.errors import UserError
from sop_jax.evaluation.views import view_of
from sop_jax.exports.trained import Trained, has_patches
from sop_jax.models import build, nested
from sop_jax.paths import write_whole

FILE = "network.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
MOST_BYTES = 2**31 - 2**27  # a serialized program has less than 2 GiB; the rest is for operations


def write(trained: Trained, folder: epath.Path) -> list[str]:
    """Writes a serialized function that contains the weights, and a README of how to call it.

    It maps uint8 images [b, S, S, 3], for any b, to a dictionary with `features` [b, D] and, if the
    network has patches, `patch_features` [b, h, w, D], in float32.

    Returns:
        Lines for the user.

    Raises:
        UserError: flatbuffers is not installed, the network is too large, or the folder cannot be
            written.
    """
    if importlib.util.find_spec("flatbuffers") is None:  # with which JAX serializes
        raise UserError(
            "--export=stablehlo needs flatbuffers, which is not installed; run: pip install "
            "flatbuffers"
        )
    size = sum(leaf.nbytes for leaf in trained.leaves.values())
    if size > MOST_BYTES:
        raise UserError(
            f"the weights have {size / 2**30:.1f} GiB, but a serialized program can have at most 2 "
            "GiB; export to hf or timm"
        )
    crop = view_of(trained.config).crop
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, crop, crop, 3), jnp.uint8)
    exported = export.export(jax.jit(outputs(trained)), platforms=PLATFORMS)(images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(exported.serialize())
        write_whole(folder / "README.md", _readme(trained, exported))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; choose another --to") from error
    words = []
    if trained.config.model.dtype != "float32":
        words.append(f"it computes in float32, the run in {trained.config.model.dtype}")
    return [*words, f"{folder}: {FILE} for {', '.join(PLATFORMS)}, and README.md"]


def outputs(trained: Trained) -> Any:
    """Returns the function of images that is exported, with the weights in it."""
    config = trained.config.copy_and_resolve_references()
    config.model.dtype = "float32"
    model = build(config, config.augment.global_size)
    params = nested({path: jnp.asarray(leaf) for path, leaf in trained.leaves.items()})
    side = view_of(trained.config).crop // model.patch

    def forward(images: Array) -> dict[str, Array]:
        (tokens,) = model.features(params, images)
        found = {"features": tokens[:, 0].astype(jnp.float32)}
        if has_patches(trained):
            shape = (tokens.shape[0], side, side, tokens.shape[-1])
            found["patch_features"] = tokens[:, 1:].astype(jnp.float32).reshape(shape)
        return found

    return forward


def _readme(trained: Trained, exported: Any) -> str:
    view = view_of(trained.config)
    lines = [
        f"- `{name}`: float32 {list(map(str, leaf.shape))}".replace("'", "")
        for name, leaf in zip(
            sorted({"features", "patch_features"} if has_patches(trained) else {"features"}),
            exported.out_avals,
            strict=True,
        )
    ]
    millions = sum(leaf.size for leaf in trained.leaves.values()) / 1e6
    return f"""# {FILE}

A network of {millions:.3g} M parameters as StableHLO, serialized by JAX {jax.__version__} for
{", ".join(PLATFORMS)}. It needs neither sop_jax nor the weights in another file.

```python
import jax.export
import numpy as np
from PIL import Image

with open("{FILE}", "rb") as file:
    network = jax.export.deserialize(bytearray(file.read()))
image = Image.open("image.jpg").convert("RGB")
scale = {view.resize} / min(image.size)
image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
left, top = (round((side - {view.crop}) / 2) for side in image.size)
image = image.crop((left, top, left + {view.crop}, top + {view.crop}))
outputs = network.call(np.asarray(image)[None])
print(outputs["features"].shape)
```

The input is uint8 [b, {view.crop}, {view.crop}, 3], RGB from 0 to 255, for any number b of images;
the network normalizes them itself. The output is a dictionary:

{chr(10).join(lines)}

`jax.jit(network.call)` compiles it once per number of images. `network.mlir_module()` returns the
StableHLO program as text, and `network.mlir_module_serialized` as portable bytecode, for other
compilers. A program that JAX serializes can be read by later versions of JAX for at least six
months; see JAX's documentation of `jax.export`.
"""
