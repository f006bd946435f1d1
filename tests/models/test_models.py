"""Backbones and heads: shapes, precision, masks, drop path, and recomputation."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from small import small_config

from sop_jax import config as config_lib
from sop_jax.compiled.flops import flops
from sop_jax.errors import UserError
from sop_jax.models import Model, Params, build, vit
from sop_jax.models.head import unit
from sop_jax.models.layers import drop_path
from sop_jax.models.positions import RULES
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training.assemble import assemble

BATCH, SIDE, PATCH, WIDTH, DIM = 3, 16, 4, 16, 8


def make_config(**changed: Any) -> ml_collections.ConfigDict:
    small = dict(width=WIDTH, depth=3, patch=PATCH, init_std=0.2)
    return small_config(model=small | changed, head=dict(hidden=12, dim=DIM))


def images(height: int = SIDE, width: int = SIDE, seed: int = 0) -> jax.Array:
    pixels = np.random.default_rng(seed).integers(0, 256, (BATCH, height, width, 3))
    return jnp.asarray(pixels, jnp.uint8)


def keys(seed: int) -> jax.Array:
    """Returns one key for each image."""
    return jax.random.split(jax.random.key(seed), BATCH)


def small_model(**changed: Any) -> Model:
    return build(make_config(**changed), SIDE)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model(drop_path=0.5)


@pytest.fixture(scope="module")
def params(model: Model) -> Params:
    """Returns parameters with a mask token that is not zero."""
    params = jax.jit(model.init)(jax.random.key(0))
    params["backbone"]["mask_token"] = jax.random.normal(jax.random.key(1), (WIDTH,))
    return params


@pytest.fixture(scope="module")
def embed(model: Model) -> Any:
    return jax.jit(model.embed, static_argnames="patches")


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (8, 24), (20, 4)])
def test_any_size_of_whole_patches_is_embedded(
    embed: Any, params: Params, size: tuple[int, int]
) -> None:
    cls, patches = embed(params, images(*size))
    assert cls.shape == (BATCH, DIM)
    assert patches.shape == (BATCH, size[0] * size[1] // PATCH**2, DIM)
    np.testing.assert_allclose(jnp.linalg.norm(cls, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(patches, axis=-1), 1, rtol=1e-5)


def test_cls_without_patches_is_the_same_cls(embed: Any, params: Params) -> None:
    both, _ = embed(params, images())
    alone, patches = embed(params, images(), patches=False)
    assert patches.shape == (BATCH, 0, DIM)
    np.testing.assert_allclose(alone, both, atol=1e-6)


def test_features_are_normed_tokens_of_the_last_layers(model: Model, params: Params) -> None:
    layers = jax.jit(functools.partial(model.features, last=2))(params, images())
    (final,) = jax.jit(model.features)(params, images())
    assert [layer.shape for layer in layers] == [(BATCH, 1 + 16, WIDTH)] * 2
    np.testing.assert_allclose(layers[-1], final, atol=1e-5)
    assert jnp.abs(layers[0] - layers[1]).max() > 1e-2
    np.testing.assert_allclose(jnp.stack(layers).mean(-1), 0, atol=1e-5)


def test_patches_run_row_by_row(model: Model, params: Params) -> None:
    """Without attention, only the token of a changed patch changes."""
    positions = jnp.zeros_like(params["backbone"]["pos_embed"])
    still = jax.tree.map(jnp.zeros_like, params["backbone"]["blocks"])  # layers that add nothing
    params = params | {"backbone": params["backbone"] | {"pos_embed": positions, "blocks": still}}
    before = images(8, 16)
    after = before.at[:, 4:8, 8:12].set(255 - before[:, 4:8, 8:12])
    features = jax.jit(model.features)
    (old,), (new,) = features(params, before), features(params, after)
    changed = jnp.abs(old - new).max((0, 2)) > 1e-3
    assert np.flatnonzero(changed).tolist() == [1 + 4 + 2]


def test_pixels_of_masked_patches_do_not_matter(embed: Any, params: Params) -> None:
    mask = jnp.asarray(np.random.default_rng(0).random((BATCH, 4, 4)) < 0.5)
    pixels = jnp.repeat(jnp.repeat(mask, PATCH, axis=1), PATCH, axis=2)[..., None]
    noise = images(seed=1)
    cls, patches = embed(params, images(), mask)
    for hidden, same in ((pixels, True), (~pixels, False)):
        other_cls, other_patches = embed(params, jnp.where(hidden, noise, images()), mask)
        assert np.array_equal(cls, other_cls) == same
        assert np.array_equal(patches, other_patches) == same
    bare, _ = embed(params, images())
    assert jnp.abs(bare - cls).max() > 1e-3


def test_masked_patches_still_know_their_places(embed: Any, params: Params) -> None:
    _, patches = embed(params, images(), jnp.ones((BATCH, 4, 4), bool))
    np.testing.assert_allclose(patches[0], patches[1], atol=1e-6)
    assert jnp.abs(patches[0, 0] - patches[0, 1]).max() > 1e-3


def test_no_keys_mean_no_drop_path_and_keys_draw_for_each_sample(
    embed: Any, params: Params
) -> None:
    same = jnp.tile(images()[:1], (BATCH, 1, 1, 1))
    still, _ = embed(params, same)
    np.testing.assert_allclose(still[0], still[1], atol=1e-6)
    drawn = [embed(params, same, None, keys(i))[0] for i in range(4)]
    assert np.array_equal(drawn[0], embed(params, same, None, keys(0))[0])
    assert len(np.unique(np.round(jnp.concatenate(drawn), 4), axis=0)) >= 4


def test_an_image_is_dropped_by_its_own_key_whatever_else_is_in_the_batch(
    embed: Any, params: Params
) -> None:
    cls, _ = embed(params, images(), None, keys(0))
    turned, _ = embed(params, images()[::-1], None, keys(0)[::-1])
    np.testing.assert_allclose(turned[::-1], cls, atol=1e-5)


def test_drop_path_keeps_or_drops_whole_branches_and_their_mean() -> None:
    draws = jax.random.uniform(jax.random.key(0), (8000,))
    dropped = np.asarray(drop_path(jnp.ones((8000, 2, 3)), jnp.array(0.3), draws))
    per_sample = dropped[:, 0, 0]
    np.testing.assert_array_equal(dropped, per_sample[:, None, None] * np.ones((1, 2, 3)))
    np.testing.assert_allclose(np.unique(per_sample), [0, 1 / 0.7], rtol=1e-6)
    assert per_sample.mean() == pytest.approx(1, abs=0.03)


# Attention, registers, scales, positions


def test_attention_is_what_the_last_layer_takes(model: Model, params: Params) -> None:
    weights = jax.jit(model.attention)(params, images())
    assert weights.shape == (BATCH, 2, 17, 17) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    before, _ = model.features(params, images(), last=2)  # after a norm without effect
    last = jax.tree.map(lambda leaf: leaf[-1], params["backbone"]["blocks"])
    qkv = before @ last["qkv"]["kernel"] + last["qkv"]["bias"]
    q, k, _ = jnp.moveaxis(qkv.reshape(BATCH, 17, 3, 2, WIDTH // 2), 2, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // 2)
    np.testing.assert_allclose(weights, jax.nn.softmax(logits), atol=1e-5)


@pytest.mark.medium
def test_registers_take_part_and_are_not_given_back(params: Params) -> None:
    model = small_model(registers=3)
    start = jax.jit(model.init)(jax.random.key(0))
    assert start["backbone"]["register_tokens"].shape == (3, WIDTH)
    assert 0 < jnp.abs(start["backbone"]["register_tokens"]).max() < 1e-4
    features = jax.jit(model.features)
    tokens = []
    for scale in (1.0, 2.0):
        more = {"register_tokens": scale * jnp.ones((3, WIDTH)).at[:, ::2].set(-1)}
        (found,) = features(params | {"backbone": params["backbone"] | more}, images())
        assert found.shape == (BATCH, 17, WIDTH)
        tokens.append(found)
    assert jnp.abs(tokens[0] - tokens[1]).min(axis=2).max() > 1e-3
    assert jax.jit(model.attention)(start, images()).shape == (BATCH, 2, 20, 20)
    cls, patches = jax.jit(model.embed)(start, images(8, 8))
    assert cls.shape == (BATCH, DIM) and patches.shape == (BATCH, 4, DIM)


@pytest.mark.parametrize("registers", [0, 3])
def test_the_mean_of_the_patches_can_stand_for_an_image(registers: int) -> None:
    cls, mean = (small_model(registers=registers, pool=pool) for pool in ("cls", "mean"))
    params = jax.jit(cls.init)(jax.random.key(0))
    chex.assert_trees_all_equal_shapes(params, jax.eval_shape(mean.init, jax.random.key(0)))
    mask = jnp.asarray(np.random.default_rng(0).random((BATCH, 4, 4)) < 0.5)
    for last in (1, 2):
        ours, theirs = (
            jax.jit(functools.partial(model.features, last=last))(params, images(), mask)
            for model in (mean, cls)
        )
        for found, tokens in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(found[:, 1:], tokens[:, 1:])
            expected = np.asarray(tokens, np.float64)[:, 1:].mean(1)
            np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)
            assert np.abs(expected - tokens[:, 0]).max() > 1e-2
    # In training the head sees it in place of [CLS], whichever patches enter the head.
    (embedded, _, before_head, _), _ = jax.jit(mean.embed_training, static_argnames="patches")(
        params, images(), mask, patches=False
    )
    np.testing.assert_allclose(before_head, theirs[-1][:, 1:].mean(1), atol=1e-5)
    alone, _ = jax.jit(mean.embed, static_argnames="patches")(params, images(), mask)
    np.testing.assert_allclose(embedded, alone, atol=1e-5)


def test_the_mean_is_of_the_patches_that_enter_the_encoder() -> None:
    model = small_model(pool="mean")
    params = jax.jit(model.init)(jax.random.key(0))
    kept = jnp.array([[0, 15, 3]] * (BATCH - 1) + [[7, 8, 1]])
    (_, _, mean, patches), _ = jax.jit(
        lambda params: model.embed_training(params, images(), kept=kept)
    )(params)
    assert patches.shape == (BATCH, 3, WIDTH)
    np.testing.assert_allclose(mean, np.asarray(patches, np.float64).mean(1), atol=1e-6)


def test_scales_multiply_the_branches_of_their_layer(params: Params) -> None:
    model = small_model(layer_scale=0.25)
    start = jax.jit(model.init)(jax.random.key(0))["backbone"]["blocks"]
    for name in ("ls1", "ls2"):
        assert (start[name]["scale"] == 0.25).all() and start[name]["scale"].shape == (3, WIDTH)
    # This equals branches whose last linear layers are scaled by a quarter.
    blocks = dict(params["backbone"]["blocks"])
    scaled = blocks | {name: start[name] for name in ("ls1", "ls2")}
    for name in ("proj", "fc2"):
        blocks[name] = jax.tree.map(lambda leaf: leaf / 4, blocks[name])
    plain = small_model()
    (expected,) = plain.features(
        params | {"backbone": params["backbone"] | {"blocks": blocks}}, images()
    )
    (found,) = model.features(
        params | {"backbone": params["backbone"] | {"blocks": scaled}}, images()
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_rule_for_positions_is_a_setting(params: Params) -> None:
    small = {rule: small_model(positions=rule).features(params, images(8, 8))[0] for rule in RULES}
    whole = {rule: small_model(positions=rule).features(params, images())[0] for rule in RULES}
    for rule in RULES[1:]:
        assert jnp.abs(small[rule] - small["ibot"]).max() > 1e-4
        np.testing.assert_array_equal(whole[rule], whole["ibot"])


def test_patches_of_14_pixels_take_views_of_224_and_98() -> None:
    config = config_lib.paper()
    config.model.update(dict(size="h", patch=14))
    model = build(config, 224)
    params = jax.eval_shape(model.init, jax.random.key(0))
    for side, tokens in ((224, 256), (98, 49)):
        views = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
        _, patches = jax.eval_shape(lambda params, views: model.embed(params, views), params, views)
        assert patches.shape == (1, tokens, 256)


def test_half_precision_gives_float32_unit_embeddings_near_those_of_float32(
    embed: Any, params: Params
) -> None:
    half = small_model(dtype="bfloat16")
    shapes = jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0)))
    assert {leaf.dtype for leaf in shapes} == {jnp.dtype("float32")}
    coarse, patches = jax.jit(half.embed)(params, images())
    assert coarse.dtype == patches.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(coarse, axis=-1), 1, rtol=1e-5)
    fine, _ = embed(params, images())
    assert 1e-5 < jnp.abs(coarse - fine).max() < 0.1


@pytest.mark.medium
def test_neither_recomputing_layers_nor_three_products_change_a_gradient(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(remat: str) -> Params:
        model = small_model(remat=remat, drop_path=0.5)

        def loss(params: Params) -> jax.Array:
            cls, patches = model.embed(params, images(), None, keys(0))
            return cls[:, 0].mean() + patches[..., 1].mean()

        return jax.jit(jax.grad(loss))(params)

    plain = gradients("none")
    assert jnp.abs(plain["backbone"]["blocks"]["qkv"]["kernel"]).max() > 1e-4
    for remat in ("products", "dots", "full"):
        chex.assert_trees_all_close(gradients(remat), plain, atol=1e-6, rtol=1e-6)
    monkeypatch.setattr(vit, "WIDE", WIDTH)
    chex.assert_trees_all_close(gradients("products"), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "patch", "millions"),
    [("s", 16, 21.665664), ("b", 16, 85.798656), ("l", 16, 303.301632), ("h", 14, 630.7648)],
)
def test_sizes_have_the_known_numbers_of_parameters(size: str, patch: int, millions: float) -> None:
    config = config_lib.paper()
    config.model.size, config.model.patch = size, patch
    shapes = jax.eval_shape(build(config, 224).init, jax.random.key(0))
    backbone = shapes["backbone"]
    count = sum(leaf.size for leaf in jax.tree.leaves(backbone)) - backbone["mask_token"].size
    assert count == round(millions * 1e6)
    width = backbone["cls_token"].size
    head = sum(leaf.size for leaf in jax.tree.leaves(shapes["head"]))
    assert head == (width + 1) * 2048 + 2049 * 2048 + 2049 * 256


def test_start_is_ibots() -> None:
    config = make_config(width=128, init_std=0.02)
    params = jax.jit(build(config, SIDE).init)(jax.random.key(0))
    blocks = params["backbone"]["blocks"]
    for kernel in (
        blocks["qkv"]["kernel"],
        blocks["fc2"]["kernel"],
        params["head"]["fc1"]["kernel"],
    ):
        assert kernel.std() == pytest.approx(0.02, rel=0.1)
    assert jnp.abs(blocks["qkv"]["bias"]).max() == 0
    assert jnp.abs(params["backbone"]["mask_token"]).max() == 0
    bound = (3 * PATCH**2) ** -0.5
    assert jnp.abs(params["backbone"]["patch_embed"]["kernel"]).max() == pytest.approx(
        bound, rel=0.01
    )
    assert not np.array_equal(blocks["qkv"]["kernel"][0], blocks["qkv"]["kernel"][1])


def test_an_unknown_size_names_those_that_are_known() -> None:
    with pytest.raises(UserError, match="model.size is 'xl'; expected one of ti, s, b, l"):
        build(make_config(size="xl"), SIDE)


def test_unit_rows_and_a_row_of_zeros() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    gradient = jax.grad(lambda x: unit(x).sum())(x)
    assert np.isfinite(gradient).all()


def test_recomputing_costs_the_more_the_less_is_stored(params: Params) -> None:
    def operations(remat: str) -> float:
        model = small_model(remat=remat)

        def loss(params: Params) -> jax.Array:
            return model.embed(params, images())[0][:, 0].sum()

        return flops(jax.grad(loss), params)

    none, dots, full = map(operations, ("none", "dots", "full"))
    assert none < dots < full
    # `dots` recomputes the products of attention, and `full` the linear layers too.
    assert dots - none < 0.3 * (full - none)


@pytest.mark.medium
@pytest.mark.medium
@pytest.mark.usefixtures("promotion")
def test_gradients_of_a_half_precision_network_are_sums_in_float32(params: Params) -> None:
    """No gradient is rounded to bfloat16 before it would be summed over devices."""
    model = small_model(dtype="bfloat16")

    def loss(params: Params) -> jax.Array:
        cls, patches = model.embed(params, images(), jnp.ones((BATCH, 4, 4), bool).at[0].set(False))
        return (cls[:, 0] + patches[..., 1].sum(1)).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        rounded = leaf.astype(jnp.bfloat16).astype(jnp.float32)
        changed = float((leaf != rounded).sum() / jnp.maximum((leaf != 0).sum(), 1))
        assert changed > 0.1, jax.tree_util.keystr(path)


def test_some_patches_are_those_of_all(model: Model, params: Params) -> None:
    indices = jnp.array([[0, 15, 3]] * (BATCH - 1) + [[7, 7, 1]])
    cls, patches = jax.jit(model.embed)(params, images(), patches=indices)
    all_cls, everything = jax.jit(lambda params: model.embed(params, images()))(params)
    np.testing.assert_allclose(cls, all_cls, atol=1e-6)
    expected = jnp.take_along_axis(everything, indices[..., None], axis=1)
    np.testing.assert_allclose(patches, expected, atol=1e-6)


def precisions(program: Any, *arguments: Any) -> set[tuple[str, str]]:
    """Returns the kinds and precisions of all products that a jitted function passes to XLA."""
    lines = program.lower(*arguments).as_text().splitlines()
    found = [(line, re.search(r"dot_general|convolution(?=\()", line)) for line in lines]
    return {
        (kind[0], precision)
        for line, kind in found
        if kind
        for precision in re.findall(r"HIGHEST|HIGH|DEFAULT", line) or ["none"]
    }


def gradients(**changed: Any) -> set[tuple[str, str]]:
    """Returns the `precisions` of the gradients of a network, whose layers are recomputed."""
    side = 32
    model = build(make_config(remat="full", **changed), side)
    pixels = jnp.zeros((1, side, side, 3), jnp.uint8)

    def loss(params: Params) -> jax.Array:
        (cls, patches, *_), _ = model.embed_training(params, pixels)
        return cls.sum() + patches.sum()

    return precisions(jax.jit(jax.grad(loss)), jax.eval_shape(model.init, jax.random.key(0)))


def test_a_float32_step_multiplies_in_float32_on_every_device() -> None:
    """The default of JAX would be TF32 on GPUs and bfloat16 on TPUs."""
    config = make_config()
    config.batch_size = 4
    config.augment.update(dict(global_size=8, local_size=4, local_crops=1))
    config.sop.cls.update(dict(memory=16, anchors=4, supports=2))
    config.sop.patch.update(dict(memory=16, anchors=4))
    run = assemble(config, make_mesh(1), images=100)
    found = precisions(run.train_step, run.abstract, run.batch, jnp.array(True))
    assert found == {("dot_general", "HIGHEST")}


@pytest.mark.parametrize(
    ("family", "kinds"), [("swin", ["dot_general"]), ("resnet", ["convolution", "dot_general"])]
)
def test_other_float32_networks_multiply_in_float32_too(family: str, kinds: list[str]) -> None:
    depths = (1, 1, 1, 1) if family == "resnet" else (2, 2, 2, 2)
    found = gradients(family=family, stage_depths=depths, stage_heads=(1, 2, 2, 2), window=2)
    assert found == {(kind, "HIGHEST") for kind in kinds}


def test_maps_of_attention_are_of_float32_products_too(model: Model, params: Params) -> None:
    assert precisions(jax.jit(model.attention), params, images()) == {("dot_general", "HIGHEST")}


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (dict(precision="high"), {"HIGH"}),
        (dict(precision="default"), {"DEFAULT"}),
        # Products of bfloat16 are exact in one pass, so a higher precision would gain nothing.
        (dict(dtype="bfloat16"), {"DEFAULT"}),
    ],
    ids=str,
)
def test_faster_products_can_be_asked_for(changed: dict[str, str], expected: set[str]) -> None:
    assert {precision for _, precision in gradients(**changed)} == expected
