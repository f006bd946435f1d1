"""Networks as ONNX, converted by jax2onnx in a Python environment of its own.

jax2onnx requires an older Orbax than this package. The environment needs only what `REQUIREMENTS`
lists; `converter.py` runs in it.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from etils import epath

from sop_jax.errors import UserError
from sop_jax.evaluation.views import view_of
from sop_jax.exports.trained import Trained
from sop_jax.weights import files

VARIABLE = "SOP_ONNX_PYTHON"
REQUIREMENTS = "jax2onnx onnxruntime ml-collections etils[epath] safetensors absl-py"
FAMILIES = ("vit", "swin")


def write(trained: Trained, file: epath.Path) -> list[str]:
    """Writes a network as ONNX, after comparing its outputs with those of JAX.

    It maps `images` float32 [B, S, S, 3], with values from 0 to 255, for any B, to `features`
    [B, D] and `patch_features` [B, h, w, D].

    Returns:
        Lines for the user.

    Raises:
        UserError: there is no environment with jax2onnx, the network cannot be converted, or the
            converted network computes something else.
    """
    family = trained.config.model.family
    if family not in FAMILIES:
        raise UserError(
            f"jax2onnx converts a {family} to a network with other features (its max pooling drops "
            "the padding); export to stablehlo, timm or hf"
        )
    if "://" in str(file):
        raise UserError(f"--to={file} is not local; write a local file and copy it")
    python = _python()
    crop = view_of(trained.config).crop
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        files.write(folder / "weights.safetensors", trained.leaves)
        (folder / "settings.json").write_text(json.dumps(_settings(trained)))
        out = _run(python, folder, crop, file.name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            for made in folder.glob(f"{file.name}*"):  # large weights are in a file of their own
                (file.parent / made.name).write_bytes(made.read_bytes())
        except OSError as error:
            raise UserError(f"cannot write {file}: {error}; choose another --to") from error
    words = [f"compared with JAX in onnxruntime: the largest difference is {out['difference']:.1e}"]
    if trained.config.model.dtype != "float32":
        words.append(f"it computes in float32, the run in {trained.config.model.dtype}")
    shape = f"float32 [B, {crop}, {crop}, 3] from 0 to 255"
    return [*words, f"{file}: images {shape} to {', '.join(out['outputs'])}"]


def _settings(trained: Trained) -> dict[str, Any]:
    config = trained.config.to_dict()
    return json.loads(json.dumps(config | {"model": config["model"] | {"dtype": "float32"}}))


def _python() -> str:
    """Returns the interpreter that has jax2onnx.

    Raises:
        UserError: there is none.
    """
    if python := os.environ.get(VARIABLE):
        return python
    if importlib.util.find_spec("jax2onnx") and importlib.util.find_spec("onnxruntime"):
        return sys.executable
    raise UserError(
        "the conversion to ONNX needs jax2onnx, in an environment of its own. Make one by\n"
        f"    python -m venv onnx && onnx/bin/pip install {REQUIREMENTS}\n"
        f"and name its interpreter: {VARIABLE}=onnx/bin/python"
    )


def _run(python: str, folder: epath.Path, crop: int, name: str) -> dict[str, Any]:
    """Runs the converter, and returns what it reports."""
    package = epath.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "JAX_PLATFORMS": "cpu"}
    command = [python, "-m", "sop_jax.exports.converter", str(folder), str(crop), name]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"{VARIABLE}={python} cannot be started: {error.strerror}; name a Python interpreter"
        ) from error
    if done.returncode:
        last = (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()
        reason = next((line for line in reversed(last) if "Error" in line), last[-1])
        reason = reason.removeprefix("sop_jax.errors.UserError: ")
        raise UserError(
            f"{python} could not convert the network: {reason}. If a module is missing, run: "
            f"{python} -m pip install {REQUIREMENTS}"
        )
    return json.loads(done.stdout.splitlines()[-1])
