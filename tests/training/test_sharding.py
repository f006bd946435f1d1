"""Devices do not change the results: what each of them stores, and what they send."""

import functools
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sop_jax.compiled.collectives import Collective, collectives
from sop_jax.config import paper
from sop_jax.models import build
from sop_jax.models.head import unit
from sop_jax.models.layers import REMATS
from sop_jax.objectives.memory import by_age, flat_rows, init_memory, push
from sop_jax.objectives.objective import Outputs
from sop_jax.objectives.sop.objective import sop
from sop_jax.parallel.mesh import gatherer, make_mesh, replicated, shardings, split, with_shardings
from sop_jax.parallel.search import GROUP, nearest, take
from sop_jax.schedules import Length
from sop_jax.training import checkpoint
from sop_jax.training.assemble import assemble

LAYOUTS = [
    dict(data=4, fsdp=2),
    dict(accumulate=4),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            dict(data=2),
            dict(data=4),
            dict(data=8),
            dict(data=2, fsdp=4),
            dict(fsdp=2),
            dict(accumulate=2),
            dict(data=2, fsdp=2, accumulate=4),
            dict(data=8, accumulate=2),
            dict(data=2, fsdp=4, remat="dots"),
            dict(fsdp=2, accumulate=2, remat="full"),
        )
    ),
]


# Numbers


@pytest.fixture(scope="module")
def one_device() -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return layouts.trajectory(monkeypatch)


@pytest.mark.medium
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_computes_what_one_device_does(
    layout: dict[str, Any], one_device: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares metrics, gradients and states, with drop path and memories of uneven size."""
    layouts.assert_same(layouts.trajectory(monkeypatch, **layout), one_device)


@pytest.fixture(scope="module")
def swin_on_one_device() -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return layouts.trajectory(monkeypatch, family="swin")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [dict(data=2, fsdp=2, remat="dots"), dict(fsdp=2, accumulate=2)], ids=str
)
def test_every_layout_computes_what_one_device_does_for_a_swin(
    layout: dict[str, Any],
    swin_on_one_device: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = layout | {"family": "swin"}
    layouts.assert_same(layouts.trajectory(monkeypatch, **layout), swin_on_one_device)


@pytest.mark.medium
def test_the_comparison_can_fail(one_device: dict[str, np.ndarray]) -> None:
    assert one_device["0/metrics/loss"] != pytest.approx(float(one_device["2/metrics/loss"]))
    for name in ("0/gradients/head/fc1/kernel", "carried/cls/rows", "1/metrics/effective_rank"):
        other = one_device | {name: one_device[name] * (1 + 3e-5)}
        with pytest.raises(AssertionError, match=name):
            layouts.assert_same(other, one_device)


# Placement


def device_bytes(tree: Any) -> int:
    """Returns the shards of one device of a tree of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def paper_state(data: int, fsdp: int) -> Any:
    """Returns the abstract state of the paper's ViT-B."""
    config = paper()
    config.model.size = "b"
    return assemble(config, make_mesh(data, fsdp), images=1_281_167).abstract


@pytest.mark.medium
def test_devices_share_memories_and_groups_share_parameters() -> None:
    one, eight, shared = paper_state(1, 1), paper_state(8, 1), paper_state(2, 4)
    for state in (eight, shared):
        ratio = device_bytes(state.carried) / device_bytes(one.carried)
        assert ratio == pytest.approx(1 / 8, rel=1e-3)
    for part in ("student", "teacher"):
        assert device_bytes(getattr(eight, part)) == device_bytes(getattr(one, part))
        ratio = device_bytes(getattr(shared, part)) / device_bytes(getattr(one, part))
        assert 1 / 4 <= ratio < 1.01 / 4  # biases and norms are not sharded
    moments = [x for x in jax.tree.leaves(shared.opt_state) if x.ndim > 0]
    whole = [x for x in jax.tree.leaves(one.opt_state) if x.ndim > 0]
    assert device_bytes(moments) < 1.01 / 4 * device_bytes(whole)


def test_stacked_layers_are_never_split_by_layer() -> None:
    state = paper_state(1, 8)
    kernel = state.student["backbone"]["blocks"]["fc1"]["kernel"]
    assert kernel.shape[0] == 12 and kernel.sharding.spec == P(None, None, "fsdp")
    assert state.teacher["backbone"]["blocks"]["norm1"]["scale"].sharding.spec in (P(), P(None))


@pytest.mark.medium
def test_a_state_is_born_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = layouts.small_run(monkeypatch, data=4, fsdp=2)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    with layouts.usual_passes():
        held = run.init.lower(jax.random.key(0)).compile().memory_analysis()
    assert held.output_size_in_bytes < 1.2 * device_bytes(
        run.abstract._replace(key=run.batch["index"])
    )


@pytest.mark.medium
@pytest.mark.parametrize(
    ("saved", "restored"), [((8, 1), (2, 1)), ((2, 4), (1, 2)), ((1, 1), (8, 1))]
)
def test_a_checkpoint_moves_to_other_devices_bit_by_bit(
    saved: tuple[int, int],
    restored: tuple[int, int],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, state = layouts.small_run(monkeypatch, data=saved[0], fsdp=saved[1])
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.close()
    other, _ = layouts.small_run(monkeypatch, data=restored[0], fsdp=restored[1])
    found = checkpoint.restore(tmp_path, other.abstract)
    assert found.step.sharding.mesh.shape == other.mesh.shape
    expected = layouts.named(state._replace(key=jax.random.key_data(state.key)))
    for name, array in layouts.named(found._replace(key=jax.random.key_data(found.key))).items():
        assert array.tobytes() == expected[name].tobytes(), name
    for name, size in (("cls", 40), ("patch", 24)):
        orders = [
            flat_rows(one.carried[name])[by_age(one.carried[name], size, jnp.arange(size))]
            for one in (state, found)
        ]
        np.testing.assert_array_equal(*orders)


@pytest.mark.medium
@pytest.mark.parametrize("remat", REMATS)
def test_no_layer_keeps_whole_parameters_for_the_backward_pass(remat: str) -> None:
    """They are gathered in the forward and in the backward pass, and not stored in between."""
    config = paper()
    config.model.update(dict(size="custom", width=256, depth=3, heads=4, patch=8, remat=remat))
    mesh = make_mesh(2, 4)
    model = build(config, 32, gatherer(mesh))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(params: Any, images: Any) -> jax.Array:
        cls, patches = model.embed(params, images, None, None)
        return cls.sum() + patches.sum()

    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8)
    gradient = jax.make_jaxpr(jax.grad(loss))(params, images)
    forward = next(eqn for eqn in gradient.eqns if eqn.primitive.name == "scan")
    shapes = {leaf.shape for leaf in jax.tree.leaves(params["backbone"]["blocks"])}
    large = {shape for shape in shapes if len(shape) == 3}
    stored = {value.aval.shape for value in forward.outvars}  # type: ignore[union-attr]
    assert (3, 256, 1024) in large and not large & stored
    assert (3, 16, 17, 256) in stored  # the inputs of the layers are stored


# What devices send


def compiled(function: Any, *inputs: Any) -> Any:
    with layouts.usual_passes():
        return jax.jit(function).lower(*inputs).compile()


def on(mesh: Any, spec: P, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def by_image(mesh: Any, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=split(mesh))


@pytest.mark.parametrize("size", [256, 200])
def test_a_push_sends_nothing(size: int) -> None:
    mesh = make_mesh(4, 2)
    memory = jax.eval_shape(lambda: init_memory(jax.random.key(0), size, 16, lanes=64))
    memory = with_shardings({"carried": {"cls": memory}}, mesh)["carried"]["cls"]
    rows, index = by_image(mesh, 64, 16), by_image(mesh, 64, dtype=jnp.int32)
    with layouts.usual_passes():
        program = (
            jax.jit(push, donate_argnums=0, out_shardings=shardings(memory))
            .lower(memory, rows, index)
            .compile()
        )
    assert collectives(program.as_text()) == []
    # It is in place: there is no second memory.
    assert program.memory_analysis().temp_size_in_bytes < 64 * size * 16 * 4 / 64
    # If rows and lanes are on different devices, something is sent.
    elsewhere = on(mesh, P(None, "data"), 64, 16)
    other = jax.jit(push, out_shardings=shardings(memory)).lower(memory, elsewhere, index)
    assert collectives(other.compile().as_text())


def search_program(devices: int) -> Any:
    """Compiles the search for the supports of anchors among 16384 rows, in one chunk."""
    mesh = make_mesh(devices)
    search = functools.partial(nearest, k=8, mesh=mesh, chunk=512)
    return compiled(search, on(mesh, P(), 512, 32), by_image(mesh, 16384, 32))


def test_work_and_memory_of_the_search_fall_with_the_devices() -> None:
    one, eight = search_program(1), search_program(8)
    ratio = eight.cost_analysis()["flops"] / one.cost_analysis()["flops"]
    assert ratio == pytest.approx(1 / 8, rel=0.1)
    temporary = [p.memory_analysis().temp_size_in_bytes for p in (one, eight)]
    assert temporary[0] >= 512 * 16384 * 4  # the scores
    # Besides the scores, those of the groups that contain the winners of an anchor are stored.
    groups = 512 * 8 * GROUP * 4
    assert temporary[1] - groups < temporary[0] / 7


def test_the_merge_is_shared_too() -> None:
    """A device sorts the candidates for its share of the anchors: [Q / 8, 8 x 8].

    Before that it finds, for all Q, the best groups of its scores, and the best among them.
    """
    text = search_program(8).as_text()
    sorts = re.findall(r"\(f32\[(\d+),8\]\S* s32\S* custom-call\(.*TopK.*/(\w+\(?\)?/top_k)", text)
    assert sorted(int(rows) for rows, _ in sorts) == [64, 512, 512]


def test_the_search_sends_only_scores_and_indices_of_the_best() -> None:
    (sent,) = collectives(search_program(8).as_text())
    assert (sent.kind, sent.bytes) == ("all-to-all", 512 * 8 * 8)


def test_taken_rows_are_what_travels() -> None:
    mesh = make_mesh(8)
    program = compiled(
        functools.partial(take, mesh=mesh),
        by_image(mesh, 4096, 16),
        on(mesh, P(), 100, 3, dtype=jnp.int32),
    )
    (sent,) = collectives(program.as_text())
    assert (sent.kind, sent.bytes) == ("all-reduce", 100 * 3 * 16 * 4)


@pytest.fixture(scope="module")
def step_traffic() -> list[Collective]:
    """The collectives of a whole step on a mesh of both axes."""
    with pytest.MonkeyPatch.context() as monkeypatch, layouts.usual_passes():
        run, _ = layouts.small_run(monkeypatch, data=4, fsdp=2)
        measure = jax.ShapeDtypeStruct((), bool, sharding=replicated(run.mesh))
        return collectives(
            run.train_step.lower(run.abstract, run.batch, measure).compile().as_text()
        )


@pytest.mark.medium
def test_in_a_step_memories_send_no_more_than_their_winners(step_traffic: list[Collective]) -> None:
    config = layouts.make_config()
    level, dim = config.sop.cls, config.head.dim
    winners = level.anchors * (1 + level.supports) * dim * 4
    drawn = [sent for sent in step_traffic if "/prototypes/" in sent.name]
    assert max(sent.bytes for sent in drawn) == winners
    assert not [sent for sent in step_traffic if "/memories/" in sent.name]


@pytest.mark.medium
def test_in_a_step_no_array_of_the_memory_or_of_scores_is_gathered(
    step_traffic: list[Collective],
) -> None:
    memory = 48 * 8 * 4  # including spare rows
    gathered = [sent for sent in step_traffic if sent.kind == "all-gather"]
    assert not [sent for sent in gathered if "prototypes" in sent.name and sent.bytes >= memory]
    weights = [sent for sent in gathered if "student" in sent.name or "teacher" in sent.name]
    assert weights  # one layer at a time is gathered
    largest = 64 * 16 * 4  # fc1 of a layer
    assert max(sent.bytes for sent in weights) <= largest


# Draws


def views_of(rows: jax.Array) -> Outputs:
    """Returns outputs of a teacher in which all views and patches of an image are the same row."""
    cls, patches = (
        jnp.stack([rows] * 2, axis=1),
        jnp.broadcast_to(rows[:, None, None], (16, 2, 1, 4)),
    )
    return Outputs(cls, patches, cls, patches)


@pytest.mark.medium
@pytest.mark.parametrize("size", [32, 40, 24])
def test_prototypes_are_the_same_on_any_devices_and_never_of_rows_too_old(size: int) -> None:
    config = paper()
    config.batch_size = 16
    config.sop.cls.update(dict(memory=size, anchors=size - 2, supports=2, tasks=1, weight=1.0))
    config.sop.pool = "all"
    config.sop.patch.update(dict(memory=16, tasks=0))
    drawn = []
    for devices in (1, 8):
        objective = sop(config, 4, make_mesh(devices), Length(10, 1.0))
        _, memories = objective.init(jax.random.key(0))
        teach = jax.jit(functools.partial(objective.teach, {}, {}))
        for step in range(6):
            rows = unit(jax.random.normal(jax.random.key(step), (16, 4)))
            index = 16 * step + jnp.arange(16, dtype=jnp.int32)
            memory = memories["cls"]
            masked = jnp.zeros((16, 2, 1), bool)
            sops, _, memories = teach(
                memories, views_of(rows), masked, index, {}, jax.random.key(1)
            )
        sops = sops["cls"].embeddings
        cosine = jnp.einsum("tskd,nd->tskn", sops, flat_rows(memory))
        np.testing.assert_allclose(cosine.max(-1), 1, atol=1e-5)
        images = memory.image.reshape(-1)[cosine.argmax(-1)]
        assert images.min() >= 80 - size and len(set(images[0, 0].tolist())) == size - 2
        drawn.append(sops)
    np.testing.assert_array_equal(*drawn)
