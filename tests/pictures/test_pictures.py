"""Arrays of pictures that need no run: neighbours, attention, components and maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config

from sop_jax.models import build
from sop_jax.pictures.attention import attention, without_cls
from sop_jax.pictures.components import components
from sop_jax.pictures.feature_map import LEAST, feature_map
from sop_jax.pictures.neighbours import neighbours


def rows(count: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def test_neighbours_are_sorted_by_cosine() -> None:
    gallery = np.array([[2, 0], [0, 1], [1, 1], [-3, 0]], np.float32)
    found = neighbours(np.array([[5, 1]], np.float32), gallery, 3)
    assert found.places.tolist() == [[0, 2, 1]]
    expected = [5 / 26**0.5, 6 / 52**0.5, 1 / 26**0.5]
    assert np.allclose(found.cosines, [expected], atol=1e-6)


def test_an_image_is_not_its_own_neighbour() -> None:
    gallery = rows(5)
    found = neighbours(gallery[[3, 1]], gallery, 9, [[3], [1]])
    assert found.places.shape == (2, 4)
    assert 3 not in found.places[0] and 1 not in found.places[1]
    assert np.isfinite(found.cosines).all()


def test_attention_is_that_of_cls_without_registers() -> None:
    config = small_config(model=dict(registers=2))
    model = build(config, 16)
    params = model.init(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    found = attention(config, model, params, images)
    whole = np.asarray(
        model.attention(params, jnp.asarray(images))
    )  # [CLS], two registers and 4 x 6 patches
    assert found.shape == (3, 2, 4, 6)
    assert np.allclose(found.reshape(3, 2, 24), whole[:, :, 0, 3:], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(pool="mean"), "does not represent"),
        (dict(family="swin", size="t"), "swin"),
        (dict(family="resnet", size="50"), "resnet"),
    ],
)
def test_which_networks_have_attention_of_cls(changes: dict, reason: str | None) -> None:
    why = without_cls(small_config(model=changes))
    assert why is None if reason is None else why is not None and reason in why


def test_like_tokens_have_like_colours() -> None:
    config = small_config(model=dict(position_std=0.0, init_std=0.3))
    model = build(config, 16)
    params = model.init(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images[1] = images[0]
    images[:, 4:8, :4] = images[:, :4, :4]  # two patches with the same pixels
    found = components(config, model, params, images)
    assert found.shape == (2, 4, 4, 3) and found.dtype == np.uint8
    assert np.abs(found[0].astype(int) - found[1]).max() <= 1
    assert np.abs(found[0, 0, 0].astype(int) - found[0, 1, 0]).max() <= 1
    assert (found.reshape(-1, 3).max(0) == 255).all() and (found.reshape(-1, 3).min(0) == 0).all()


@pytest.mark.parametrize("count", [2, LEAST - 1, LEAST + 5])
def test_a_map_of_few_images(count: int) -> None:
    at, how = feature_map(rows(count))
    assert at.shape == (count, 2) and np.isfinite(at).all()
    assert how == ("t-SNE" if count >= LEAST else "principal components")


def test_a_map_keeps_groups_together() -> None:
    centres = 20 * np.eye(3, 6, dtype=np.float32)
    labels = np.arange(60) % 3
    at, _ = feature_map(centres[labels] + rows(60))
    near = neighbours_in(at)
    assert (labels[near] == labels).mean() > 0.95


def neighbours_in(at: np.ndarray) -> np.ndarray:
    distances = np.linalg.norm(at[:, None] - at[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(1)
