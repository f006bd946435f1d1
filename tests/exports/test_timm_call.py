"""The call of timm that loads an exported file."""

import ast
import math
import pathlib

import checkpoints
import networks
import numpy as np
import pytest
from checkpoints import save_pth
from etils import epath
from runs import make_config

from sop_jax.convert import convert
from sop_jax.exports import timm
from sop_jax.exports.trained import Trained
from sop_jax.models import MEAN, STD
from sop_jax.network import load

pytestmark = pytest.mark.medium


def call_of(words: list[str]) -> str:
    (line,) = (word for word in words if word.startswith("load it with: "))
    return line.removeprefix("load it with: ")


def test_the_call_has_the_sizes_of_the_network(tmp_path: pathlib.Path) -> None:
    call = call_of(convert(networks.make(tmp_path, "vit"), tmp_path / "f.safetensors", "timm"))
    assert call.startswith("timm.create_model('vit_small_patch16_224', img_size=16, patch_size=4,")
    assert call.endswith(f", checkpoint_path='{tmp_path}/f.safetensors')")
    arguments = ast.parse(call, mode="eval").body.keywords  # type: ignore[attr-defined]
    given = {x.arg: ast.literal_eval(x.value) for x in arguments}
    assert given["num_classes"] == 0
    assert given["pretrained_cfg_overlay"] == {
        "input_size": (3, 24, 24),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (110, 96), (49, 40), (333, 320)])
def test_timm_scales_images_as_the_run_does(resize: int, crop: int) -> None:
    config = make_config(**{"eval.resize": resize, "eval.crop": crop})
    trained = Trained(config, {}, epath.Path("nowhere"), None, [])
    share = timm._preprocessing(trained, crop)["crop_pct"]
    assert math.floor(crop / share) == resize


def test_heads_that_a_file_does_not_show_are_asked_for(tmp_path: pathlib.Path) -> None:
    file = save_pth(tmp_path / "f.pth", checkpoints.vit())
    words = convert(file, tmp_path / "f.safetensors", "timm")
    assert "num_heads=HEADS," in call_of(words)
    assert words[-1].startswith("HEADS is the number of attention heads")
    words = convert(file, tmp_path / "g.safetensors", "timm", heads=2)
    assert "num_heads=2," in call_of(words)
    small = save_pth(tmp_path / "s.pth", checkpoints.vit(width=192, depth=12))
    words = convert(small, tmp_path / "s.safetensors", "timm")
    assert "num_heads=3," in call_of(words)


@pytest.mark.filterwarnings("ignore")  # those of the other project
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_call_gives_the_features(name: str, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("timm")
    run = networks.make(tmp_path, name)
    call = call_of(convert(run, tmp_path / "f.safetensors", "timm"))
    theirs = eval(call, {"timm": library}).eval()
    images = library.data.resolve_data_config(model=theirs)
    assert (images["mean"], images["std"], images["interpolation"]) == (MEAN, STD, "bicubic")
    network = load(run)
    size = network.config.augment.global_size
    pixels = networks.images(2, size)
    network = load(run)
    normalized = ((pixels / 255 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        found = theirs(torch.tensor(normalized)).numpy()
    if network.config.eval.crop == size:
        np.testing.assert_allclose(found, network.features(pixels), atol=2e-4)
