"""What is diagnosed: the prototypes and memories of runs of every method, and of files."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from begun import Saved, save, settings
from checkpoints import numbers, save_pth

from sop_jax.diagnosis import in_training, subjects
from sop_jax.diagnosis.subjects import Subject, of_file, of_run, once_per_image, steps_of
from sop_jax.errors import UserError
from sop_jax.objectives.memory import push
from sop_jax.objectives.methods import METHODS
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training.assemble import Run, assemble

# The layers of a run of each method, and their sizes, as `layouts.METHODS` sets them.
EXPECTED = {
    "dino": {"cls": 24},
    "ibot": {"cls": 24, "patch": 20},
    "swav": {"cls": 24},
    "msn": {"cls": 24},
    "pmsn": {"cls": 24},
    "carp": {"cls": 26},
    "decoupled": {"cls": 24, "patch": 20},
    "capi": {"clustering": 12},
    "massl": {"memory": 40},
    "sop": {"cls_anchors": 6, "patch_anchors": 5, "cls_memory": 40, "patch_memory": 24},
}


def directions(rows: Any) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_every_method_is_diagnosed():
    assert EXPECTED.keys() == METHODS.keys()


@pytest.fixture(scope="module", params=EXPECTED)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("run") / request.param, request.param)


@pytest.mark.medium
def test_a_run_has_the_prototypes_of_its_targets(saved: Saved) -> None:
    found, state, method = of_run(saved.workdir), saved.state, saved.config.method
    assert found.step == 3
    assert {x.layer: len(x.rows) for x in found.subjects} == EXPECTED[method]
    rows = {x.layer: directions(x.rows) for x in found.subjects}
    if method in ("dino", "ibot", "carp"):
        own = state.teacher["objective"]["prototypes"]["cls"]["direction"]
    elif method in ("msn", "pmsn"):  # whose targets are from the prototypes that learn
        own = state.student["objective"]["prototypes"]["cls"]["direction"]
    elif method == "swav":
        own = state.teacher["objective"]["prototypes"]["cls"]["normalized"]
    elif method == "decoupled":
        own = state.carried["source"].total
    elif method == "capi":
        own = state.student["objective"]["clustering"]["kernel"].T
    else:
        return
    np.testing.assert_allclose(rows[next(iter(rows))], directions(own), atol=1e-6)


@pytest.mark.medium
def test_a_student_has_its_own(saved: Saved) -> None:
    taught, learnt = of_run(saved.workdir), of_run(saved.workdir, network="student")
    method = saved.config.method
    if method == "capi":
        assert [x.layer for x in learnt.subjects] == ["prototypes"]
        return
    differs = method in ("dino", "ibot", "carp", "swav")
    for one, other in zip(taught.subjects, learnt.subjects, strict=True):
        assert one.layer == other.layer
        different = differs or (method, one.layer) == ("decoupled", "patch")
        assert np.array_equal(one.rows, other.rows) != different, one.layer


@pytest.mark.medium
def test_a_run_counts_the_first_of_them_at_its_evaluations(saved: Saved) -> None:
    row = in_training.make_counter(saved.config, saved.run)(saved.state)
    assert row["prototypes_count"] == next(iter(EXPECTED[saved.config.method].values()))
    assert row["prototypes_unique"] == round(row["prototypes_share"] * row["prototypes_count"])
    assert in_training.result_of(row)["eps"][0]["share"] == row["prototypes_share_eps0.001"]


def test_a_count_is_that_of_planted_duplicates():
    rows = np.repeat(np.eye(8, 16, dtype=np.float32), [1, 1, 2, 3, 1, 1, 1, 2], axis=0)
    row = in_training.counts(rows)
    assert row["prototypes_unique"] == 8 and row["prototypes_share"] == 8 / 12
    assert in_training.sentence(row) == "8 of 12 prototypes are unique (66.7 %) at eps 0.025"
    none = in_training.counts(np.zeros((3, 4), np.float32))
    assert none.keys() == row.keys() and set(none.values()) == {None}
    assert in_training.sentence(none) is None


@pytest.fixture(scope="module")
def sop_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return assemble(settings("sop"), make_mesh(1), images=1000)


@pytest.mark.medium
def test_a_memory_begins_with_its_newest_rows_and_anchors_are_among_them(
    sop_run: Run, tmp_path: pathlib.Path
) -> None:
    state = sop_run.init(jax.random.key(0))
    memory = state.carried["cls"]  # 40 rows in 16 lanes of 3 slots
    pushed = [numbers(16, 8, seed=seed) for seed in range(2)]
    for seed, rows in enumerate(pushed):
        memory = push(memory, jnp.asarray(rows), jnp.arange(16, dtype=jnp.int32) + 8 * seed)
    save(
        tmp_path / "run",
        settings("sop"),
        {1: state._replace(carried=state.carried | {"cls": memory})},
    )
    found = {x.layer: x for x in of_run(tmp_path / "run").subjects}
    held = found["cls_memory"]
    newest = np.concatenate([pushed[1], pushed[0]])
    assert sorted(map(tuple, held.rows[:16])) == sorted(map(tuple, pushed[1]))
    assert sorted(map(tuple, held.rows[:32])) == sorted(map(tuple, newest))
    assert set(held.images[:16]) == set(range(8, 24)) and set(held.images[16:32]) == set(range(16))
    random = held.images[32:]
    assert (random < 0).all() and len(set(random)) == 8  # random rows are from no image
    once = once_per_image(held)
    assert once is not None and len(once.rows) == 24 + 8  # 8 images have two rows
    np.testing.assert_array_equal(once.rows[:16], held.rows[:16])
    anchors = found["cls_anchors"]
    assert {tuple(row) for row in anchors.rows} <= {tuple(row) for row in held.rows}
    other = {x.layer: x for x in of_run(tmp_path / "run", seed=1).subjects}["cls_anchors"]
    assert not np.array_equal(other.rows, anchors.rows)


def test_memories_whose_images_all_differ_have_no_second_count():
    rows = numbers(3, 4)
    assert once_per_image(Subject("memory", rows, None, "cls")) is None
    assert once_per_image(Subject("memory", rows, np.array([4, -2, 1]), "cls")) is None


@pytest.mark.medium
def test_only_one_layer_can_be_taken(saved: Saved) -> None:
    last = list(EXPECTED[saved.config.method])[-1]
    assert [x.layer for x in of_run(saved.workdir, layer=last).subjects] == [last]
    with pytest.raises(UserError, match=f"no layer '{last}x'; did you mean {last}"):
        of_run(saved.workdir, layer=f"{last}x")


@pytest.mark.medium
def test_steps_are_those_of_the_checkpoints(sop_run: Run, tmp_path: pathlib.Path) -> None:
    state = sop_run.init(jax.random.key(0))
    save(tmp_path / "run", settings("sop"), {2: state, 5: state, 9: state})
    for asked, steps in {None: [9], "all": [2, 5, 9], "5": [5], "9, 2": [2, 9]}.items():
        assert steps_of(tmp_path / "run", asked) == steps
    with pytest.raises(UserError, match=r"no checkpoint of step 4 in .*only of \[2, 5, 9\]"):
        steps_of(tmp_path / "run", "2,4")
    with pytest.raises(UserError, match="--step=al is not a step; expected whole numbers"):
        steps_of(tmp_path / "run", "al")
    with pytest.raises(UserError, match="is not the folder of a run; check --workdir"):
        steps_of(tmp_path, None)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (0.0, "length 0")])
def test_rows_without_a_direction_are_an_error(
    value: float, message: str, tmp_path: pathlib.Path
) -> None:
    rows = numbers(5, 4)
    rows[2] = value
    path = save_pth(tmp_path / "f.pth", {"prototypes": rows})
    with pytest.raises(UserError, match="rows of prototypes") as error:
        of_file(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_what_is_compared_with_the_layers_of_a_file(tmp_path: pathlib.Path) -> None:
    content = {
        f"teacher.head.{name}.weight": numbers(4, 3, seed=len(name))
        for name in ("last_layer", "last_layer2")
    }
    found = of_file(save_pth(tmp_path / "f.pth", content)).subjects
    assert [x.compared for x in found] == ["cls", "patches"]
    (clusters,) = of_file(
        save_pth(tmp_path / "g.pth", {"head.layer.weight": numbers(4, 3)})
    ).subjects
    assert clusters.compared == "patch_features"
    assert subjects.once_per_image(clusters) is None
