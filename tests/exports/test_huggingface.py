"""Folders for transformers."""

import json
import pathlib
from typing import Any

import networks
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sop_jax import __version__
from sop_jax.convert import convert
from sop_jax.data.augment import eval_image
from sop_jax.errors import UserError
from sop_jax.models import MEAN, STD
from sop_jax.network import load
from sop_jax.pretrained import fingerprint, load_network

pytestmark = pytest.mark.medium

TOLERANCE = 2e-4  # absolute; features have unit scale


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return networks.make(tmp_path_factory.mktemp("runs"), "vit")


def test_a_folder_describes_the_network_and_its_images(
    vit: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = convert(vit, tmp_path / "hf", "hf")
    assert "positions resized from images of 16 to 24 pixels, eval.crop" in words
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    ]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("vit", ["ViTModel"])
    assert (config["hidden_size"], config["image_size"], config["patch_size"]) == (32, 24, 4)
    assert config["layer_norm_eps"] == 1e-6
    arrays = load_file(tmp_path / "hf" / "model.safetensors")
    assert arrays["embeddings.position_embeddings"].shape == (1, 37, 32)
    np.testing.assert_array_equal(arrays["pooler.dense.weight"], np.eye(32))
    images = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (images["size"], images["crop_size"]) == (
        {"shortest_edge": 24},
        {"height": 24, "width": 24},
    )
    assert (images["image_mean"], images["image_std"]) == (list(MEAN), list(STD))


def test_the_model_card_has_data_settings_and_results_but_no_paths(
    vit: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (vit / "data.json").write_text('{"train": {"images": 90, "names": "x"}, "test": null}')
    (vit / "evaluations").mkdir()
    config, _, params, _ = load_network(vit)
    own = {"of": "the teacher of anywhere, step 7", "fingerprint": fingerprint(config, params)}
    results = {"top1": 0.75, "k": {"20": 0.5}, "files": ["a"]}
    others = {"of": "another", "fingerprint": "0" * 16}
    for name, weights in (("knn", own), ("linear", others), ("logistic", None)):
        record = {"task": name, "step": 7, "results": results, "weights": weights}
        (vit / "evaluations" / f"{name}_7_x.json").write_text(json.dumps(record))
    (vit / "evaluations" / "damaged.json").write_text("{")
    (vit / "summary.json").write_text('{"steps": 7, "knn_top1": 0.25}')
    convert(vit, tmp_path / "hf", "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "digits: 90 images to train on." in card
    assert "| `batch_size` | 8 |" in card and "| `sop.cls.memory` | 64 |" in card
    assert "| knn: top1 | 0.75 |" in card and "| knn: k.20 | 0.5 |" in card
    assert "| k-NN accuracy during training | 0.25 |" in card
    assert "linear:" not in card and "logistic:" not in card
    assert str(vit.parent) not in card
    words = " ".join(card.split())
    assert f"with sop_jax {__version__}: the teacher after step 7." in words
    assert "A ViT/4 (width 32, depth 2, heads 2) that" in words
    assert "model.window" not in card and "`epochs`" not in card
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps(config | {"version": "0.5.0"}))
    (vit / "evaluations" / "knn_7_x.json").unlink()  # the student is still equal to the teacher
    convert(vit, tmp_path / "student", "hf", key="student")
    card = (tmp_path / "student" / "README.md").read_text()
    words = " ".join(card.split())
    assert "with sop_jax 0.5.0: the student after step 7." in words
    assert "There are no measurements of this network." in words
    assert "knn:" not in card and "during training" not in card


def test_transformers_needs_a_network_that_it_has(tmp_path: pathlib.Path) -> None:
    run = networks.make(tmp_path, "vit")
    with pytest.raises(UserError, match="hf4 is now --export=hf: versions 4 and 5"):
        convert(run, tmp_path / "f.safetensors", "hf4")
    with pytest.raises(UserError, match=r"ends in .safetensors; .* another --export: timm, ibot"):
        convert(run, tmp_path / "f.safetensors", "hf")
    with pytest.raises(UserError, match="no ResNet with the stem of model.stem=small; export"):
        convert(networks.make(tmp_path, "small stem"), tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UserError, match="give a new or empty folder"):
        convert(run, tmp_path / "full", "hf")


@pytest.mark.filterwarnings("ignore")  # those of the other project
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_auto_classes_load_it_as_it_stands(
    name: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    run = networks.make(tmp_path, name)
    convert(run, tmp_path / "hf", "hf")
    network = load(run)
    crop = network.config.eval.crop
    pixels = networks.images(2, crop)
    theirs, told = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    normalized = ((pixels / 255 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        found = theirs(torch.tensor(normalized))
    if name != "mean":
        pooled = found.pooler_output.numpy().reshape(2, -1)
        np.testing.assert_allclose(pooled, network.features(pixels), atol=TOLERANCE)
    else:
        mean = found.last_hidden_state[:, 1:].mean(1).numpy()
        np.testing.assert_allclose(mean, network.features(pixels), atol=TOLERANCE)

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    photo = Image.fromarray(networks.images(1, 90)[0][:60])
    values = processor(photo, return_tensors="pt").pixel_values.numpy()
    view = eval_image(np.asarray(photo), network.config.eval.resize, crop)
    expected = ((view / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert values.shape == (1, 3, crop, crop)
    assert np.abs(values[0] - expected).max() < 3 / 255 / min(STD)  # three grey levels
