"""Networks as ONNX, converted in an environment of its own."""

import os
import pathlib
import subprocess
import sys

import networks
import numpy as np
import pytest

from sop_jax.convert import convert
from sop_jax.errors import UserError
from sop_jax.network import load

pytestmark = pytest.mark.medium

RUN = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images = np.load(sys.argv[2]).astype(np.float32)
np.savez(sys.argv[3], features=session.run(["features"], {"images": images})[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "registers", "swin"])
def test_onnxruntime_gives_the_features(name: str, tmp_path: pathlib.Path) -> None:
    python = os.environ.get("SOP_ONNX_PYTHON")
    if not python:
        pytest.skip("needs an environment with jax2onnx; set SOP_ONNX_PYTHON to its interpreter")
    run = networks.make(tmp_path, name)
    words = convert(run, tmp_path / "sub" / "f.onnx", "onnx")
    assert "compared with JAX in onnxruntime" in words[-2]
    network = load(run)
    pixels = networks.images(2, network.config.eval.crop)
    np.save(tmp_path / "images.npy", pixels)
    arguments = [tmp_path / "sub" / "f.onnx", tmp_path / "images.npy", tmp_path / "out.npz"]
    subprocess.run([python, "-c", RUN, *map(str, arguments)], check=True, timeout=300)
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["features"], network.features(pixels), atol=1e-4)


def test_what_is_missing_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = networks.make(tmp_path, "vit"), tmp_path / "f.onnx"
    monkeypatch.delenv("SOP_ONNX_PYTHON", raising=False)
    monkeypatch.setattr("sop_jax.exports.onnx.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="(?s)needs jax2onnx.*pip install jax2onnx .*SOP_ONNX_PYT"):
        convert(run, out, "onnx")
    monkeypatch.setenv("SOP_ONNX_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="nothing cannot be started: No such file"):
        convert(run, out, "onnx")
    fails = tmp_path / "python"
    fails.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'jax2onnx'\" >&2\nexit 1"
    )
    fails.chmod(0o755)
    monkeypatch.setenv("SOP_ONNX_PYTHON", str(fails))
    with pytest.raises(UserError, match="No module named 'jax2onnx'. If a module is missing, run"):
        convert(run, out, "onnx")
    assert not out.exists()


def test_networks_that_it_converts_wrongly_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOP_ONNX_PYTHON", sys.executable)
    with pytest.raises(UserError, match="max pooling drops the padding.*export to stablehlo"):
        convert(networks.make(tmp_path, "resnet"), tmp_path / "f.onnx", "onnx")
    with pytest.raises(UserError, match="must end in .onnx for --export=onnx"):
        convert(tmp_path / "vit", tmp_path / "f.safetensors", "onnx")
