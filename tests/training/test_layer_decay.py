"""Layer-wise decay: which layer each parameter belongs to, and the updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import small_config

from sop_jax import models, schedules
from sop_jax.errors import UserError
from sop_jax.training.checkpoint import named_leaves
from sop_jax.training.layer_decay import adamw, decayed, layer_scales, scale_by_layer

SWIN = {"family": "swin", "window": 4, "stage_depths": (2, 2), "stage_heads": (1, 2)}


def trained(**model) -> dict:
    """Returns the shapes of a small network with a classifier."""
    config = small_config(model=model)
    params = jax.eval_shape(models.build(config, 32).init, jax.random.key(0))
    return params | {"classifier": {"kernel": jnp.zeros((16, 3)), "bias": jnp.zeros(3)}}


def test_layers_of_a_vit():
    scales = named_leaves(layer_scales(trained(registers=2, layer_scale=0.1), 0.5))
    assert scales["backbone/patch_embed/kernel"] == 0.125 == scales["backbone/register_tokens"]
    assert scales["backbone/blocks/fc1/kernel"].tolist() == [[[0.25]], [[0.5]]]
    assert scales["backbone/blocks/ls1/scale"].tolist() == [[0.25], [0.5]]
    assert scales["backbone/norm/scale"] == 1 == scales["head/fc1/kernel"]
    assert scales["classifier/kernel"] == 1


def test_layers_of_a_swin_are_numbered_through_its_stages():
    """As `get_num_layer_for_swin` of iBOT: a downsampling counts with the block before it."""
    scales = named_leaves(layer_scales(trained(**SWIN), 0.5))
    assert scales["backbone/patch_norm/scale"] == 0.5**5 == scales["backbone/mask_token"]
    first, second = (scales[f"backbone/stages/{i}/blocks/qkv/bias"].ravel() for i in (0, 1))
    assert [*first, *second] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scales["backbone/stages/0/downsample/reduction/kernel"] == 0.5**3
    assert scales["backbone/norm/bias"] == 1


def test_a_resnet_has_no_layers():
    with pytest.raises(UserError, match="not defined for backbone/.*layer decay of 1"):
        layer_scales(trained(family="resnet", stage_depths=(1, 1)), 0.5)


def test_which_parameters_decay():
    decays = named_leaves(decayed(trained(registers=2, layer_scale=0.1)))
    kept = {name for name, value in decays.items() if value}
    assert all(name.endswith("/kernel") for name in kept)
    assert {"backbone/blocks/qkv/kernel", "classifier/kernel"} <= kept
    biases = named_leaves(decayed(trained(**SWIN)))
    assert biases["backbone/stages/0/blocks/relative_bias"]  # 2-D in PyTorch, so it decays


@pytest.mark.medium
def test_an_update_is_that_of_adamw_times_the_factor():
    rng = np.random.default_rng(0)
    params, gradients = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), trained())
        for _ in range(2)
    )
    schedule = schedules.learning_rate(1e-3, 1e-5, 3, 10)
    tx = adamw(schedule, 0.05, 0.75)
    reference = optax.adamw(schedule, weight_decay=0.05, mask=decayed)
    state, other = tx.init(params), reference.init(params)
    for _ in range(3):
        updates, state = tx.update(gradients, state, params)
        plain, other = reference.update(gradients, other, params)
    scales = layer_scales(params, 0.75)
    for name, update in named_leaves(updates).items():
        expected = named_leaves(plain)[name] * named_leaves(scales)[name]
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


def test_a_decay_of_one_changes_nothing():
    updates = {"backbone": {"stem": jnp.ones(3)}}
    tx = scale_by_layer(1.0)
    assert tx.update(updates, tx.init(updates))[0] is updates
