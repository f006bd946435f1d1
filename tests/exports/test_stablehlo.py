"""Networks as StableHLO."""

import pathlib

import jax
import jax.export
import networks
import numpy as np
import pytest

from sop_jax.convert import convert
from sop_jax.errors import UserError
from sop_jax.network import load

pytestmark = pytest.mark.medium


@pytest.mark.parametrize("name", networks.NETWORKS | networks.OWN)
def test_any_number_of_images_has_its_features(name: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("flatbuffers", reason="JAX serializes with flatbuffers")
    run = networks.make(tmp_path, name)
    convert(run, tmp_path / "out", "stablehlo")
    content = (tmp_path / "out" / "network.stablehlo").read_bytes()
    exported = jax.export.deserialize(bytearray(content))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    network = load(run)
    pixels = networks.images(3, network.config.eval.crop)
    for count in (1, 3):
        found = exported.call(pixels[:count])
        np.testing.assert_allclose(found["features"], network.features(pixels[:count]), atol=1e-4)
    if network.config.model.family == "resnet":
        assert set(found) == {"features"}
    else:
        np.testing.assert_allclose(
            found["patch_features"], network.patch_features(pixels), atol=1e-4
        )


def test_its_readme_runs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flatbuffers", reason="JAX serializes with flatbuffers")
    from PIL import Image

    run = networks.make(tmp_path, "vit")
    convert(run, tmp_path / "out", "stablehlo")
    monkeypatch.chdir(tmp_path / "out")
    Image.fromarray(networks.images(1, 60)[0][:40]).save("image.jpg")
    readme = pathlib.Path("README.md").read_text()
    assert "- `patch_features`: float32 [b, 6, 6, 32]" in readme
    names: dict[str, object] = {}
    exec(readme.split("```python\n")[1].split("```")[0], names)
    assert capsys.readouterr().out == "(1, 32)\n"
    expected = load(run).features("image.jpg")
    np.testing.assert_allclose(names["outputs"]["features"], expected, atol=1e-4)  # type: ignore[index]


def test_what_is_missing_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = networks.make(tmp_path, "vit")
    monkeypatch.setattr("sop_jax.exports.stablehlo.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs flatbuffers"):
        convert(run, tmp_path / "out", "stablehlo")
    monkeypatch.undo()
    pytest.importorskip("flatbuffers", reason="JAX serializes with flatbuffers")
    monkeypatch.setattr("sop_jax.exports.stablehlo.MOST_BYTES", 100)
    with pytest.raises(UserError, match="can have at most 2 GiB; export to hf or timm"):
        convert(run, tmp_path / "out", "stablehlo")
