"""Converts a network to ONNX; runs in the environment that has jax2onnx.

    python -m sop_jax.exports.converter FOLDER CROP NAME

FOLDER has settings.json and weights.safetensors; NAME, such as network.onnx, is written to it. The
last line of the output is JSON with `difference`, the largest one between the outputs of
onnxruntime and JAX, and `outputs`.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from safetensors.numpy import load_file

from sop_jax.errors import UserError
from sop_jax.models import build, nested

TOLERANCE = 1e-3  # of the largest output
IMAGES = 3  # to compare


def main() -> None:
    """Converts the network of the folder on the command line."""
    import onnxruntime
    from jax2onnx import to_onnx

    folder, crop = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    file = folder / sys.argv[3]
    forward = _forward(folder, crop)
    to_onnx(
        forward,
        inputs=[("B", crop, crop, 3)],
        input_names=["images"],
        output_names=["features", "patch_features"],
        model_name="network",
        return_mode="file",
        output_path=str(file),
    )
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, crop, crop, 3)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options)
    expected = [np.asarray(x) for x in forward(jnp.asarray(images))]
    difference = 0.0
    for count in (1, IMAGES):  # the batch is dynamic
        found = session.run(None, {"images": images[:count]})
        for ours, theirs in zip(expected, found, strict=True):
            difference = max(difference, float(np.abs(ours[:count] - theirs).max()))
    largest = max(float(np.abs(x).max()) for x in expected)
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"the converted network differs by {difference:.1e} where the largest "
            f"output is {largest:.1e}"
        )
    outputs = [x.name for x in session.get_outputs()]
    print(json.dumps({"difference": difference, "outputs": outputs}))


def _forward(folder: pathlib.Path, crop: int) -> Any:
    """Returns the function to convert."""
    config = ml_collections.ConfigDict(json.loads((folder / "settings.json").read_text()))
    model = build(config, config.augment.global_size)
    leaves = load_file(folder / "weights.safetensors")
    params = nested({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
    side = crop // model.patch

    def several(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        (tokens,) = model.features(params, images)
        patches = tokens[:, 1:].reshape(tokens.shape[0], side, side, tokens.shape[-1])
        return tokens[:, 0], patches

    def one(image: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, patches = several(image[None])
        return features[0], patches[0]

    if config.model.family == "swin":  # its windows mix with a batch of unknown size
        return lambda images: jax.lax.map(one, images)
    return several


if __name__ == "__main__":
    main()
