"""The optimizer and its schedules (iBOT's recipe)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array

from sop_jax.objectives.methods import method_of
from sop_jax.objectives.objective import Optimize
from sop_jax.schedules import Length, Schedule, cosine, duration, later, learning_rate

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

    Args:
        config: the config of the run.
        steps: the number of steps of the run.
        epoch: the number of steps per epoch.
    """
    found = []
    own = {"optim.warmup": "the learning rate reaches its peak"}
    for key, happens in {**own, **method_of(config).warmups}.items():
        section, name = key.split(".")
        asked = duration(config[section], f"{name}_", epoch)
        if asked > steps:
            found.append(
                f"warning: {key} is {asked} steps, but the run has only {steps}, so it is "
                f"shortened to {steps} steps: {happens} {asked / steps:.3g} times as fast. Set a "
                f"shorter one with --config.{key}_steps=N"
            )
    start = duration(config.mask, "start_", epoch)
    if start >= steps and config.mask.none < 1:
        found.append(
            f"warning: masks start at step {start}, but the run has only {steps} steps: nothing is "
            "ever masked. Start them earlier with --config.mask.start_steps=N"
        )
    return found


def decays(params: Any) -> Any:
    """Returns the mask of weight decay: False for biases, scales of norms and running statistics.

    Running statistics have no gradient either, so that AdamW does not change them.

    Parameters are recognised by name because layers are stacked, so that their biases are not 1-D.
    [CLS], mask token and positions decay too, as in iBOT, where they have leading axes of length
    one.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale", "mean", "var"), params
    )


def clip_each_tensor(limit: float) -> optax.GradientTransformation:
    """Scales each gradient tensor to a norm of at most `limit`, as iBOT's `clip_gradients` does.

    In a stack of layers, the tensor of each layer is clipped on its own.
    """

    def clip(path: tuple, gradient: Array) -> Array:
        stacked = any(getattr(key, "key", None) == "blocks" for key in path)
        axes = tuple(range(1 if stacked else 0, gradient.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=axes, keepdims=True))
        return gradient * jnp.minimum(1.0, limit / (norm + 1e-6))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


CLIPS = {"tensor": clip_each_tensor, "global": optax.clip_by_global_norm}


def optimizer(
    config: ml_collections.ConfigDict,
    schedules: Mapping[str, Schedule],
    own: Mapping[str, Optimize],
) -> optax.GradientTransformation:
    """Returns AdamW with gradient clipping, joined with the optimizers of an objective.

    Args:
        config: `config.optim` of the run.
        schedules: the schedules, among them `lr` and `weight_decay`.
        own: the objective's optimizers by the name of the sub-tree of its parameters. Their
            gradients do not count in the network's norm.
    """

    def network(late: int = 0) -> optax.GradientTransformation:
        clip = CLIPS[config.clip_kind](config.clip) if config.clip else optax.identity()
        lr, weight_decay = (later(schedules[name], late) for name in ("lr", "weight_decay"))
        return optax.chain(clip, optax.adamw(lr, weight_decay=weight_decay, mask=decays))

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
