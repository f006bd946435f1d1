"""The optimizers and their schedules: iBOT's AdamW, and SGD and LARS as DINO trains ResNets."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array

from sop_jax.objectives.methods import method_of
from sop_jax.objectives.objective import Optimize, Warmup
from sop_jax.schedules import Length, Schedule, constant, cosine, duration, later, learning_rate
from sop_jax.settings import flatten

Plan = Mapping[str, Schedule]

NETWORK = "network"  # the group of all parameters that have no optimizer of their own


def schedules(config: ml_collections.ConfigDict, length: Length) -> dict[str, Schedule]:
    """Returns the schedules of the learning rate, the weight decay and the teacher's momentum.

    The peak learning rate is `config.optim.lr` for 256 images per batch, and proportional to the
    batch size.

    Args:
        config: the config of the run.
        length: the length of the run.
    """
    steps, epoch = length
    warmup = min(duration(config.optim, "warmup_", epoch), steps)
    peak = config.optim.lr * config.batch_size / 256
    return {
        "lr": learning_rate(peak, config.optim.min_lr, warmup, steps),
        "weight_decay": cosine(config.optim.weight_decay, steps),
        "momentum": cosine(config.optim.momentum, steps),
    }


def beyond_end(config: ml_collections.ConfigDict, steps: int, epoch: float) -> list[str]:
    """Returns a warning for each setting that reaches beyond the end of the run.

    A setting that has no effect, such as a warm-up from a value to the same value, is left out.

    Args:
        config: the config of the run.
        steps: the number of steps of the run.
        epoch: the number of steps per epoch.
    """
    found, flat = [], flatten(config)
    own = {"optim.warmup": Warmup("the learning rate reaches its peak")}
    unused = method_of(config).without_use(config)
    for key, (happens, ends) in {**own, **method_of(config).warmups}.items():
        changing = [flat[end] for end in ends if end not in unused and len(set(flat[end])) > 1]
        if f"{key}_steps" in unused or (ends and not changing):
            continue
        section, name = key.split(".")
        asked = duration(config[section], f"{name}_", epoch)
        if asked > steps:
            found.append(
                f"warning: {key} is {asked} steps, but the run has only {steps}, so it is "
                f"shortened to {steps} steps: {happens} {asked / steps:.3g} times as fast. Set a "
                f"shorter one with --config.{key}_steps=N"
            )
    start = duration(config.mask, "start_", epoch)
    if start >= steps and config.mask.none < 1 and "mask.start_steps" not in unused:
        found.append(
            f"warning: masks start at step {start}, but the run has only {steps} steps: nothing is "
            "ever masked. Start them earlier with --config.mask.start_steps=N"
        )
    return found


def decays(params: Any) -> Any:
    """Returns the mask of weight decay: False for biases, scales of norms and running statistics.

    Running statistics have no gradient either, so that no optimizer changes them.

    Parameters are recognised by name because layers are stacked, so that their biases are not 1-D.
    [CLS], mask token and positions decay too, as in iBOT, where they have leading axes of length
    one.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale", "mean", "var"), params
    )


def tensor_norm(path: tuple, x: Array) -> Array:
    """Returns the L2 norm of a parameter's tensor, with axes of length one that broadcast.

    In a stack of layers, which the name `blocks` marks, the tensor of each layer has its own norm.
    """
    stacked = any(getattr(key, "key", None) == "blocks" for key in path)
    axes = tuple(range(1 if stacked else 0, x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


def clip_each_tensor(limit: float) -> optax.GradientTransformation:
    """Scales each gradient tensor to a norm of at most `limit`, as iBOT's `clip_gradients` does.

    In a stack of layers, the tensor of each layer is clipped on its own.
    """

    def clip(path: tuple, gradient: Array) -> Array:
        return gradient * jnp.minimum(1.0, limit / (tensor_norm(path, gradient) + 1e-6))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


CLIPS = {"tensor": clip_each_tensor, "global": optax.clip_by_global_norm}


def scale_by_trust(trust: float) -> optax.GradientTransformation:
    """Scales each update to a norm of `trust` times that of its parameter, as DINO's LARS does.

    Biases and the scales of norms keep their updates, and so does a tensor if its norm or that of
    its update is zero. In a stack of layers, each layer has its own ratio.
    """

    def scale(path: tuple, update: Array, param: Array, decays: bool) -> Array:
        if not decays:
            return update
        norm, length = tensor_norm(path, param), tensor_norm(path, update)
        known = (norm > 0) & (length > 0)
        return update * jnp.where(known, trust * norm / jnp.where(known, length, 1.0), 1.0)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(
            scale, updates, params, decays(params)
        )
    )


def adamw(config: ml_collections.ConfigDict, plan: Plan) -> optax.GradientTransformation:
    """Returns AdamW."""
    return optax.adamw(plan["lr"], weight_decay=plan["weight_decay"], mask=decays)


def sgd(config: ml_collections.ConfigDict, plan: Plan) -> optax.GradientTransformation:
    """Returns PyTorch's SGD, whose weight decay is a part of the gradient."""
    return _momentum(config, plan, optax.identity())


def lars(config: ml_collections.ConfigDict, plan: Plan) -> optax.GradientTransformation:
    """Returns the LARS of DINO's `utils.LARS`: SGD whose gradients have `scale_by_trust`."""
    return _momentum(config, plan, scale_by_trust(config.trust))


def _momentum(
    config: ml_collections.ConfigDict, plan: Plan, scaling: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns gradient descent that sums gradients before they meet the learning rate."""
    return optax.chain(
        optax.add_decayed_weights(plan["weight_decay"], decays),
        scaling,
        optax.trace(config.sgd_momentum),
        optax.scale_by_learning_rate(plan["lr"]),
    )


KINDS = {"adamw": adamw, "sgd": sgd, "lars": lars}


def without_use(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the settings of `optim` that its kind does not use, and the reason for each."""
    unused = {"adamw": ("sgd_momentum", "trust"), "sgd": ("trust",), "lars": ()}[config.optim.kind]
    return {f"optim.{name}": f"optim.kind={config.optim.kind} does not use it" for name in unused}


def optimizer(
    config: ml_collections.ConfigDict,
    schedules: Plan,
    own: Mapping[str, Optimize],
) -> optax.GradientTransformation:
    """Returns the optimizer of `optim.kind`, with gradient clipping, and those of an objective.

    Args:
        config: `config.optim` of the run.
        schedules: the schedules, among them `lr` and `weight_decay`.
        own: the objective's optimizers by the name of the sub-tree of its parameters. Their
            gradients do not count in the network's norm.
    """

    def network(late: int = 0, plain: bool = False) -> optax.GradientTransformation:
        clips = config.clip and not plain
        clip = CLIPS[config.clip_kind](config.clip) if clips else optax.identity()
        plan = {name: later(schedules[name], late) for name in ("lr", "weight_decay")}
        if plain:
            plan["weight_decay"] = constant(0.0)
        return optax.chain(clip, KINDS[config.kind](config, plan))

    if not own:
        return network()
    parts = {name: optimize(network) for name, optimize in own.items()}
    return optax.partition(
        {NETWORK: network(), **parts}, functools.partial(groups, names=tuple(own))
    )


def groups(params: Any, names: Sequence[str]) -> Any:
    """Returns the optimizer group of each parameter.

    That is the name of the objective's sub-tree for those in `names`, and NETWORK for all others.
    """

    def group(path: tuple, _: Any) -> str:
        return path[1].key if path[0].key == "objective" and path[1].key in names else NETWORK

    return jax.tree_util.tree_map_with_path(group, params)
