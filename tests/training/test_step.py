"""The train step as a whole: which parts of the state change, repeatability, and devices."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from small import small_config

from sop_jax import config as config_lib
from sop_jax.errors import UserError
from sop_jax.models import build
from sop_jax.objectives.objective import Objective, PatchIndices
from sop_jax.objectives.sop.objective import sop
from sop_jax.parallel.mesh import make_mesh, put, replicated, split
from sop_jax.schedules import Length
from sop_jax.training import optim
from sop_jax.training.assemble import assemble
from sop_jax.training.state import TrainState, init_state
from sop_jax.training.step import embed_views, encode_views, make_train_step, with_statistics

BATCH = 8
Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_config(dtype: str = "float32", local_crops: int = 2) -> ml_collections.ConfigDict:
    return small_config(
        batch_size=BATCH,
        steps=100,
        augment=dict(local_crops=local_crops),
        model=dict(dtype=dtype, init_std=0.2),
        sop=dict(
            cls=dict(memory=24, anchors=6, supports=2, tasks=2),
            patch=dict(memory=16, anchors=5),
            temperature_warmup_steps=10,
        ),
        optim=dict(lr=0.1, warmup_steps=3, momentum=(0.9, 1.0)),
    )


def make_batch(local_crops: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = functools.partial(rng.integers, 0, 256, dtype=np.uint8)
    return {
        "global_views": pixels(size=(BATCH, 2, 8, 8, 3)),
        "local_views": pixels(size=(BATCH, local_crops, 4, 4, 3)),
        "mask": rng.random((BATCH, 2, 2, 2)) < 0.5,
        "index": np.arange(100, 100 + BATCH, dtype=np.int32),
        "corrupt": np.full(BATCH, -1, np.int32),
    }


def make_run(
    config: ml_collections.ConfigDict,
    change: Callable[[Objective], Objective] = lambda x: x,
    most_masked: int | None = None,
) -> tuple[Callable[[], TrainState], Step]:
    """Returns a function that makes the first state, and the step, which is not compiled."""
    model = build(config, 8)
    length = Length(config.steps, 10.0)
    plan = optim.schedules(config, length)
    mesh = make_mesh(1)
    objective = change(sop(config, model.dim, mesh, length, most_masked))
    tx = optim.optimizer(config.optim, plan, objective.optimizers)
    init = functools.partial(init_state, model=model, objective=objective, tx=tx)
    init = jax.jit(init, out_shardings=replicated(mesh))
    return lambda: init(jax.random.key(0)), make_train_step(model, objective, tx, plan)


def watched(objective: Objective) -> Objective:
    """Returns the objective with one more metric: the filled rows of the memory that is read."""

    def teach(carried: Any, **inputs: Any) -> Any:
        shared, *others = objective.teach(carried=carried, **inputs)
        return shared | {"rows_read": carried["cls"].filled}, *others

    def loss(shared: Any, **inputs: Any) -> Any:
        total, terms = objective.loss(shared=shared, **inputs)
        return total, terms | {"rows_read": shared["rows_read"]}

    return objective._replace(teach=teach, loss=loss)


class Run:
    """A small run for most tests, compiled once, and its first steps."""

    def __init__(self) -> None:
        chex.clear_trace_counter()
        self.start, step = make_run(make_config(), watched)
        self.step = jax.jit(chex.assert_max_traces(step, n=1))
        self.batch = make_batch()
        self.states, self.metrics = [self.start()], []
        for i in range(40):
            state, metrics = self.step(self.states[-1], self.batch, i % 10 == 0)
            self.states.append(state)
            self.metrics.append(jax.device_get(metrics))


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def leaves(tree: Any) -> list[np.ndarray]:
    """Returns the arrays of a tree, including the data of random keys."""
    return [
        np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for x in jax.tree.leaves(tree)
    ]


def moved(before: Any, after: Any) -> list[bool]:
    return [not np.array_equal(a, b) for a, b in zip(leaves(before), leaves(after), strict=True)]


def test_one_program_serves_all_steps(run: Run) -> None:
    """The fixture allows only one trace, although `measure` and the step change."""
    assert len(run.metrics) == 40
    assert [int(state.step) for state in run.states] == list(range(41))


def test_loss_falls_on_a_batch_that_repeats(run: Run) -> None:
    for name in ("loss", "cls", "mim"):
        values = [row[name] for row in run.metrics]
        assert np.mean(values[-5:]) < np.mean(values[3:8]) - 0.05, name


def test_every_parameter_of_the_student_moves(run: Run) -> None:
    assert not any(moved(run.states[0].student, run.states[1].student))  # lr is 0 at step 0
    assert all(moved(run.states[1].student, run.states[3].student))


def test_teacher_moves_only_by_its_average(run: Run) -> None:
    for i in (0, 5, 39):
        before, after, m = run.states[i], run.states[i + 1], run.metrics[i]["momentum"]
        expected = jax.tree.map(
            lambda t, s, m=m: m * t + (1 - m) * s, before.teacher, after.student
        )
        chex.assert_trees_all_close(after.teacher, expected, rtol=2e-7, atol=1e-7)
    assert run.metrics[0]["momentum"] == pytest.approx(0.9)
    assert run.metrics[39]["momentum"] > 0.93


def test_same_state_and_batch_give_the_same_bits(run: Run) -> None:
    for i in (0, 3):
        state, metrics = run.step(run.states[i], run.batch, i % 10 == 0)
        assert not any(moved(run.states[i + 1], state))
        assert not any(moved(run.metrics[i], metrics))


def test_steps_draw_other_prototypes_and_keep_the_key(run: Run) -> None:
    first = run.states[1]
    later = TrainState(
        first.step + 1, first.student, first.teacher, first.opt_state, first.carried, first.key
    )
    _, metrics = run.step(later, run.batch, False)
    assert metrics["cls"] != pytest.approx(run.metrics[1]["cls"], rel=1e-4)
    assert not any(moved(run.states[0].key, run.states[-1].key))


def test_memories_take_a_row_of_each_image(run: Run) -> None:
    for name, size in (("cls", 24), ("patch", 16)):
        filled = [int(state.carried[name].filled) for state in run.states[:5]]
        assert filled == [min(i * BATCH, size) for i in range(5)]
        assert run.states[1].carried[name].image[:, 0].tolist() == list(range(100, 108))
        norms = jnp.linalg.norm(run.states[-1].carried[name].rows, axis=-1)
        np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_signs_of_health_are_measured_when_asked(run: Run) -> None:
    measured, skipped = run.metrics[10], run.metrics[11]
    for name in ("entropy", "effective_rank", "agreement", "embedding_std", "log_k"):
        assert measured[name] != 0
        assert skipped[name] == 0
    assert measured["memory_filled"] == 1
    assert 0 < measured["entropy"] <= measured["log_k"] == pytest.approx(np.log(6))


def test_metrics_contain_the_schedules_of_the_step_and_corrupt_images(run: Run) -> None:
    row = run.metrics[20]
    assert row["lr"] > 0
    assert row["teacher_temperature"] == pytest.approx(0.07)
    assert row["student_temperature"] == pytest.approx(0.1)
    assert row["loss"] == pytest.approx(row["cls"] + row["mim"], rel=1e-6)
    assert row["corrupt"].tolist() == [-1] * BATCH
    assert {np.ndim(value) for name, value in row.items() if name != "corrupt"} == {0}


def test_prototypes_come_from_the_memory_before_the_step_writes_it(run: Run) -> None:
    assert [int(row["rows_read"]) for row in run.metrics[:5]] == [0, 8, 16, 24, 24]


@pytest.fixture(scope="module")
def half() -> tuple[TrainState, TrainState, dict[str, jax.Array]]:
    """The states before and after donated steps of a bfloat16 model without local crops."""
    start, step = make_run(make_config("bfloat16", local_crops=0))
    state, step = start(), jax.jit(step, donate_argnums=0)
    before = state
    with jax.numpy_dtype_promotion("standard"):  # for the gradient of JAX's attention
        for _ in range(3):
            state, metrics = step(state, make_batch(local_crops=0), True)
    return before, state, metrics


@pytest.mark.medium
def test_half_precision_without_local_crops_is_finite_and_keeps_float32(
    half: tuple[TrainState, TrainState, dict[str, jax.Array]],
) -> None:
    _, state, metrics = half
    assert all(np.isfinite(value).all() for value in metrics.values())
    assert metrics["grad_norm"] > 0
    kept = jax.tree.leaves((state.student, state.teacher, state.carried))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.medium
def test_a_donated_state_gives_its_memory_to_the_next(
    half: tuple[TrainState, TrainState, dict[str, jax.Array]],
) -> None:
    before, after, _ = half
    heavy = (before.student, before.teacher, before.opt_state, before.carried)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(heavy))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_student_and_teacher_start_equal_but_share_no_array(run: Run) -> None:
    state = run.states[0]
    assert not any(moved(state.student, state.teacher))
    # They share no array, because both are donated to the next state.
    arrays = jax.tree.leaves((state.student, state.teacher))
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


@pytest.mark.medium
def test_a_head_on_masked_patches_only_changes_nothing() -> None:
    """Compares losses, gradient norm and memories with those of a head on all patches."""
    batch = make_batch(local_crops=0)
    mask = np.random.default_rng(1).permuted(np.eye(4, dtype=bool)[:, :2].sum(1) > 0)
    batch["mask"] = np.broadcast_to(mask.reshape(2, 2), (BATCH, 2, 2, 2)).copy()
    batch["mask"][0, 1] = False
    ends = []
    for most in (None, 2, 3):
        start, step = make_run(make_config(local_crops=0), most_masked=most)
        state, step = start(), jax.jit(step)
        for _ in range(3):
            state, metrics = step(state, batch, True)
        ends.append((state.carried, metrics))
    for end in ends[1:]:
        chex.assert_trees_all_close(ends[0], end, rtol=1e-4, atol=2e-5)


@pytest.mark.medium
def test_the_drawn_patch_is_remembered() -> None:
    """The patch memory gets the teacher's embedding of one patch of the second view."""
    config = make_config()
    start, step = make_run(config)
    state, batch = start(), make_batch()
    after, _ = jax.jit(step)(state, batch, False)
    _, patches = jax.jit(build(config, 8).embed)(state.teacher, batch["global_views"][:, 1])
    stored = after.carried["patch"].rows[:, 0]
    distance = jnp.abs(patches - stored[:, None]).max(-1)
    assert (distance.min(-1) < 1e-5).all()
    assert len(set(distance.argmin(-1).tolist())) > 1


@pytest.mark.medium
def test_no_array_is_as_large_as_the_labels_or_all_scores() -> None:
    """At the paper's size, the program has neither K(k+1) x K votes nor K x N scores."""
    config = config_lib.paper()
    config.batch_size = 8
    config.model.size = "ti"
    run = assemble(config, make_mesh(1), 1000)
    off = jax.ShapeDtypeStruct((), bool)
    jaxpr = jax.make_jaxpr(run.train_step)(run.abstract, run.batch, off)
    level = config.sop.cls
    labels = level.anchors**2 * (1 + level.supports)
    scores = level.anchors * level.memory
    assert largest(jaxpr.jaxpr) < min(labels, scores) / 4


def largest(jaxpr: Any) -> int:
    """Returns the number of elements of the largest array in a jaxpr."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    inner = [largest(body) for eqn in jaxpr.eqns for body in jaxprs_in_params(eqn.params)]
    return max(sizes + inner, default=0)


def test_a_run_of_more_steps_than_a_state_can_count_is_refused() -> None:
    config = make_config()
    config.steps, config.epochs = None, 1e30
    with pytest.raises(UserError, match=r"expected at most 2147483647.*--config\.epochs"):
        assemble(config, make_mesh(1), 1000)


@pytest.mark.medium
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("views", ["apart", "together"])
def test_the_head_normalizes_views_of_all_sizes_as_set(views: str, devices: int) -> None:
    """Both [CLS] and the selected patches of all views count, and running statistics follow."""
    config = make_config()
    config.head.update(dict(layers=2, batch_norm=True, batch_norm_views=views))
    model, mesh = build(config, 8), make_mesh(devices)
    batch = {name: put(array, split(mesh)) for name, array in make_batch().items()}
    params = jax.device_put(model.init(jax.random.key(0)), replicated(mesh))
    patches = put(np.tile(np.array([0, 3]), (BATCH, 2, 1)), split(mesh))

    @jax.jit
    def found(params: Any, batch: Any) -> Any:
        return embed_views(model, params, (0, 1, 2, 3), batch, PatchIndices(patches))

    @jax.jit
    def expected(params: Any, batch: Any) -> Any:
        """Returns the embeddings [.., d] of all tokens of both sizes, and running statistics."""
        sizes = [
            encode_views(model, params, batch[f"{size}_views"], None, patches=given)[0]
            for size, given in (("global", patches), ("local", None))
        ]
        rows = [x.reshape(-1, x.shape[-1]) for x in sizes]
        if views == "together":
            embedded, moved = model.project_training(params, jnp.concatenate(rows))
            embedded = jnp.split(embedded, [len(rows[0])])
        else:
            first, moved = model.project_training(params, rows[0])
            last, moved = model.project_training(with_statistics(params, moved), rows[1])
            embedded = [first, last]
        return [x.reshape(*of.shape[:-1], -1) for x, of in zip(embedded, sizes, strict=True)], moved

    outputs, statistics = found(params, batch)
    (of_global, of_local), moved = expected(params, batch)
    cls = np.concatenate([of_global[:, :, 0], of_local[:, :, 0]], axis=1)
    np.testing.assert_allclose(outputs.cls, cls, atol=1e-5)
    np.testing.assert_allclose(outputs.patches, of_global[:, :, 1:], atol=1e-5)
    assert outputs.patches.shape == (BATCH, 2, 2, config.head.dim)
    assert moved["head"].keys() == statistics["head"].keys()
    chex.assert_trees_all_close(statistics["head"], moved["head"], atol=1e-5)
    other = "apart" if views == "together" else "together"
    config.head.batch_norm_views = other
    model = build(config, 8)
    assert model.together == (other == "together")
    changed, _ = embed_views(model, params, (0, 1, 2, 3), batch, PatchIndices(patches))
    assert np.abs(changed.cls - outputs.cls).max() > 1e-2
