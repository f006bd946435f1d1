"""The projection head: its layers, its norm, and running statistics in a run."""

from typing import Any

import jax
import jax.numpy as jnp
import layouts
import ml_collections
import numpy as np
import pytest
import scipy.special
from small import small_config

from sop_jax.errors import UserError
from sop_jax.models import Params, build, has_batch_norm
from sop_jax.parallel.mesh import make_mesh, put, replicated, split

BATCH, SIDE, WIDTH, HIDDEN, DIM = 8, 8, 16, 12, 8


def make_config(**head: Any) -> ml_collections.ConfigDict:
    config = small_config(model=dict(init_std=0.3, drop_path=0.0))
    config.head.update(dict(hidden=HIDDEN, dim=DIM) | head)
    return config


def images(seed: int = 0) -> jax.Array:
    pixels = np.random.default_rng(seed).integers(0, 256, (BATCH, SIDE, SIDE, 3))
    return jnp.asarray(pixels, jnp.uint8)


def passed(params: Params | None = None, training: bool = True, **head: Any) -> tuple:
    """Returns parameters, the tokens [B,T,D], their embeddings [B,T,d], and running statistics."""
    model = build(make_config(**head), SIDE)
    params = params or jax.jit(model.init)(jax.random.key(0))
    arrays, moved = jax.jit(model.embed_training)(params, images())
    if not training:
        arrays = (*jax.jit(model.embed)(params, images()), *arrays[2:])
    cls, patches, cls_tokens, tokens = (np.asarray(x) for x in arrays)
    together = np.concatenate([cls_tokens[:, None], tokens], axis=1)
    return params, together, np.concatenate([cls[:, None], patches], axis=1), moved


def plain(params: Params, x: np.ndarray, normed: Any = lambda x, name: x) -> np.ndarray:
    """Returns the output of the layers of a head, before the L2 norm."""
    layers = params.get("head", {})
    last = sum(name.startswith("fc") for name in layers)
    for i in range(1, last + 1):
        x = x @ np.asarray(layers[f"fc{i}"]["kernel"]) + np.asarray(layers[f"fc{i}"]["bias"])
        if i < last:
            x = normed(x, f"bn{i}")
            x = x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
    return x


def scaled(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.medium
@pytest.mark.parametrize("layers", [0, 1, 2, 3, 4])
def test_a_head_has_any_number_of_layers(layers: int) -> None:
    dim = DIM if layers else WIDTH
    params, tokens, found, moved = passed(layers=layers, dim=dim)
    sizes = [WIDTH, *[HIDDEN] * (layers - 1), dim][: layers + 1]
    shapes = {name: layer["kernel"].shape for name, layer in params.get("head", {}).items()}
    assert shapes == {f"fc{i + 1}": (sizes[i], sizes[i + 1]) for i in range(layers)}
    assert moved == {}
    np.testing.assert_allclose(found, scaled(plain(params, tokens)), atol=1e-5)


@pytest.mark.medium
def test_embeddings_can_keep_their_norm() -> None:
    params, tokens, found, _ = passed(unit=False)
    np.testing.assert_allclose(found, plain(params, tokens), atol=1e-5)
    assert found.dtype == np.float32 and np.ptp(np.linalg.norm(found, axis=-1)) > 0.1


def test_a_head_without_layers_has_the_width_of_the_tokens() -> None:
    for dim in (WIDTH - 1, 256):
        with pytest.raises(UserError, match=rf"head\.dim is {dim}; set --config\.head\.dim=16"):
            build(make_config(layers=0, dim=dim), SIDE)


@pytest.mark.medium
def test_batch_norm_follows_hidden_layers() -> None:
    """In training it is over all tokens of the pass; otherwise it uses the running statistics."""
    params, *_ = passed(batch_norm=True)
    rng = np.random.default_rng(1)
    for name in ("bn1", "bn2"):
        for leaf in ("scale", "bias", "mean", "var"):
            params["head"][name][leaf] = jnp.asarray(rng.uniform(0.5, 2, HIDDEN), jnp.float32)
    assert params["head"].keys() == {"fc1", "bn1", "fc2", "bn2", "fc3"}
    seen = {}

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        layer = params["head"][name]
        seen[name] = x.mean((0, 1))
        standard = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5)
        return standard * np.asarray(layer["scale"]) + np.asarray(layer["bias"])

    _, tokens, found, moved = passed(params, batch_norm=True)
    np.testing.assert_allclose(found, scaled(plain(params, tokens, normed)), atol=1e-4)
    assert moved.keys() == {"head"} and moved["head"].keys() == {"bn1", "bn2"}
    for name, mean in seen.items():
        before = np.asarray(params["head"][name]["mean"])
        expected = before + 0.1 * (mean - before)
        np.testing.assert_allclose(moved["head"][name]["mean"], expected, atol=1e-5)

    def running(x: np.ndarray, name: str) -> np.ndarray:
        scale, bias, mean, var = (
            np.asarray(params["head"][name][leaf]) for leaf in ("scale", "bias", "mean", "var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    _, tokens, found, _ = passed(params, training=False, batch_norm=True)
    np.testing.assert_allclose(found, scaled(plain(params, tokens, running)), atol=1e-4)


def test_batch_norm_of_a_head_is_that_of_its_network() -> None:
    assert not has_batch_norm(make_config())
    assert has_batch_norm(make_config(batch_norm=True))
    assert not has_batch_norm(make_config(batch_norm=True, layers=1))


@pytest.mark.medium
def test_statistics_are_of_the_images_on_all_devices() -> None:
    model = build(make_config(batch_norm=True), SIDE)
    params = jax.jit(model.init)(jax.random.key(0))
    mesh = make_mesh()
    whole, expected = jax.jit(model.embed_training)(params, images())
    parts = jax.device_put(images(), split(mesh))
    arrays, moved = jax.jit(model.embed_training)(jax.device_put(params, replicated(mesh)), parts)
    assert mesh.devices.size == BATCH
    for found, right in zip(
        *map(jax.tree.leaves, ((arrays, moved), (whole, expected))), strict=True
    ):
        np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.medium
def test_running_statistics_of_student_and_teacher_are_of_their_own_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The teacher too normalizes by its batch, and its average leaves the statistics out."""
    config = layouts.make_config()
    config.head.batch_norm = True
    monkeypatch.setattr(layouts, "make_config", lambda **_: config)
    run, state = layouts.small_run(monkeypatch)
    first = jax.device_get((state.student, state.teacher))
    batch = {name: put(x, split(run.mesh)) for name, x in layouts.make_batch(run.batch).items()}
    state, _ = run.train_step(state, batch, put(np.array(False), replicated(run.mesh)))
    means = []
    for before, after in zip(first, (state.student, state.teacher), strict=True):
        means.append(np.asarray(after["head"]["bn1"]["mean"]))
        for name in ("mean", "var"):
            moved = np.asarray(after["head"]["bn1"][name]) - before["head"]["bn1"][name]
            assert np.abs(moved).max() > 1e-3
    assert np.abs(means[0] - means[1]).max() > 1e-3  # only the student sees local views
