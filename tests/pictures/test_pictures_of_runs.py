"""What is read of the checkpoints of runs: anchors with supports, and masked images."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from begun import Saved, save, settings

from sop_jax.errors import UserError
from sop_jax.objectives.memory import push
from sop_jax.parallel.mesh import make_mesh
from sop_jax.pictures import subject
from sop_jax.pictures.masks import masked, without_masks
from sop_jax.pictures.supports import supports, without_supports
from sop_jax.training.assemble import assemble

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> subject.Trained:
    """A run of SOP whose memory of [CLS] has two rows of each image, which are near each other."""
    config = settings("sop")
    run = assemble(config, make_mesh(1), images=1000)
    state = run.init(jax.random.key(0))
    memory, rng = state.carried["cls"], np.random.default_rng(0)
    batch, (_, slots, dim) = config.batch_size, memory.rows.shape
    centres = rng.normal(size=(batch, dim)).astype(np.float32)
    for _ in range(slots):
        rows = centres + 0.01 * rng.normal(size=centres.shape).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        memory = push(memory, jnp.asarray(rows), jnp.arange(batch))
    state = state._replace(carried=state.carried | {"cls": memory})
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, config, {5: state})
    return subject.load(workdir)


def test_supports_are_the_nearest_rows(trained: subject.Trained) -> None:
    assert without_supports(trained) is None and trained.step == 5
    found = {one.level: one for one in supports(trained, 4)}
    config = trained.config.sop
    cls = found["cls"]
    assert cls.prototypes == config.cls.anchors
    assert cls.images.shape == (4, 1 + config.cls.supports) == cls.cosines.shape
    assert np.allclose(cls.cosines[:, 0], 1, atol=1e-5)
    assert (np.diff(cls.cosines[:, 1:], axis=1) <= 1e-6).all()
    assert (cls.images >= 0).all()
    same = cls.images[:, 1:] == cls.images[:, :1]
    assert same.mean() > 0.5  # other rows of the anchor's own image are nearest
    assert (cls.cosines[:, 1:][same] > 0.9).all()
    assert ((cls.votes >= 0) & (cls.votes <= 1)).all()
    assert (found["patch"].images == -1).all()  # a memory that has just begun


def test_anchors_that_never_change_are_from_no_known_image(tmp_path: pathlib.Path) -> None:
    saved = Saved(tmp_path / "run", "sop", **{"sop.anchors": "frozen_rows"})
    memory = saved.state.carried["cls"]
    lanes, slots, _ = memory.rows.shape
    images = jnp.arange(lanes * slots).reshape(lanes, slots)
    carried = saved.state.carried | {"cls": memory._replace(image=images)}
    trained = subject.load(saved.workdir)._replace(carried=carried)
    cls = next(one for one in supports(trained, 3) if one.level == "cls")
    assert (cls.images[:, 0] == -1).all() and (cls.images[:, 1:] >= 0).all()
    assert cls.cosines[:, 1:].max() > 0.999  # the rows that were frozen are still in the memory


def test_supports_depend_on_the_seed_only(trained: subject.Trained) -> None:
    first, again, other = (supports(trained, 6, seed)[0].images for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_masked_patches_are_compared(trained: subject.Trained) -> None:
    assert without_masks(trained) is None
    side = trained.config.augment.global_size
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    found = masked(trained, images)
    patches = side // trained.model.patch
    assert found.masks.shape == found.cosines.shape == (3, patches, patches)
    assert found.masks.any() and not found.masks.all()
    assert (np.abs(found.cosines) <= 1 + 1e-5).all()
    assert found.choices is not None and found.choices.shape == (2, 3, patches, patches)
    assert found.choices.max() < trained.config.sop.patch.anchors


@pytest.mark.parametrize("method", ["dino", "massl", "capi"])
def test_methods_without_supports_or_masks_say_why(method: str, tmp_path: pathlib.Path) -> None:
    trained = subject.load(Saved(tmp_path / "run", method).workdir)
    why = without_supports(trained)
    assert why is not None and method in why
    why = without_masks(trained)
    assert why is not None and "no loss of masked patches" in why


def test_images_that_moved_are_named_by_flags(tmp_path: pathlib.Path) -> None:
    config = settings("sop")
    config.data.update(source="folder", path=str(tmp_path / "gone"), test_split="val")
    save(tmp_path / "run", config, {})
    with pytest.raises(UserError, match="gone"):
        subject.open_images(tmp_path / "run")
    folder = tmp_path / "here" / "train" / "cat"
    folder.mkdir(parents=True)
    for number in range(2):
        write_image(folder / f"{number}.png", number)
    images, own = subject.open_images(tmp_path / "run", {"path": str(tmp_path / "here")})
    assert len(images.train) == 2 and images.test is None and own.path == str(tmp_path / "here")


def test_images_that_cannot_be_read_are_black(tmp_path: pathlib.Path) -> None:
    config = settings("sop")
    config.data.update(source="folder", path=str(tmp_path / "here"))
    folder = tmp_path / "here" / "train" / "cat"
    folder.mkdir(parents=True)
    write_image(folder / "a.png", 7)
    (folder / "b.png").write_bytes(b"no image")
    save(tmp_path / "run", config, {})
    images, _ = subject.open_images(tmp_path / "run")
    crops, readable = subject.centre_crops(images.train, [1, 0], config)
    assert readable.tolist() == [False, True]
    assert not crops[0].any() and (crops[1] == 7).all()


def write_image(path: pathlib.Path, value: int) -> Any:
    from PIL import Image

    Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(path)
