"""Networks as functions of images, for programs."""

import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import save_pth, vit
from PIL import Image
from runs import APART, make_run

import sop_jax
from sop_jax.convert import convert
from sop_jax.errors import UserError
from sop_jax.extract import export, open_images
from sop_jax.network import Network, load
from sop_jax.pretrained import load_network

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_package_imports_jax_only_when_it_is_used() -> None:
    code = (
        "import sys, sop_jax, sop_jax.errors; names = dir(sop_jax); "
        "assert {*sop_jax.__all__} <= {*names}; assert 'jax' not in sys.modules; "
        "assert not hasattr(sop_jax, 'nothing'); assert sop_jax.UserError; "
        "assert 'jax' not in sys.modules; from sop_jax import config, load, neighbours; "
        "import sop_jax.nearest, sop_jax.network; assert callable(sop_jax.neighbours); "
        "assert callable(sop_jax.load); assert 'jax' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_what_its_module_has() -> None:
    for name in sop_jax.__all__:
        assert getattr(sop_jax, name) is not None
    for name, module in sop_jax._MODULES.items():
        assert name in sop_jax.__all__
        assert not (ROOT / "sop_jax" / f"{name}.py").exists(), f"{module} would be replaced"
        assert not (ROOT / "sop_jax" / name).exists()
    assert sop_jax.load is load


def arrays(colour_tree: pathlib.Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted(colour_tree.rglob("*.png"))]


@pytest.mark.medium
def test_features_are_those_of_the_command(
    small_run: pathlib.Path, small_network: Network, colour_tree: pathlib.Path
) -> None:
    export(small_run, open_images([str(colour_tree)]), colour_tree / "f.npz", patches=True)
    with np.load(colour_tree / "f.npz") as found:
        expected = dict(found)
    features, names = small_network.features(colour_tree, names=True)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, expected["features"])
    assert names == expected["names"].tolist()
    patches = small_network.patch_features(str(colour_tree))
    assert patches.shape == (10, 4, 4, 32) and patches.dtype == np.float32
    np.testing.assert_array_equal(
        patches.reshape(10, 16, 32).astype(np.float16), expected["patch_features"]
    )
    assert (small_network.step, small_network.config.augment.global_size) == (7, 16)
    assert not np.allclose(load(small_run, step=3).features(colour_tree), features)
    assert repr(small_network) == f"<sop_jax.Network: the teacher of {small_run}, step 7>"


@pytest.mark.medium
def test_arrays_files_and_pillow_images_have_the_features_of_the_folder(
    small_network: Network, colour_tree: pathlib.Path
) -> None:
    expected = small_network.features(colour_tree)
    files = sorted(colour_tree.rglob("*.png"))
    given: list[Any] = [
        arrays(colour_tree),
        np.stack(arrays(colour_tree)),
        files,
        [Image.open(f) for f in files],
    ]
    for images in given:
        np.testing.assert_array_equal(small_network.features(images), expected)
    backwards, names = small_network.features(files[::-1], names=True)
    np.testing.assert_array_equal(backwards, expected[::-1])
    assert names == [str(file) for file in files[::-1]]
    # One image is a batch of its own size, whose sums may be rounded in another way.
    for one in (files[3], arrays(colour_tree)[3], files[3].read_bytes()):
        np.testing.assert_allclose(small_network.features(one), expected[3:4], atol=1e-5)


@pytest.mark.medium
def test_the_last_batch_compiles_nothing(small_run: pathlib.Path, small_network: Network) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 20, 20, 3), dtype=np.uint8)
    own = load(small_run, batch_size=8)
    found = own.features(images)
    program = own._programs["features"]
    assert program._cache_size() == 1  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, small_network.features(images), atol=1e-5)
    own.features(images[:9])
    assert program._cache_size() == 1  # type: ignore[attr-defined]


@pytest.mark.medium
def test_one_device_gives_what_all_give(small_run: pathlib.Path, small_network: Network) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    own = load(small_run, devices=jax.local_devices()[3:4])
    (leaf, *_) = jax.tree.leaves(own._params)
    assert leaf.devices() == {jax.local_devices()[3]}
    np.testing.assert_allclose(own.features(images), small_network.features(images), atol=1e-5)


@pytest.mark.medium
def test_attention_is_that_of_the_image_token(
    small_run: pathlib.Path,
    small_network: Network,
    colour_tree: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    _, model, params, _ = load_network(small_run)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    weights = np.asarray(model.attention(params, jnp.asarray(images)))
    found = small_network.attention(images)
    assert found.shape == (3, 2, 4, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found.reshape(3, 2, 16), weights[:, :, 0, 1:], atol=1e-6)
    assert (found.sum((2, 3)) < 1).all()
    make_run(tmp_path / "mean", **APART, **{"model.pool": "mean", "model.registers": 2})
    mean = load(tmp_path / "mean")
    _, model, params, _ = load_network(tmp_path / "mean")
    weights = np.asarray(model.attention(params, jnp.asarray(images)))
    expected = weights[:, :, 3:, 3:].mean(axis=2)
    np.testing.assert_allclose(mean.attention(images).reshape(3, 2, 16), expected, atol=1e-6)


@pytest.mark.medium
def test_unreadable_images_are_left_out_of_folders_and_refused_in_lists(
    small_network: Network, colour_tree: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = small_network.features(colour_tree)
    (colour_tree / "red" / "red1.png").write_bytes(b"no image")
    (colour_tree / "notes.txt").write_text("")
    features, names = small_network.features(colour_tree, names=True)
    np.testing.assert_array_equal(features, np.delete(expected, 6, axis=0))
    assert len(names) == 9 and "red/red1.png" not in names
    shown = capfd.readouterr().err
    assert "1 image cannot be read" in shown and "red/red1.png: it is not an image" in shown
    assert "ignored 1 .txt" in shown or ".txt" in shown
    files = [colour_tree / "red" / "red0.png", colour_tree / "red" / "red1.png", b"nothing"]
    with pytest.raises(UserError, match=r"(?s)^2 of 3 images .*red1.png: it is not.*\[2\]: it is"):
        small_network.features(files)
    for file in colour_tree.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 10 images can be read"):
        small_network.features(colour_tree)


@pytest.mark.medium
def test_a_file_of_weights_is_a_network_too(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = save_pth(tmp_path / "f.pth", vit(depth=1))
    convert(file, tmp_path / "net", heads=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    of_file = load(file, heads=2)
    assert of_file.step is None and "loaded: " in capfd.readouterr().err
    np.testing.assert_array_equal(of_file.features(images), load(tmp_path / "net").features(images))
    with pytest.raises(UserError, match=r"step=3 is for folders .* is a file"):
        load(file, step=3)
    with pytest.raises(UserError, match=r"heads is for files .* leave out heads"):
        load(tmp_path / "net", heads=2)


@pytest.mark.medium
def test_a_network_without_patches_says_so(tmp_path: pathlib.Path) -> None:
    changes = {"model.family": "resnet", "model.size": "custom", "model.stage_depths": (1, 1, 1, 1)}
    make_run(tmp_path, **changes)
    network = load(tmp_path)
    image = np.zeros((16, 16, 3), np.uint8)
    assert network.features(image).ndim == 2
    with pytest.raises(UserError, match=r"has no patches, so that attention\(\) has no result"):
        network.attention(image)
    with pytest.raises(UserError, match=r"so that patch_features\(\) has no result"):
        network.patch_features(image)


@pytest.mark.medium
def test_only_a_network_of_the_run_is_loaded(
    small_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert "the student of" in load(small_run, key="student").name
    with pytest.raises(UserError, match="no network 'foo' in .*: teacher, student"):
        load(small_run, key="foo")
    with pytest.raises(UserError, match="no network 'foo' in .*: teacher, student"):
        convert(small_run, tmp_path / "net", key="foo")
    assert not (tmp_path / "net").exists()


@pytest.mark.medium
def test_pillow_images_without_a_known_white_say_what_helps(small_network: Network) -> None:
    image = Image.fromarray(np.ones((20, 20), np.float32))
    with pytest.raises(UserError, match=r"(?s)\[0\]: .*which of .*pass such images as uint8"):
        small_network.features(image)
    with pytest.raises(UserError, match="leave them out$"):
        small_network.features(b"no image")


@pytest.mark.parametrize("size", [0, -1, True])
def test_sizes_and_devices_are_checked_first(size: int, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=f"batch_size is {size!r}; expected .* of 1 or more"):
        load(tmp_path / "nowhere", batch_size=size)
    with pytest.raises(UserError, match="devices is empty"):
        load(tmp_path / "nowhere", devices=[])


def test_what_is_no_network_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no file or folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not the folder of a run"):
        load(tmp_path)
