"""ResNet: agreement with PyTorch, running statistics, and training with [CLS] only."""

import functools
import pathlib
import re
import shutil
from typing import Any

import chex
import jax
import jax.numpy as jnp
import layouts
import ml_collections
import numpy as np
import pytest
from flax import nnx
from small import small_config

from sop_jax import pretrained, train
from sop_jax.compiled.flops import flops
from sop_jax.errors import UserError
from sop_jax.models import MEAN, STD, Model, Params, build
from sop_jax.models.layers import Start
from sop_jax.models.resnet import REMATS, ResNet, Stem, custom
from sop_jax.objectives.sop.settings import SOP
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training import checkpoint
from sop_jax.training.assemble import Run, assemble
from sop_jax.training.state import TrainState
from sop_jax.training.step import with_statistics

BATCH, DIM = 4, 8
WIDTH, DEPTHS = 4, (3, 1, 1, 1)
SHALLOW = (2, 1)  # compiles in half the time


def make_config(**model: Any) -> ml_collections.ConfigDict:
    """Returns the settings of a run of a tiny ResNet."""
    network = dict(family="resnet", width=WIDTH, stage_depths=DEPTHS, drop_path=0.0, init_std=0.2)
    return small_config(
        model=network | model,
        mask=dict(none=1.0),
        sop=dict(
            cls=dict(memory=24, anchors=6, supports=2, tasks=2),
            patch=dict(tasks=0, memory=0),
            temperature_warmup_steps=10,
        ),
        head=dict(dim=DIM),
        augment=dict(global_size=32, local_size=16, local_crops=2),
        optim=dict(lr=0.1, warmup_steps=3, momentum=(0.9, 1.0)),
        batch_size=8,
        steps=100,
    )


def images(height: int = 64, width: int = 64, seed: int = 0, count: int = BATCH) -> jax.Array:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3))
    return jnp.asarray(pixels, jnp.uint8)


@pytest.fixture(scope="module")
def model() -> Model:
    return build(make_config(), 64)


@pytest.fixture(scope="module")
def params(model: Model) -> Params:
    """Returns parameters whose scales, biases and running statistics are not the initial ones."""
    params = jax.jit(model.init)(jax.random.key(0))

    def moved(path: tuple, leaf: jax.Array) -> jax.Array:
        noise = jax.random.uniform(jax.random.key(len(str(path)) + leaf.size), leaf.shape)
        return {"kernel": leaf, "scale": 0.5 + noise, "var": 0.5 + noise}.get(
            path[-1].key, leaf + 0.3 * (noise - 0.5)
        )

    return jax.tree_util.tree_map_with_path(moved, params)


@pytest.fixture(scope="module")
def embed(model: Model) -> Any:
    return jax.jit(model.embed)


@pytest.fixture(scope="module")
def embed_training(model: Model) -> Any:
    return jax.jit(model.embed_training)


# Agreement with PyTorch


def names_of_transformers(params: Params) -> dict[str, np.ndarray]:
    """Returns the backbone under the names and in the layouts of ResNetModel of transformers."""
    found = {}

    def add(name: str, conv: Params, bn: Params, layer: tuple = ()) -> None:
        found[f"{name}.convolution.weight"] = conv["kernel"][layer].transpose(3, 2, 0, 1)
        theirs = dict(weight="scale", bias="bias", running_mean="mean", running_var="var")
        for other, ours in theirs.items():
            found[f"{name}.normalization.{other}"] = bn[ours][layer]

    add("embedder.embedder", params["stem"]["conv"], params["stem"]["bn"])
    for i, stage in params["stages"].items():
        first, rest = stage["first"], stage.get("blocks")
        name = f"encoder.stages.{i}.layers"
        add(f"{name}.0.shortcut", first["shortcut"]["conv"], first["shortcut"]["bn"])
        for k in range(3):
            convolution, norm = f"conv{k + 1}", f"bn{k + 1}"
            add(f"{name}.0.layer.{k}", first[convolution], first[norm])
            for j in range(0 if rest is None else len(rest["bn1"]["scale"])):
                add(f"{name}.{j + 1}.layer.{k}", rest[convolution], rest[norm], (j,))
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


@pytest.fixture(scope="module")
def peer(params: Params) -> Any:
    """Returns ResNet version 1.5 of transformers with the same weights."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    config = transformers.ResNetConfig(
        embedding_size=WIDTH,
        hidden_sizes=[4 * WIDTH * 2**i for i in range(4)],
        depths=list(DEPTHS),
        layer_type="bottleneck",
        downsample_in_bottleneck=False,
    )
    weights = names_of_transformers(jax.device_get(params["backbone"]))
    state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}

    def make() -> Any:
        network = transformers.ResNetModel(config)
        missing, unexpected = network.load_state_dict(state, strict=False)
        assert not unexpected and all("num_batches_tracked" in name for name in missing)
        return network

    return make


def pixels_of(batch: jax.Array) -> Any:
    """Returns normalized pixels in the layout of PyTorch."""
    import torch

    pixels = (np.asarray(batch, np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2).copy())


def tokens_of(output: Any) -> np.ndarray:
    features = output.last_hidden_state.detach().flatten(2).transpose(1, 2).numpy()
    pooled = output.pooler_output.detach().flatten(1).numpy()
    return np.concatenate([pooled[:, None], features], axis=1)


@pytest.mark.medium
@pytest.mark.parametrize("size", [(64, 64), (45, 86), (32, 96)])
def test_evaluates_as_pytorch(
    model: Model, params: Params, peer: Any, size: tuple[int, int]
) -> None:
    (tokens,) = jax.jit(model.features)(params, images(*size))
    expected = tokens_of(peer().eval()(pixels_of(images(*size))))
    assert tokens.shape == (BATCH, 1 + -(-size[0] // 32) * -(-size[1] // 32), 32 * WIDTH)
    np.testing.assert_allclose(tokens, expected, atol=2e-4, rtol=2e-4)


def backbone_of(model_config: ml_collections.ConfigDict) -> Any:
    """Maps (params, pixels, training) to tokens and statistics, as `ResNet.forward`."""

    def make() -> ResNet:
        start = Start(jnp.dtype(model_config.dtype))
        rngs = nnx.Rngs(0)
        return ResNet(custom(model_config), model_config, 64, lambda leaf: leaf, start, rngs)

    graph, template = nnx.split(nnx.eval_shape(make))

    def forward(params: Params, pixels: jax.Array, training: bool) -> Any:
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state).forward(pixels, training)

    return forward


@pytest.mark.medium
def test_trains_as_pytorch(params: Params, peer: Any) -> None:
    """Compares features, gradients of all parameters, and running statistics of three passes."""
    network = peer().train()
    forward = backbone_of(make_config().model)
    weights = np.random.default_rng(1).normal(size=(BATCH, 32 * WIDTH)).astype(np.float32)

    def loss(params: Params, pixels: jax.Array) -> Any:
        tokens, statistics = forward(params, pixels, True)
        return (tokens[:, 0] * weights).sum(), (tokens, statistics)

    step = jax.jit(jax.grad(loss, has_aux=True))
    state = params["backbone"]
    for seed in range(3):
        pixels = pixels_of(images(60, 80, seed))
        gradients, (tokens, statistics) = step(state, pixels.numpy().transpose(0, 2, 3, 1))
        network.zero_grad()
        output = network(pixels)
        (output.pooler_output.flatten(1) * pixels.new_tensor(weights)).sum().backward()
        np.testing.assert_allclose(tokens, tokens_of(output), atol=2e-4, rtol=2e-4)
        ours = names_of_transformers(jax.device_get(gradients))
        for name, parameter in network.named_parameters():
            scale = float(parameter.grad.abs().max())
            np.testing.assert_allclose(
                ours[name], parameter.grad, atol=1e-3 * scale, rtol=0, err_msg=name
            )
        state = with_statistics(state, statistics)
    theirs = network.state_dict()
    for name, value in names_of_transformers(jax.device_get(state)).items():
        if "running" in name:
            np.testing.assert_allclose(value, theirs[name], atol=1e-5, rtol=1e-5, err_msg=name)


# The network


@pytest.mark.medium
@pytest.mark.parametrize(
    ("size", "learnt", "running"),
    # Those of torchvision without the classifier, and its buffers without the counters.
    [
        ("18", 11_689_512 - 1000 * 513, 9_600),
        ("34", 21_797_672 - 1000 * 513, 17_024),
        ("50", 25_557_032 - 1000 * 2049, 53_120),
    ],
)
def test_sizes_have_the_known_numbers_of_parameters(size: str, learnt: int, running: int) -> None:
    shapes = jax.eval_shape(build(make_config(size=size), 224).init, jax.random.key(0))["backbone"]
    sizes = {"learnt": 0, "running": 0}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        sizes["running" if path[-1].key in ("mean", "var") else "learnt"] += leaf.size
    assert sizes == {"learnt": learnt, "running": running}


@pytest.mark.medium
def test_starts_as_torchvision() -> None:
    config = make_config(width=64, stage_depths=SHALLOW)
    backbone = jax.jit(build(config, 64).init)(jax.random.key(0))["backbone"]
    first, rest = backbone["stages"]["0"]["first"], backbone["stages"]["0"]["blocks"]
    for kernel in (
        backbone["stem"]["conv"]["kernel"],
        first["conv2"]["kernel"],
        rest["conv3"]["kernel"],
    ):
        side, outputs = kernel.shape[-3 - 1], kernel.shape[-1]
        assert kernel.std() == pytest.approx((2 / (side**2 * outputs)) ** 0.5, rel=0.05)
        assert abs(kernel.mean()) < 0.05 * kernel.std()
    for norm in (backbone["stem"]["bn"], rest["bn3"]):
        found = {name: np.unique(value).tolist() for name, value in norm.items()}
        assert found == {"scale": [1.0], "bias": [0.0], "mean": [0.0], "var": [1.0]}


@pytest.mark.medium
def test_a_small_stem_keeps_every_pixel() -> None:
    model = build(make_config(stem="small", stage_depths=SHALLOW), 32)
    params = jax.jit(model.init)(jax.random.key(0))
    kernel = params["backbone"]["stem"]["conv"]["kernel"]
    assert kernel.shape == (3, 3, 3, WIDTH) and model.patch == 2
    stem = Stem(WIDTH, "small", Start(dtype=jnp.float32), jax.random.key(0))
    stem.conv.kernel[...] = kernel
    x = jax.random.normal(jax.random.key(1), (2, 9, 12, 3))
    found, _ = stem(x, training=False)
    axes = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
    np.testing.assert_allclose(found, jax.nn.relu(expected / np.sqrt(1 + 1e-5)), atol=1e-5)


@pytest.mark.medium
def test_embeds_only_cls(embed: Any, embed_training: Any, params: Params) -> None:
    mask = jnp.ones((BATCH, 2, 2), bool)
    trained, _ = embed_training(params, images(), mask)
    for cls, patches in (embed(params, images(), mask), trained[:2]):
        assert cls.shape == (BATCH, DIM) and patches.shape == (BATCH, 0, DIM)
        np.testing.assert_allclose(jnp.linalg.norm(cls, axis=-1), 1, rtol=1e-5)


@pytest.mark.medium
def test_cls_is_the_mean_of_the_features(model: Model, params: Params) -> None:
    (tokens,) = jax.jit(model.features)(params, images())
    np.testing.assert_allclose(tokens[:, 0], tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-6)
    assert tokens.dtype == jnp.float32 and model.patch == 32


@pytest.mark.medium
def test_an_evaluation_does_not_depend_on_the_other_images(embed: Any, params: Params) -> None:
    together, _ = embed(params, images())
    alone, _ = embed(params, images()[1:2])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-6)


@pytest.mark.medium
def test_training_depends_on_the_other_images_and_not_on_running_statistics(
    embed_training: Any, params: Params
) -> None:
    (cls, *_), moved = embed_training(params, images())
    other = images().at[0].set(255 - images()[0])
    assert jnp.abs(embed_training(params, other)[0][0][1] - cls[1]).max() > 1e-3
    (again, *_), further = embed_training(with_statistics(params, moved), images())
    np.testing.assert_array_equal(again, cls)
    assert not np.array_equal(*(s["backbone"]["stem"]["bn"]["mean"] for s in (moved, further)))


@pytest.mark.medium
def test_settings_that_a_resnet_does_not_have_are_reported(model: Model, params: Params) -> None:
    with pytest.raises(UserError, match="the last 2 layers of a ResNet.*request 1"):
        model.features(params, images(), last=2)
    with pytest.raises(UserError, match="no patches to mask"):
        model.features(params, images(), mask=jnp.ones((BATCH, 2, 2), bool))
    with pytest.raises(UserError, match="no attention maps"):
        model.attention(params, images())


@pytest.mark.slow
def test_recomputing_blocks_changes_neither_gradients_nor_statistics() -> None:
    def gradient(remat: str) -> Any:
        model = build(make_config(remat=remat, stage_depths=SHALLOW), 32)

        def loss(params: Params) -> Any:
            (cls, *_), moved = model.embed_training(params, images(32, 32))
            return cls[:, 0].sum(), moved

        return jax.grad(loss, has_aux=True)

    params = jax.jit(build(make_config(stage_depths=SHALLOW), 32).init)(jax.random.key(0))
    none, full = (jax.jit(gradient(remat))(params) for remat in ("none", "full"))
    assert jnp.abs(none[0]["backbone"]["stem"]["conv"]["kernel"]).max() > 1e-4
    chex.assert_trees_all_close(full, none, atol=1e-4, rtol=1e-4)
    operations = [flops(gradient(remat), params) for remat in REMATS]
    assert [*REMATS] == ["none", "products", "dots", "full"]
    assert operations[0] == operations[1] == operations[2] < operations[3]


@pytest.mark.slow
def test_gradients_of_a_half_precision_network_are_sums_in_float32() -> None:
    """No gradient is rounded to bfloat16 before it would be summed over devices."""
    model = build(make_config(dtype="bfloat16", stage_depths=SHALLOW), 32)
    params = jax.jit(model.init)(jax.random.key(0))

    def loss(params: Params) -> Any:
        (cls, *_), moved = model.embed_training(params, images(32, 32))
        return cls[:, 0].sum(), (cls, moved)

    gradients, (cls, moved) = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((cls, moved))} == {jnp.dtype("float32")}
    for path, leaf in jax.tree.leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        if path[-1].key in ("mean", "var"):
            assert not leaf.any(), name
            continue
        rounded = leaf.astype(jnp.bfloat16).astype(jnp.float32)
        assert (leaf != rounded).sum() / jnp.maximum((leaf != 0).sum(), 1) > 0.1, name


# Training


def small_run(accumulate: int = 1, dtype: str = "float32") -> Run:
    """Returns a run with AdamW, weight decay and a teacher that follows quickly."""
    config = make_config(dtype=dtype, init_std=0.1)
    config.accumulate = accumulate
    return assemble(config, make_mesh(1), images=1000)


Learnt = tuple[Run, list[TrainState], list[dict[str, Any]]]


def steps_of(run: Run, count: int) -> tuple[list[TrainState], list[dict[str, Any]]]:
    """Returns the states before, between and after steps on one batch, and the metrics of each."""
    step = jax.jit(run.train_step)  # donates nothing
    states, metrics = [run.init(jax.random.key(0))], []
    for _ in range(count):
        state, found = step(states[-1], batch_of(run), True)
        states.append(state)
        metrics.append(jax.device_get(found))
    return states, metrics


def batch_of(run: Run) -> dict[str, jax.Array]:
    batch = layouts.make_batch(run.batch)
    return {name: jnp.asarray(array) for name, array in batch.items()}


@pytest.fixture(scope="module")
def learnt() -> Learnt:
    run = small_run()
    return run, *steps_of(run, 24)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_a_batch_that_repeats(dtype: str, learnt: Learnt) -> None:
    _, states, metrics = learnt
    if dtype == "bfloat16":
        states, metrics = steps_of(small_run(dtype=dtype), 24)
    assert metrics[0].keys().isdisjoint({"mim"}) and "patch" not in states[0].carried
    assert all(np.isfinite(value).all() for row in metrics for value in row.values())
    losses = [row["loss"] for row in metrics]
    assert losses == [row["cls"] for row in metrics]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    first, last = states[0], states[-1]
    kept = jax.tree.leaves((last.student, last.teacher, last.carried))
    assert {str(leaf.dtype) for leaf in kept} == {"float32", "int32"}
    for network in ("student", "teacher"):
        before, after = (
            layouts.named(getattr(first, network)),
            layouts.named(getattr(last, network)),
        )
        assert [name for name in before if np.array_equal(before[name], after[name])] == []


def seen_by(model: Model, params: Params, batch: Params, names: tuple[str, ...]) -> Params:
    """Returns the backbone after passes of these views, which update the running statistics."""
    for name in names:
        views = batch[name]
        _, statistics = model.embed_training(params, views.reshape(-1, *views.shape[2:]))
        params = with_statistics(params, statistics)
    return params["backbone"]


def running(tree: Params) -> dict[str, np.ndarray]:
    """Returns the running statistics by name."""
    return {
        name: leaf for name, leaf in layouts.named(tree).items() if name.endswith(("mean", "var"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_are_updated_only_by_each_networks_own_passes(
    accumulate: int, learnt: Learnt
) -> None:
    """Those of the student by global and then local views, those of the teacher by global views.

    An effect of weight decay, the optimizer or the moving average would be noticed. Statistics are
    averaged over microbatches.
    """
    run, states, _ = learnt
    if accumulate > 1:
        run = small_run(accumulate)
        states, _ = steps_of(run, 3)
    batch = batch_of(run)
    parts = [jax.tree.map(lambda x, i=i: x[i::accumulate], batch) for i in range(accumulate)]
    passes = jax.jit(functools.partial(seen_by, run.model), static_argnums=2)
    before, after = states[2:4]
    views = {"student": ("global_views", "local_views"), "teacher": ("global_views",)}
    for network, seen in views.items():
        moved = [running(passes(getattr(before, network), part, seen)) for part in parts]
        expected = {name: sum(m[name] for m in moved) / accumulate for name in moved[0]}
        found = running(getattr(after, network)["backbone"])
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    names = ("student", "teacher")
    student, teacher = (running(getattr(after, network)["backbone"]) for network in names)
    assert all(np.abs(student[name] - teacher[name]).max() > 1e-3 for name in student)


def layout_config(
    data: int = 1, fsdp: int = 1, accumulate: int = 1, remat: str = "none"
) -> ml_collections.ConfigDict:
    config = make_config(remat=remat, stage_depths=SHALLOW, width=8)
    config.batch_size = 16
    config.mesh.update(dict(data=data, fsdp=fsdp))
    config.accumulate = accumulate
    return config


def assert_same_but_for_rounding(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    """Asserts equality to 1e-5 of the scale of each array, or 1e-4 for gradients and parameters.

    A gradient through batch norm is a small difference of large sums.
    """
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        forward = re.search(r"metrics/|carried/|/(mean|var)$", name)
        least = 1.0 if name.endswith("/agreement") else 1e-3
        atol = (1e-5 if forward else 1e-4) * max(np.abs(array).max(initial=0), least)
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_devices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm normalizes over the images of all devices."""
    monkeypatch.setattr(layouts, "make_config", layout_config)
    monkeypatch.setattr(layouts, "STEPS", 1)
    one = layouts.trajectory(monkeypatch)
    four = layouts.trajectory(monkeypatch, data=2, fsdp=2, remat="full")
    assert_same_but_for_rounding(four, one)


def run_config() -> ml_collections.ConfigDict:
    """Returns the settings of six steps on the digits."""
    config = make_config()
    config.data.update(dict(source="digits", workers=0, threads=1))
    config.eval.update(dict(resize=32, crop=32, batch_size=512))
    config.update(dict(steps=6, log_every=1, eval_every=6, checkpoint_every=3))
    config.mesh.data = 1
    return config


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: pathlib.Path) -> None:
    config, whole, cut = run_config(), tmp_path / "whole", tmp_path / "cut"
    config.model.dtype = "bfloat16"
    summary = train.train(config, whole)
    assert summary["knn_top1"] > 0.15
    shutil.copytree(whole, cut)
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "6")
    rows = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(rows[:4]))
    other = config.copy_and_resolve_references()
    other.accumulate = 2
    with pytest.raises(UserError, match="accumulate: the run has 1, but 2 was requested"):
        train.train(other, cut)
    resumed = train.train(config, cut)
    assert [resumed[name] for name in ("loss", "knn_top1")] == [
        summary[name] for name in ("loss", "knn_top1")
    ]
    abstract = assemble(config, make_mesh(1), images=100).abstract
    states = [checkpoint.restore(workdir, abstract, 6) for workdir in (whole, cut)]
    bits = [
        {
            name: leaf.tobytes()
            for name, leaf in layouts.named(state._replace(key=state.step)).items()
        }
        for state in states
    ]
    assert bits[0] == bits[1]
    # An evaluation uses the running statistics of the teacher, which have changed.
    _, _, teacher, step = pretrained.load_network(cut)
    assert step == 6 and jnp.abs(teacher["backbone"]["stem"]["bn"]["mean"]).max() > 1e-3


@pytest.mark.medium
def test_a_plan_asks_for_no_memory_of_patches() -> None:
    assert SOP.batch_limit(make_config()) == (24, "sop.cls.memory")
