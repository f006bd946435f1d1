"""The optimizer and its schedules, each compared with its plain form."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from sop_jax import config as config_lib
from sop_jax import schedules
from sop_jax.models import build
from sop_jax.objectives.temperatures import temperatures
from sop_jax.training import optim


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    return config_lib.paper()


def test_length_in_epochs_follows_the_batch_size(config: ml_collections.ConfigDict) -> None:
    config.epochs, config.batch_size = 3.0, 100
    assert schedules.run_length(config, 1000) == (30, 10.0)
    config.batch_size = 50
    assert schedules.run_length(config, 1000) == (60, 20.0)
    config.epochs = 0.5
    assert schedules.run_length(config, 1000) == (10, 20.0)


def test_steps_win_over_epochs(config: ml_collections.ConfigDict) -> None:
    config.epochs, config.batch_size, config.steps = 3.0, 100, 7
    assert schedules.run_length(config, 1000)[0] == 7
    config.optim.warmup_epochs, config.optim.warmup_steps = 10.0, 5
    assert schedules.duration(config.optim, "warmup_", 10.0) == 5
    config.optim.warmup_steps = 0
    assert schedules.duration(config.optim, "warmup_", 10.0) == 0


def test_a_run_has_at_least_one_step(config: ml_collections.ConfigDict) -> None:
    config.epochs, config.batch_size = 0.1, 1000
    assert schedules.run_length(config, 1000)[0] == 1


def plan_of(config: ml_collections.ConfigDict, images: int = 1024) -> tuple[int, dict[str, Any]]:
    length = schedules.run_length(config, images)
    plan = optim.schedules(config, length) | temperatures(config.sop, length)
    return length.steps, plan


def test_learning_rate_rises_in_a_line_and_falls_in_a_cosine(
    config: ml_collections.ConfigDict,
) -> None:
    config.batch_size, config.steps, config.optim.warmup_steps = 256, 25, 5
    _, plan = plan_of(config)
    rates = [float(plan["lr"](step)) for step in range(25)]
    peak, end = 5e-4, 1e-6
    expected = [peak * i / 4 for i in range(5)] + [
        end + (peak - end) * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_batch_size_moves_every_schedule_alike(
    config: ml_collections.ConfigDict, batch_size: int
) -> None:
    config.batch_size, config.epochs = batch_size, 40.0
    steps, plan = plan_of(config, images=2048)
    epoch = 2048 // batch_size
    assert steps == 40 * epoch
    assert plan["lr"](10 * epoch) == pytest.approx(5e-4 * batch_size / 256, rel=1e-5)
    assert plan["lr"](10 * epoch - 1) == pytest.approx(5e-4 * batch_size / 256, rel=1e-5)
    assert plan["lr"](steps) == pytest.approx(1e-6, rel=1e-3)
    assert plan["weight_decay"](steps // 2) == pytest.approx(0.22, rel=1e-5)
    assert plan["momentum"](steps // 2) == pytest.approx(0.997, rel=1e-5)
    assert plan["teacher_temperature"](30 * epoch - 1) == pytest.approx(0.07, rel=1e-5)
    assert plan["teacher_temperature"](15 * epoch) < 0.06


def test_schedules_start_and_end_where_set(config: ml_collections.ConfigDict) -> None:
    config.steps, config.batch_size = 100, 1024
    config.sop.temperature_warmup_steps, config.optim.warmup_steps = 11, 10
    _, plan = plan_of(config)
    assert plan["lr"](0) == 0
    assert plan["weight_decay"](0) == pytest.approx(0.04)
    assert plan["weight_decay"](100) == pytest.approx(0.4)
    assert plan["momentum"](0) == pytest.approx(0.994)
    assert plan["momentum"](100) == 1
    found = [float(plan["teacher_temperature"](step)) for step in (0, 5, 10, 11, 99)]
    np.testing.assert_allclose(found, [0.04, 0.055, 0.07, 0.07, 0.07], rtol=1e-5)
    assert plan["student_temperature"](3) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0, 1, 100])
def test_any_warm_up_gives_finite_rates(config: ml_collections.ConfigDict, warmup: int) -> None:
    config.steps, config.optim.warmup_steps = 10, warmup
    config.sop.temperature_warmup_steps = warmup
    _, plan = plan_of(config)
    rates = [float(plan["lr"](step)) for step in range(10)]
    assert np.isfinite(rates).all()
    assert max(rates) == pytest.approx(5e-4 * 4, rel=1e-5)
    assert plan["teacher_temperature"](9) == pytest.approx(0.07, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"optim.warmup_steps": 1000},
            "optim.warmup is 1000 steps, but the run has only 50, so it is shortened to 50 steps: "
            "the learning rate reaches its peak 20 times as fast",
        ),
        (
            {"optim.warmup_epochs": 10.0, "optim.warmup_steps": None},
            "optim.warmup is 100 steps, but the run has only 50",
        ),
        (
            {"sop.temperature_warmup_steps": 51},
            "sop.temperature_warmup is 51 steps, but the run has only 50",
        ),
        (
            {"mask.start_steps": 50},
            "masks start at step 50, but the run has only 50 steps: nothing",
        ),
    ],
    ids=str,
)
def test_what_lies_beyond_the_end_of_a_run_is_reported_with_both_numbers(
    config: ml_collections.ConfigDict, settings: dict[str, Any], words: str
) -> None:
    config.steps = 50
    config.optim.warmup_steps = config.sop.temperature_warmup_steps = 50
    assert optim.beyond_end(config, 50, epoch=10.0) == []
    config.update_from_flattened_dict(settings)
    (told,) = optim.beyond_end(config, 50, epoch=10.0)
    assert words in told


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sop", {"sop.teacher_temperature": (0.05, 0.05)}),
        ("massl", {"massl.teacher_temperature": (0.05, 0.05)}),
        ("dino", {"dino.teacher_temperature": (0.05, 0.05), "dino.freeze_steps": 0}),
        ("decoupled", {"decoupled.beta_warmup_epochs": 30.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_warm_up_between_equal_ends_is_not_reported(
    config: ml_collections.ConfigDict, method: str, changes: dict[str, Any]
) -> None:
    config.method, config.optim.warmup_steps = method, 50
    config[method].temperature_warmup_epochs = 30.0
    config.update_from_flattened_dict(changes)
    assert optim.beyond_end(config, 50, epoch=10.0) == []
    config[method].teacher_temperature = (0.04, 0.05)
    (told,) = optim.beyond_end(config, 50, epoch=10.0)
    assert f"{method}.temperature_warmup is 300 steps" in told


def test_another_temperature_of_patches_has_the_same_warm_up(
    config: ml_collections.ConfigDict,
) -> None:
    config.method, config.optim.warmup_steps, config.ibot.freeze_steps = "ibot", 50, 0
    config.ibot.teacher_temperature = (0.05, 0.05)
    assert len(optim.beyond_end(config, 50, epoch=10.0)) == 1
    config.ibot.patch_weight = 0.0  # the warm-up is then for [CLS] only
    assert optim.beyond_end(config, 50, epoch=10.0) == []
    config.ibot.update(dict(patch_weight=1.0, patch_teacher_temperature=(0.05, 0.05)))
    assert optim.beyond_end(config, 50, epoch=10.0) == []


def test_masks_of_a_method_that_masks_nothing_are_not_reported(
    config: ml_collections.ConfigDict,
) -> None:
    config.method, config.optim.warmup_steps, config.mask.start_steps = "dino", 50, 50
    config.dino.update(dict(freeze_steps=0, temperature_warmup_steps=0))
    assert optim.beyond_end(config, 50, epoch=10.0) == []


def clipped_alone(gradient: np.ndarray, limit: float) -> np.ndarray:
    """Clips one tensor as iBOT does."""
    coefficient = limit / (np.linalg.norm(gradient) + 1e-6)
    return gradient * coefficient if coefficient < 1 else gradient


def gradients() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "backbone": {
            "blocks": {"fc1": {"kernel": rng.normal(size=(3, 4, 5)) * [[[9]], [[0.1]], [[2]]]}},
            "norm": {"scale": 10 * rng.normal(size=6)},
        },
        "head": {"fc1": {"kernel": 0.01 * rng.normal(size=(4, 4))}},
    }


def single(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_clips_each_tensor_and_each_layer_of_a_stack() -> None:
    raw = gradients()
    tx = optim.clip_each_tensor(3.0)
    clipped, _ = tx.update(single(raw), tx.init(single(raw)))
    stack = raw["backbone"]["blocks"]["fc1"]["kernel"]
    expected = {
        "backbone": {
            "blocks": {"fc1": {"kernel": np.stack([clipped_alone(g, 3.0) for g in stack])}},
            "norm": {"scale": clipped_alone(raw["backbone"]["norm"]["scale"], 3.0)},
        },
        "head": {"fc1": {"kernel": raw["head"]["fc1"]["kernel"]}},
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, expected)


def test_clips_the_global_norm() -> None:
    raw = gradients()
    tx = optim.CLIPS["global"](3.0)
    clipped, _ = tx.update(single(raw), tx.init(single(raw)))
    norm = math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(raw)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b * 3 / norm, rtol=1e-5), clipped, raw)


def test_a_zero_gradient_stays_finite() -> None:
    zeros = jax.tree.map(lambda x: 0 * x, single(gradients()))
    for clip in optim.CLIPS.values():
        clipped, _ = clip(3.0).update(zeros, clip(3.0).init(zeros))
        assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(clipped))


def test_decay_leaves_out_only_biases_and_norm_scales(config: ml_collections.ConfigDict) -> None:
    config.model.size = "ti"
    params = jax.eval_shape(build(config, 32).init, jax.random.key(0))
    flags = jax.tree_util.tree_leaves_with_path(optim.decays(params))
    free = {path[-1].key for path, decays in flags if not decays}
    kept = {path[-1].key for path, decays in flags if decays}
    assert free == {"bias", "scale"}
    assert kept == {"kernel", "cls_token", "mask_token", "pos_embed"}


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_are_adamw_with_scheduled_rate_and_decay(
    config: ml_collections.ConfigDict, clip: float
) -> None:
    rates, decays = [0.0, 0.1, 0.05], [0.04, 0.2, 0.4]
    plan = {
        "lr": lambda step: jnp.array(rates)[step],
        "weight_decay": lambda step: jnp.array(decays)[step],
    }
    config.optim.clip = clip
    tx = optim.optimizer(config.optim, plan, {})
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)}
    params = {"layer": single(start)}
    state, update = tx.init(params), jax.jit(tx.update)
    moments = {name: [np.zeros_like(x), np.zeros_like(x)] for name, x in start.items()}
    expected = dict(start)
    for i in range(3):
        raw = {name: rng.normal(size=x.shape) for name, x in start.items()}
        changes, state = update({"layer": single(raw)}, state, params)
        params = jax.tree.map(jnp.add, params, changes)
        for name, gradient in raw.items():
            gradient = clipped_alone(gradient, clip) if clip else gradient
            mean, square = moments[name]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            step = mean / (1 - 0.9 ** (i + 1))
            step = step / (np.sqrt(square / (1 - 0.999 ** (i + 1))) + 1e-8)
            if name == "kernel":
                step = step + decays[i] * expected[name]
            expected[name] = expected[name] - rates[i] * step
    for name, value in expected.items():
        np.testing.assert_allclose(params["layer"][name], value, rtol=1e-4, atol=1e-6)


def plain_step(
    kind: str, gradient: np.ndarray, param: np.ndarray, total: np.ndarray, decay: float, free: bool
) -> np.ndarray:
    """Returns the new sum of gradients of one tensor, as PyTorch's SGD and DINO's LARS sum them."""
    if not free:
        gradient = gradient + decay * param
        norms = np.linalg.norm(param), np.linalg.norm(gradient)
        if kind == "lars" and min(norms) > 0:
            gradient = gradient * 0.002 * norms[0] / norms[1]
    return 0.8 * total + gradient


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_steps_of_sgd_and_lars_are_those_of_each_tensor(
    config: ml_collections.ConfigDict, kind: str
) -> None:
    """Each layer of a stack is a tensor, and a tensor of zeros moves without a ratio."""
    rates, decays = [0.0, 0.1, 0.05], [0.04, 0.2, 0.4]
    plan = {
        "lr": lambda step: jnp.array(rates)[step],
        "weight_decay": lambda step: jnp.array(decays)[step],
    }
    config.optim.update(kind=kind, clip=0.0, sgd_momentum=0.8, trust=0.002)
    tx = optim.optimizer(config.optim, plan, {})
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(3, 4, 5)) * [[[9]], [[0.1]], [[0]]]
    params = {
        "blocks": {"fc": {"kernel": layers, "bias": rng.normal(size=(3, 5))}},
        "head": {"kernel": rng.normal(size=(5, 2)), "scale": rng.normal(size=2)},
    }
    state, update, found = tx.init(single(params)), jax.jit(tx.update), single(params)
    totals = jax.tree.map(np.zeros_like, params)
    for i in range(3):
        raw = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        changes, state = update(single(raw), state, found)
        found = jax.tree.map(jnp.add, found, changes)
        for path, param in jax.tree_util.tree_leaves_with_path(params):
            names = [key.key for key in path]
            gradient, total = raw, totals
            for name in names:
                gradient, total = gradient[name], total[name]
            tensors = (
                (param, gradient, total)
                if "blocks" in names
                else ([x] for x in (param, gradient, total))
            )
            for tensor, g, summed in zip(*tensors, strict=True):
                free = names[-1] in ("bias", "scale")
                summed[...] = plain_step(kind, g, tensor, summed, decays[i], free)
                tensor -= rates[i] * summed
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, params)


def test_momentum_of_lars_ignores_earlier_rates(config: ml_collections.ConfigDict) -> None:
    """Gradients are summed before they meet the rate, so that a rate of zero stops at once."""
    rates = jnp.array([1.0, 0.0])
    plan = {"lr": lambda step: rates[step], "weight_decay": lambda step: jnp.array(0.0)}
    config.optim.update(kind="lars", clip=0.0)
    tx = optim.optimizer(config.optim, plan, {})
    params = {"layer": {"kernel": jnp.ones((2, 2))}}
    state = tx.init(params)
    first, state = tx.update(params, state, params)
    np.testing.assert_allclose(first["layer"]["kernel"], -0.001, rtol=1e-5)
    second, _ = tx.update(params, state, params)
    assert not second["layer"]["kernel"].any()


@pytest.mark.parametrize("kind", optim.KINDS)
def test_no_optimizer_moves_what_has_no_gradient(
    config: ml_collections.ConfigDict, kind: str
) -> None:
    """Running statistics only change in forward passes; an update of zeros is finite."""
    plan = {"lr": lambda step: jnp.array(1.0), "weight_decay": lambda step: jnp.array(0.5)}
    config.optim.kind = kind
    tx = optim.optimizer(config.optim, plan, {})
    params = {"bn": {"mean": jnp.ones(3), "var": jnp.ones(3), "scale": jnp.ones(3)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    for _ in range(2):
        changes, state = tx.update(zeros, state, params)
        assert not any(leaf.any() for leaf in jax.tree.leaves(changes))


@pytest.mark.parametrize("kind", optim.KINDS)
def test_every_optimizer_leaves_an_objectives_parameters_to_its_own(
    config: ml_collections.ConfigDict, kind: str
) -> None:
    plan = {"lr": lambda step: jnp.array(0.1), "weight_decay": lambda step: jnp.array(0.5)}
    config.optim.kind = kind
    tx = optim.optimizer(config.optim, plan, {"prototypes": lambda network: optax.sgd(1.0)})
    params = {
        "backbone": {"blocks": {"kernel": jnp.ones((2, 3, 3))}},
        "objective": {"prototypes": {"kernel": jnp.ones((3, 3))}},
    }
    gradients = jax.tree.map(lambda x: 0.25 * x, params)
    changes, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(changes["objective"]["prototypes"]["kernel"], -0.25)
    moved = np.unique(changes["backbone"]["blocks"]["kernel"])
    assert moved.size == 1 and -0.25 < moved[0] < 0


@pytest.mark.parametrize("kind", optim.KINDS)
def test_a_plain_optimizer_neither_clips_nor_decays(
    config: ml_collections.ConfigDict, kind: str
) -> None:
    plan = {"lr": lambda step: jnp.array(0.1), "weight_decay": lambda step: jnp.array(0.5)}
    config.optim.update(dict(kind=kind, clip=1e-3))
    tx = optim.optimizer(config.optim, plan, {"prototypes": lambda network: network(plain=True)})
    params = {
        "backbone": {"kernel": jnp.ones((3, 3))},
        "objective": {"prototypes": {"kernel": jnp.ones((3, 3))}},
    }
    state = tx.init(params)
    still, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert not still["objective"]["prototypes"]["kernel"].any()
    assert (still["backbone"]["kernel"] < 0).all()  # weight decay
    if kind == "sgd":  # the others do not depend on the scale of a first gradient
        changes, _ = tx.update(jax.tree.map(lambda x: 2 * x, params), state, params)
        np.testing.assert_allclose(changes["objective"]["prototypes"]["kernel"], -0.2)


def test_settings_of_other_optimizers_have_no_use(config: ml_collections.ConfigDict) -> None:
    for kind, unused in (("adamw", {"sgd_momentum", "trust"}), ("sgd", {"trust"}), ("lars", set())):
        config.optim.kind = kind
        assert optim.without_use(config).keys() == {f"optim.{name}" for name in unused}
