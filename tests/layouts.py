"""A small run that can be sharded over any mesh, and the values that its steps compute."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.experimental.multihost_utils import process_allgather
from small import small_config

from sop_jax.parallel import mesh as mesh_lib
from sop_jax.parallel.mesh import make_mesh, put, replicated, split
from sop_jax.training import optim
from sop_jax.training.assemble import Run, assemble

STEPS = 3

# Settings of the methods other than SOP, and what they require of the rest of a run. A word after
# the name of a method is a variant. High temperatures keep rounding errors from growing from step
# to step.
TEMPERATURES = dict(
    student_temperature=0.3, teacher_temperature=(0.2, 0.25), temperature_warmup_steps=2
)
DECOUPLED = dict(prototypes=24, prior="none", **TEMPERATURES)
METHODS: dict[str, dict[str, Any]] = {
    "dino": dict(dino=dict(prototypes=24, koleo_prototypes=0.1, koleo_partition=7, **TEMPERATURES)),
    "ibot": dict(
        ibot=dict(
            prototypes=24,
            patch_prototypes=20,
            patch_teacher_temperature=(0.2, 0.25),
            freeze_steps=1,
            layer="vmf",
            marginal="probability_centering",
            **TEMPERATURES,
        )
    ),
    "massl": dict(  # large steps would multiply rounding errors by ten until the third
        massl=dict(memory=40, block=12, **TEMPERATURES), optim=dict(lr=0.1)
    ),
    "carp": dict(carp=dict(prototypes=26, block=6), head=dict(unit=False)),
    "capi": dict(
        capi=dict(
            prototypes=12,
            predictor_depth=2,
            predicted=1.0,
            target_temperature=0.5,
            clustering_temperature=0.5,
            student_temperature=0.5,
        ),
        optim=dict(lr=0.1),  # as for massl
    ),
    "decoupled": dict(
        decoupled=dict(
            loss="ibot",
            patch_prototypes=20,
            patch_teacher_temperature=(0.2, 0.25),
            **DECOUPLED,
        )
    ),
    "decoupled dino": dict(
        decoupled=dict(loss="dino", marginal="probability_centering", **DECOUPLED)
    ),
    "decoupled carp": dict(
        decoupled=dict(loss="carp", prototypes=26, block=6), head=dict(unit=False)
    ),
    "swav": dict(  # the queue is full, and used, in the third step
        swav=dict(prototypes=24, queue=32, queue_start_steps=0, freeze_steps=1, **TEMPERATURES),
        optim=dict(momentum=(0.0, 0.0)),
    ),
    "msn": dict(msn=dict(prototypes=24, **TEMPERATURES)),
    "pmsn": dict(
        pmsn=dict(prototypes=24, patch_drop=0.5, prior_direction="prior_to_mean", **TEMPERATURES)
    ),
}


def make_config(
    data: int = 1,
    fsdp: int = 1,
    accumulate: int = 1,
    remat: str = "products",
    family: str = "vit",
    method: str = "sop",
) -> ml_collections.ConfigDict:
    """Returns settings with drop path, local crops, and memories that a batch does not divide."""
    config = small_config(
        batch_size=16,
        steps=100,
        accumulate=accumulate,
        mesh=dict(data=data, fsdp=fsdp),
        augment=dict(global_size=8, local_size=4, local_crops=2),
        model=dict(init_std=0.2, drop_path=0.3, remat=remat),
        optim=dict(lr=0.5),
        sop=dict(
            cls=dict(memory=40, anchors=6, supports=2, tasks=2),
            patch=dict(memory=24, anchors=5),
            # High temperatures, so that rounding errors do not grow from step to step.
            student_temperature=0.3,
            teacher_temperature=(0.2, 0.25),
            temperature_warmup_steps=10,
        ),
        mask=dict(ratio=(0.5, 0.5)),
    )
    config.method = method.split()[0]
    config.update(METHODS.get(method, {}))
    if family == "swin":  # the first of its four stages shifts its windows
        config.augment.update(dict(global_size=64, local_size=32))
        stages = dict(stage_depths=(2, 2, 2, 2), stage_heads=(1, 2, 2, 2), window=8)
        config.model.update(stages | dict(family=family))
        # Eight layers, and LayerNorm of small masked patches, would amplify rounding errors.
        config.model.init_std, config.model.norm_eps, config.optim.lr = 0.05, 0.1, 0.05
    return config


def make_batch(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns a random global batch, the same in every process; half of its patches are masked."""
    rng = np.random.default_rng(0)
    size, mask = shapes["index"].shape[0], shapes["mask"].shape
    patches = mask[2] * mask[3]
    return {
        "global_views": rng.integers(0, 256, shapes["global_views"].shape).astype(np.uint8),
        "local_views": rng.integers(0, 256, shapes["local_views"].shape).astype(np.uint8),
        "mask": np.argsort(rng.random((*mask[:2], patches))).reshape(mask) < patches // 2,
        "index": np.arange(100, 100 + size, dtype=np.int32),
        "corrupt": np.full(size, -1, np.int32),
    }


def keep_gradients(config: Any, schedules: Any, own: Any) -> optax.GradientTransformation:
    """Returns plain gradient descent whose state is the last gradients.

    Unlike Adam, it does not divide by tiny sums. An objective keeps its own optimizers.
    """

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g: -config.lr * g, gradients), gradients

    network = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), update
    )
    if not own:
        return network
    parts = {name: optimize(lambda **_: network) for name, optimize in own.items()}
    groups = functools.partial(optim.groups, names=tuple(own))
    return optax.partition({optim.NETWORK: network, **parts}, groups)


def small_run(monkeypatch: pytest.MonkeyPatch, **layout: Any) -> tuple[Run, Any]:
    """Returns the run and its first state; most parameters are large enough to be sharded."""
    monkeypatch.setattr(mesh_lib, "SMALL", 64)
    monkeypatch.setattr(optim, "optimizer", keep_gradients)
    config = make_config(**layout)
    run = assemble(config, make_mesh(config.mesh.data, config.mesh.fsdp), images=1000)
    return run, run.init(jax.random.key(0))


def trajectory(monkeypatch: pytest.MonkeyPatch, **layout: Any) -> dict[str, np.ndarray]:
    """Returns the metrics and gradients of every step and the arrays of the last state, by name."""
    run, state = small_run(monkeypatch, **layout)
    batch = {name: put(array, split(run.mesh)) for name, array in make_batch(run.batch).items()}
    measure = put(np.array(True), replicated(run.mesh))
    found = {}
    for step in range(STEPS):
        state, metrics = run.train_step(state, batch, measure)
        seen = {"metrics": metrics, "gradients": state.opt_state}
        found |= named(process_allgather(seen, tiled=True), f"{step}/")
    last = {name: getattr(state, name) for name in ("student", "teacher", "carried")}
    return found | named(process_allgather(last, tiled=True))


def named(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    return {
        prefix + jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_same(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], least: float = 1e-3
) -> None:
    """Asserts that arrays agree to 1e-5 of their scale, or of `least` if that is larger."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        # A correlation near zero is a difference of large sums, so its scale is that of its range.
        smallest = 1.0 if name.endswith("/agreement") else least
        scale = max(np.abs(array).max(initial=0), smallest)
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * scale, err_msg=name)


@contextlib.contextmanager
def usual_passes() -> Iterator[None]:
    """Compiles as for users, with the passes of XLA that other tests disable to save time."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)
