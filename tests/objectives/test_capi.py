"""CAPI: what both networks see, what the targets are, and which parameters each term moves."""

from typing import Any

import jax
import jax.numpy as jnp
import layouts
import ml_collections
import numpy as np
import pytest
from small import small_config

from sop_jax.check import check_config, without_use
from sop_jax.errors import UserError
from sop_jax.objectives.capi.clustering import ITERATIONS
from sop_jax.objectives.capi.health import verdict
from sop_jax.objectives.capi.objective import (
    capi,
    hidden_patches,
    of_patches,
    patch_places,
    visible_patches,
)
from sop_jax.objectives.losses import cross_entropy
from sop_jax.objectives.methods import method_of
from sop_jax.objectives.objective import Objective, Outputs
from sop_jax.parallel.mesh import make_mesh, put, replicated, split
from sop_jax.schedules import Length
from sop_jax.training.assemble import assemble

BATCH, VIEWS, SIDE, WIDTH, CLUSTERS = 8, 2, 4, 16, 6
PATCHES = SIDE * SIDE
HIDDEN = 10  # of 16 patches, at a ratio of 0.65
KEY = jax.random.key(3)


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    config = small_config(
        method="capi",
        batch_size=BATCH,
        augment=dict(global_size=16, local_size=8, local_crops=0),
        mask=dict(kind="random", ratio=(0.65, 0.65)),
        capi=dict(prototypes=CLUSTERS, predictor_depth=2, predicted=0.5),
    )
    config.model.init_std, config.model.drop_path = 0.3, 0.0
    config.update_from_flattened_dict(changes)
    return config


def objective(**changes: Any) -> Objective:
    return capi(make_config(**changes), make_mesh(1), Length(10, 1.0), (SIDE, SIDE))


def draw_mask(count: int = HIDDEN) -> jax.Array:
    """Returns masks that hide `count` patches of each view."""
    ranks = np.random.default_rng(0).random((BATCH, VIEWS, PATCHES)).argsort(-1)
    return jnp.asarray(ranks < count).reshape(BATCH, VIEWS, SIDE, SIDE)


def outputs(seed: int, patches: int) -> Outputs:
    keys = jax.random.split(jax.random.key(seed))
    cls = jax.random.normal(keys[0], (BATCH, VIEWS, WIDTH))
    some = jax.random.normal(keys[1], (BATCH, VIEWS, patches, WIDTH))
    return Outputs(cls[..., :1], some[..., :1], cls, some)


class Step:
    """The parts of one step on random features."""

    def __init__(self, **changes: Any) -> None:
        self.method = objective(**changes)
        self.params, self.carried = self.method.init(jax.random.key(0))
        self.masked = self.method.select(draw_mask(), jax.random.split(KEY, BATCH)).masked
        self.teacher = outputs(1, PATCHES)
        self.student = outputs(2, PATCHES - HIDDEN)
        self.shared, self.targets, _ = self.method.teach(
            *(self.params, self.params, self.carried, self.teacher, self.masked),
            *(jnp.arange(BATCH), {}, KEY),
        )

    def loss(self, params: Any, student: Outputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.method.loss(params, self.shared, self.targets, student, self.masked, {})


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


def balanced(scores: np.ndarray) -> np.ndarray:
    """Returns the assignments of one position in float64, as the authors' code computes them."""
    q = np.exp(scores - scores.max(0) + 50)
    for _ in range(ITERATIONS):
        q /= q.sum(0) + 1e-8
        q /= q.sum(1, keepdims=True) + 1e-8
    return q


@pytest.mark.parametrize("count", [HIDDEN, HIDDEN - 3, 0])
def test_the_encoder_sees_no_hidden_patch(count: int) -> None:
    """It sees the same number of patches if a mask is smaller, and the teacher always sees all."""
    mask = draw_mask(count)
    selection = objective().select(mask, jax.random.split(KEY, BATCH))
    kept = np.asarray(selection.student.kept)
    assert kept.shape == (BATCH, VIEWS, PATCHES - HIDDEN)
    assert not np.take_along_axis(np.asarray(selection.masked), kept, -1).any()
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(selection.student.patches[0, 0], np.arange(PATCHES - HIDDEN))
    np.testing.assert_array_equal(selection.teacher.patches[1, 1], np.arange(PATCHES))
    assert selection.teacher.kept is None


def test_random_hidden_patches_are_predicted() -> None:
    masked = draw_mask().reshape(BATCH, VIEWS, PATCHES)
    drawn = np.asarray(hidden_patches(masked, 5, KEY))
    assert np.take_along_axis(np.asarray(masked), drawn, -1).all()
    assert all(len({*row}) == 5 for row in drawn.reshape(-1, 5).tolist())
    assert (drawn != np.asarray(hidden_patches(masked, 5, jax.random.key(4)))).any()
    few = hidden_patches(draw_mask(2).reshape(BATCH, VIEWS, PATCHES), 5, KEY)
    found = of_patches(draw_mask(2).reshape(BATCH, VIEWS, PATCHES), few)
    assert (found.sum(-1) == 2).all() and found[..., :2].all()


def test_places_are_rows_and_columns() -> None:
    places = np.asarray(patch_places((2, 3)))
    np.testing.assert_allclose(places, [[0, 0], [0, 0.5], [0, 1], [1, 0], [1, 0.5], [1, 1]])
    np.testing.assert_array_equal(patch_places((1, 1)), [[0, 0]])


@pytest.mark.medium
def test_the_losses_are_those_of_the_definition(step: Step) -> None:
    """Each position is balanced over all views of the batch, and the predictions meet its rows."""
    config = make_config().capi
    loss, terms = step.loss(step.params, step.student)
    kernel = np.asarray(step.params["clustering"]["kernel"], np.float64)
    x = np.asarray(step.teacher.patch_features, np.float64)
    logits = x / np.linalg.norm(x, axis=-1, keepdims=True) @ kernel
    target = np.empty_like(logits)
    for position in range(PATCHES):
        scores = logits[:, :, position].reshape(-1, CLUSTERS) / config.target_temperature
        target[:, :, position] = balanced(scores).reshape(BATCH, VIEWS, CLUSTERS)
    log_p = jax.nn.log_softmax(jnp.asarray(logits / config.clustering_temperature, jnp.float32))
    clustering = cross_entropy(jnp.asarray(target, jnp.float32), log_p).mean()
    np.testing.assert_allclose(terms["clustering"], clustering, rtol=1e-5)
    np.testing.assert_allclose(loss, terms["clustering"] + terms["prediction"], rtol=1e-6)

    # A student's layer of one direction predicts all clusters alike, whatever the predictor does.
    prototypes = {"direction": jnp.ones((CLUSTERS, WIDTH)), "length": jnp.ones(CLUSTERS)}
    _, terms = step.loss(step.params | {"prototypes": prototypes}, step.student)
    mass = of_patches(jnp.asarray(target, jnp.float32), step.targets["hidden"]).sum(-1)
    np.testing.assert_allclose(terms["prediction"], mass.mean() * np.log(CLUSTERS), rtol=1e-5)


@pytest.mark.medium
def test_each_term_moves_its_own_parameters(step: Step) -> None:
    def gradients(term: str) -> Any:
        return jax.grad(lambda *given: step.loss(*given)[1][term], argnums=(0, 1))(
            step.params, step.student
        )

    by_params, by_student = gradients("prediction")
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_params["clustering"]))
    for name in ("predictor", "prototypes"):
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(by_params[name]))
    assert np.abs(by_student.cls_features).max() > 0 and np.abs(by_student.patch_features).max() > 0
    by_params, by_student = gradients("clustering")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(by_params["clustering"]))
    assert not any(leaf.any() for leaf in jax.tree.leaves((by_params["predictor"], by_student)))


@pytest.mark.medium
def test_a_view_without_hidden_patches_counts_as_zero(step: Step) -> None:
    _, terms = step.method.loss(
        *(step.params, step.shared, step.targets, step.student),
        *(jnp.zeros_like(step.masked), {}),
    )
    assert terms["prediction"] == 0


def test_the_targets_are_those_of_the_clustering_that_learns(step: Step) -> None:
    """Its average in the teacher has no part in them."""
    shared, _, _ = step.method.teach(
        *(step.params, jax.tree.map(jnp.zeros_like, step.params), step.carried, step.teacher),
        *(step.masked, jnp.arange(BATCH), {}, KEY),
    )
    np.testing.assert_array_equal(shared["peaks"], step.shared["peaks"])
    assert shared["peaks"].shape == (PATCHES, CLUSTERS)


@pytest.mark.medium
def test_branches_of_the_predictor_are_dropped_per_view() -> None:
    step = Step(**{"model.drop_path": 0.3})
    assert step.targets["drops"].shape == (BATCH, VIEWS, 2, 2)
    _, terms = step.loss(step.params, step.student)
    dropped = step.targets | {"drops": jnp.zeros_like(step.targets["drops"])}
    _, others = step.method.loss(step.params, step.shared, dropped, step.student, step.masked, {})
    assert np.isfinite(terms["prediction"]) and terms["prediction"] != others["prediction"]


@pytest.mark.medium
def test_signs_of_health_are_those_of_the_patches_to_predict(step: Step) -> None:
    signs = step.method.measure({}, step.shared, step.targets, step.student.cls, {})
    assert signs["log_k"] == pytest.approx(np.log(CLUSTERS))
    assert 0 < signs["entropy"] < signs["entropy_of_mean"] <= signs["log_k"] + 1e-6
    assert signs["embedding_std"] == pytest.approx(1, abs=0.1)  # random features
    row = {name: float(value) for name, value in signs.items()}
    assert verdict([row] * 3) is None
    uniform = row | {"entropy": row["log_k"], "embedding_std": 0.1}
    assert "collapsing" in (verdict([uniform] * 3) or "")
    assert verdict([row, uniform, uniform]) is None


WRONG = {
    "a Swin": ({"model.family": "swin"}, "only a ViT can leave"),
    "no masks": ({"mask.none": 1.0}, "mask.none is 1"),
    "nothing visible": ({"mask.ratio": (0.5, 1.0)}, "can hide 16 of 16 patches"),
    "one cluster": ({"capi.prototypes": 1}, "capi.prototypes is 1; expected 2 or more"),
    "a batch of one": (
        {"batch_size": 1, "augment.global_crops": 1},
        "batch_size is 1, but Sinkhorn-Knopp",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_named_at_the_start(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        method_of(make_config()).check(make_config(**changes))


def test_a_recipe_without_local_views_and_head_is_valid() -> None:
    config = make_config()
    check_config(config)
    assert {"head.dim", "augment.local_size", "sop.cls.memory"} < without_use(config).keys()
    one = make_config(**{"augment.global_crops": 1})
    check_config(one)


@pytest.mark.medium
def test_the_clustering_has_a_learning_rate_of_its_own() -> None:
    """With a rate of 0 for the network, only the clustering learns, and its loss falls."""
    config = make_config(**{"optim.lr": 0.0, "optim.min_lr": 0.0, "capi.lr": 0.05})
    config.steps, config.optim.warmup_steps = 20, 2
    run = assemble(config, make_mesh(1), images=100)
    batch = layouts.make_batch(run.batch)
    ranks = np.random.default_rng(0).random((BATCH, VIEWS, PATCHES)).argsort(-1)
    batch["mask"] = (ranks < HIDDEN).reshape(batch["mask"].shape)
    placed = {name: put(array, split(run.mesh)) for name, array in batch.items()}
    measure = put(np.array(False), replicated(run.mesh))
    state = run.init(jax.random.key(0))
    before, rows = jax.device_get(state.student), []
    for _ in range(12):
        state, metrics = run.train_step(state, placed, measure)
        rows.append(jax.device_get(metrics))
    after = jax.device_get(state.student)
    for name in ("backbone", "head"):
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    own = before["objective"], after["objective"]
    jax.tree.map(np.testing.assert_array_equal, *(part["predictor"] for part in own))
    assert np.abs(own[1]["clustering"]["kernel"] - own[0]["clustering"]["kernel"]).max() > 0.1
    assert rows[-1]["clustering"] < rows[0]["clustering"] - 0.1
    assert rows[3]["clustering_lr"] == pytest.approx(0.05, rel=0.05)


def test_visible_patches_are_in_order() -> None:
    masked = jnp.array([[[True, False, False, True, False]]])
    np.testing.assert_array_equal(visible_patches(masked, 3), [[[1, 2, 4]]])
