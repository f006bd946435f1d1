"""ImageNet-9 from files to accuracies, through heads of a thousand and of nine classes."""

import copy
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from etils import epath
from subjects import SIDE, toolbox, untrained

from sop_jax.data.imagenet9 import open_variant, read_map
from sop_jax.errors import UserError
from sop_jax.evaluation import backgrounds
from sop_jax.evaluation.heads import Head, write_head
from sop_jax.evaluation.tables import text_of
from sop_jax.evaluation.task import View

WIDTH = 16  # of the network's features


def measure(root: pathlib.Path, head: pathlib.Path | str) -> tuple[dict[str, Any], str]:
    """Returns the result and the table of the task."""
    settings = backgrounds.settings()
    settings.update(head=str(head), crop=SIDE)
    config = copy.deepcopy(untrained().config)
    inputs = backgrounds.open_inputs(config, settings, {"path": str(root)})
    result = backgrounds.run(untrained(), inputs, settings, toolbox())
    return result, text_of(backgrounds.table(result, settings))


def write_random(path: pathlib.Path, classes: int, width: int = WIDTH, **fields: Any) -> Head:
    rng = np.random.default_rng(classes)
    weights = rng.normal(size=(classes, width)).astype(np.float32)
    head = Head(weights, np.zeros(classes, np.float32), View(**fields))
    write_head(path, head)
    return head


@pytest.fixture
def imagenet9(tmp_path: pathlib.Path, shared: pathlib.Path) -> pathlib.Path:
    """Real images in the layout of the official release, with two of the variations absent."""
    real, root = shared / "data" / "fixtures" / "imagenet9", tmp_path / "imagenet9"
    shutil.copytree(real / "montage_tiles", root)
    shutil.rmtree(root / "original")
    shutil.copytree(real / "original_like", root / "original")
    shutil.copy(real / "in_to_in9.json", root)
    return root


@pytest.mark.medium
def test_accuracies_of_real_images(imagenet9, tmp_path):
    """Compares with the definition, written as a loop over images."""
    path = tmp_path / "head.npz"
    head = write_random(path, 1000)
    result, text = measure(imagenet9, path)
    to_nine = read_map(imagenet9)
    view = View(resize=SIDE, crop=SIDE)
    for name in backgrounds.VARIANTS:
        images = open_variant(epath.Path(imagenet9 / name / "val"))
        vectors = toolbox().features(images, view).vectors
        right = 0
        for vector, label in zip(vectors, images.labels, strict=True):
            right += to_nine[(head.weights @ vector).argmax()] == label
        assert result[name] == right / len(images)
    assert result["bg_gap"] == result["mixed_same"] - result["mixed_rand"]
    assert f"{100 * result['original']:.2f}" in text and "97.10" in text  # the paper's


@pytest.mark.medium
def test_a_nine_way_head_needs_no_map(imagenet9, tmp_path):
    path = tmp_path / "head.npz"
    bias = np.zeros(9, np.float32)
    bias[5] = 1  # always the insect
    write_head(path, Head(np.zeros((9, WIDTH), np.float32), bias, View()))
    (imagenet9 / "in_to_in9.json").unlink()
    shutil.rmtree(imagenet9 / "mixed_rand")
    result, text = measure(imagenet9, path)
    assert result["original"] == pytest.approx(4 / 36)  # four images of each of nine classes
    assert result["mixed_same"] == result["only_fg"] == 1
    assert result["mixed_rand"] is None and result["bg_gap"] is None
    assert text.splitlines()[3].split()[:2] == ["mixed_rand", "-"]


@pytest.mark.medium
def test_the_first_variant_by_name_is_measured_too(imagenet9, tmp_path):
    """iBOT's loop leaves it out."""
    write_random(tmp_path / "head.npz", 9)
    assert measure(imagenet9, tmp_path / "head.npz")[0]["mixed_next"] is not None


def test_heads_that_do_not_fit(imagenet9, tmp_path):
    path = tmp_path / "head.npz"
    with pytest.raises(UserError, match="eval.head is not set. .* --task=linear"):
        measure(imagenet9, "")
    with pytest.raises(UserError, match="there is no head"):
        measure(imagenet9, path)
    write_random(path, 1000, width=24)
    with pytest.raises(UserError, match="is for 24 features, but this network has 16"):
        measure(imagenet9, path)
    write_random(path, 1000, width=WIDTH, pool="cls_patches")
    with pytest.raises(UserError, match="has 32 .layers=1, pool=cls_patches"):
        measure(imagenet9, path)
    write_random(path, 10)
    with pytest.raises(UserError, match="has 10 classes. Expected ImageNet's 1000 or"):
        measure(imagenet9, path)


@pytest.mark.medium
def test_data_that_is_missing(tmp_path):
    write_random(tmp_path / "head.npz", 9)
    with pytest.raises(UserError, match="none of the variants of ImageNet-9"):
        measure(tmp_path, tmp_path / "head.npz")
    with pytest.raises(UserError, match="is not a folder. Expected ImageNet-9"):
        measure(tmp_path / "nowhere", tmp_path / "head.npz")
    write_random(tmp_path / "head.npz", 1000)
    with pytest.raises(UserError, match="in_to_in9.json, which a head of 1000 classes needs"):
        measure(tmp_path, tmp_path / "head.npz")
