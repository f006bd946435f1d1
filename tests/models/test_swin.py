"""Swin beyond its reference numbers: definition of windows, masks, layers, attention."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from small import small_config

from sop_jax import config as config_lib
from sop_jax.models import Model, Params, build
from sop_jax.models.layers import Start
from sop_jax.models.swin import Block, Window, window_of

BATCH, SIDE, WIDTH, DIM = 3, 128, 8, 8
DEPTHS = (2, 2, 4, 2)


def make_config(**changed: Any) -> ml_collections.ConfigDict:
    """Stages have 32, 16, 8 and 4 tokens per side, none of which is divisible by windows of 5."""
    small = dict(family="swin", width=WIDTH, window=5, stage_depths=DEPTHS)
    numbers = dict(stage_heads=(1, 2, 2, 4), init_std=0.2, position_std=0.5)
    return small_config(model=small | numbers | changed, head=dict(hidden=12, dim=DIM))


def images(height: int = SIDE, width: int = SIDE, seed: int = 0) -> jax.Array:
    pixels = np.random.default_rng(seed).integers(0, 256, (BATCH, height, width, 3))
    return jnp.asarray(pixels, jnp.uint8)


def keys(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), BATCH)


@pytest.fixture(scope="module")
def model() -> Model:
    return build(make_config(drop_path=0.5), SIDE)


@pytest.fixture(scope="module")
def params(model: Model) -> Params:
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def embed(model: Model) -> Any:
    return jax.jit(model.embed, static_argnames="patches")


# Windows


def dense_attention(block: Block, x: jax.Array, grid: tuple[int, int], shift: int) -> jax.Array:
    """Returns attention weights [B, h, T, T], computed from which pairs share a shifted window."""
    side, (high, wide) = block.window.side, grid
    table = block.relative_bias[...]
    cells = [(row, column) for row in range(high) for column in range(wide)]
    allowed = np.zeros((high * wide,) * 2, bool)
    offsets = np.zeros((high * wide,) * 2, int)
    for i, one in enumerate(cells):
        for j, other in enumerate(cells):
            moved = [[(a - shift) // side for a in place] for place in (one, other)]
            # Tokens shifted out at the top or left are in a window of their own, with number -1.
            allowed[i, j] = moved[0] == moved[1]
            down, across = (a - b + side - 1 for a, b in zip(one, other, strict=True))
            if allowed[i, j]:
                offsets[i, j] = down * (2 * side - 1) + across
    qkv = block.qkv(block.norm1(x)).reshape(len(x), len(cells), 3, block.heads, -1)
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    logits += jnp.moveaxis(table[offsets], -1, 0)
    return jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf))


@pytest.mark.medium
@pytest.mark.parametrize("shift", [0, 2])
def test_windows_are_a_dense_attention_of_those_that_may_see_each_other(shift: int) -> None:
    grid, width = (8, 12), 6
    start = Start(jnp.dtype("float32"), std=0.5, position_std=1.0)
    block = Block(width, 2, Window(4, 2), start, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 8 * 12, width))
    expected = dense_attention(block, x, grid, shift)
    found = block.attention_weights(x, grid, shift)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    values = block.qkv(block.norm1(x)).reshape(2, 96, 3, 2, -1)[:, :, 2]
    mixed = jnp.einsum("bhqk,bkhd->bqhd", expected, values).reshape(x.shape)
    np.testing.assert_allclose(block.attention(x, grid, shift), block.proj(mixed), atol=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("side", "windows"),
    [
        (7, [Window(7, 3), Window(7, 3), Window(7, 3), Window(7, 0)]),
        (14, [Window(14, 7), Window(14, 7), Window(14, 0), Window(7, 0)]),
    ],
)
def test_windows_are_no_larger_than_their_stage(side: int, windows: list[Window]) -> None:
    assert [window_of(side, tokens) for tokens in (56, 28, 14, 7)] == windows


@pytest.mark.medium
@pytest.mark.parametrize(
    ("size", "window", "count"),
    [("t", 7, 27_519_354), ("s", 7, 48_837_258), ("b", 7, 86_743_224), ("t", 14, 27_569_754)],
)
def test_sizes_have_the_known_numbers_of_parameters(size: str, window: int, count: int) -> None:
    config = config_lib.paper()
    config.model.update(dict(family="swin", size=size, window=window))
    model = build(config, 224)
    backbone = jax.eval_shape(model.init, jax.random.key(0))["backbone"]
    assert sum(x.size for x in jax.tree.leaves(backbone)) - backbone["mask_token"].size == count
    assert model.patch == 32


# Images and masks


@pytest.mark.medium
@pytest.mark.parametrize(
    ("size", "tokens"), [((128, 128), 16), ((32, 32), 1), ((64, 96), 6), ((36, 100), 8)]
)
def test_any_size_is_embedded(
    embed: Any, params: Params, size: tuple[int, int], tokens: int
) -> None:
    cls, patches = embed(params, images(*size))
    assert cls.shape == (BATCH, DIM) and patches.shape == (BATCH, tokens, DIM)
    for found in (cls, patches):
        np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1, rtol=1e-5)


@pytest.mark.medium
def test_patches_are_counted_row_by_row(model: Model, params: Params) -> None:
    """Without attention, a patch affects only its own token, whatever the shape of the image."""
    still = {
        name: stage | {"blocks": jax.tree.map(jnp.zeros_like, stage["blocks"])}
        for name, stage in params["backbone"]["stages"].items()
    }
    params = params | {"backbone": params["backbone"] | {"stages": still}}
    before = images(64, 96)
    after = before.at[:, 40:44, 70:74].set(0)
    features = jax.jit(model.features)
    (old,), (new,) = features(params, before), features(params, after)
    changed = jnp.abs(old - new).max((0, 2)) > 1e-4
    assert np.flatnonzero(changed[1:]).tolist() == [3 + 2]


@pytest.mark.medium
def test_pixels_of_masked_tokens_do_not_matter(embed: Any, params: Params) -> None:
    mask = jnp.asarray(np.random.default_rng(0).random((BATCH, 4, 4)) < 0.5)
    pixels = jnp.repeat(jnp.repeat(mask, 32, axis=1), 32, axis=2)[..., None]
    noise = images(seed=1)
    cls, patches = embed(params, images(), mask)
    for hidden, same in ((pixels, True), (~pixels, False)):
        other_cls, other_patches = embed(params, jnp.where(hidden, noise, images()), mask)
        assert np.array_equal(cls, other_cls) == same
        assert np.array_equal(patches, other_patches) == same


# Layers


@pytest.mark.medium
def test_features_are_those_of_the_last_layers_each_with_its_mean(
    model: Model, params: Params
) -> None:
    layers = jax.jit(functools.partial(model.features, last=5))(params, images())
    (final,) = jax.jit(model.features)(params, images())
    wide = [(BATCH, 1 + 16, 8 * WIDTH)] * 2
    assert [layer.shape for layer in layers] == [(BATCH, 1 + 64, 4 * WIDTH)] * 3 + wide
    np.testing.assert_allclose(layers[-1], final, atol=1e-5)
    for layer in layers:
        np.testing.assert_allclose(layer[:, 0], layer[:, 1:].mean(1), atol=1e-6)
    for layer, normed in zip(layers, [False] * 3 + [True] * 2, strict=True):
        assert (jnp.abs(layer[:, 1:].mean(-1)).max() < 1e-4) == normed
    assert jnp.abs(layers[0] - layers[1]).max() > 1e-2


@pytest.mark.medium
def test_attention_is_among_the_tokens_of_the_last_stage(model: Model, params: Params) -> None:
    attention = jax.jit(model.attention)
    whole = attention(params, images())
    assert whole.shape == (BATCH, 4, 16, 16) and whole.dtype == jnp.float32
    np.testing.assert_allclose(whole.sum(-1), 1, atol=1e-5)
    assert jnp.abs(whole[0] - whole[1]).max() > 1e-3
    part = attention(params, images(64, 160))  # 2 x 5 tokens in two windows of 4 x 4
    assert part.shape == (BATCH, 4, 10, 10)
    last = np.arange(10) % 5 == 4
    assert (part[:, :, last][:, :, :, ~last] == 0).all()
    assert (part[:, :, last][:, :, :, last] > 0).all()
    assert (part.sum(-1) < 1).all()  # the rest is attention to the padding


@pytest.mark.medium
def test_an_image_is_dropped_by_its_own_key_whatever_else_is_in_the_batch(
    embed: Any, params: Params
) -> None:
    still, _ = embed(params, images())
    cls, _ = embed(params, images(), None, keys(0))
    turned, _ = embed(params, images()[::-1], None, keys(0)[::-1])
    np.testing.assert_allclose(turned[::-1], cls, atol=1e-5)
    other, _ = embed(params, images(), None, keys(1))
    assert jnp.abs(cls - still).max() > 1e-3 and jnp.abs(cls - other).max() > 1e-3


def gradients(**changed: Any) -> Params:
    """Returns the gradients of a network whose first stage shifts its windows."""
    config = make_config(**dict(window=8, stage_depths=(4, 2, 2, 2)) | changed)
    model = build(config, 64)
    mask = jnp.ones((BATCH, 2, 2), bool).at[0].set(False)

    def loss(params: Params) -> jax.Array:
        cls, patches = model.embed(params, images(64, 64), mask, keys(0))
        return (cls[:, 0] + patches[..., 1].sum(1)).sum()

    return jax.jit(jax.grad(loss))(jax.jit(model.init)(jax.random.key(0)))


@pytest.mark.slow
def test_recomputing_layers_changes_no_gradient() -> None:
    plain = gradients(drop_path=0.5)
    largest = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)]
    assert np.median(largest) > 1e-4
    assert max(largest) < 1e4  # masked patches that are zero in all layers made it larger
    for remat in ("dots", "full"):
        again = gradients(drop_path=0.5, remat=remat)
        chex.assert_trees_all_close(again, plain, atol=5e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("promotion")
def test_gradients_of_a_half_precision_network_are_sums_in_float32() -> None:
    for path, leaf in jax.tree.leaves_with_path(gradients(dtype="bfloat16")):
        rounded = leaf.astype(jnp.bfloat16).astype(jnp.float32)
        changed = float((leaf != rounded).sum() / jnp.maximum((leaf != 0).sum(), 1))
        assert changed > 0.1, jax.tree_util.keystr(path)
