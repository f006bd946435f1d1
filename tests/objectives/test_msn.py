"""MSN: which views and patches its networks see, whose prototypes it uses, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import layouts
import ml_collections
import numpy as np
import pytest
from small import small_config

from sop_jax.check import check_config
from sop_jax.errors import UserError
from sop_jax.objectives.msn import MSN, dropping
from sop_jax.objectives.objective import Outputs
from sop_jax.parallel.mesh import make_mesh, put, replicated, split
from sop_jax.schedules import Length
from sop_jax.training.assemble import assemble

SWIN = {
    "model.family": "swin",
    "model.size": "t",
    "augment.global_size": 32,
    "augment.local_size": 32,
}


def msn_config(method: str = "msn", **changes: Any) -> ml_collections.ConfigDict:
    augment = dict(global_size=16, local_size=8, local_crops=2)
    config = small_config(method=method, batch_size=4, augment=augment)
    config[method].prototypes = 6
    config.update_from_flattened_dict(changes)
    return config


def test_the_teacher_sees_one_view_and_the_student_all_others() -> None:
    objective = MSN.build(msn_config(), 8, make_mesh(1), Length(10, 5.0), (4, 4))
    assert objective.teacher_views == (0,)
    assert objective.student_views == (1, 2, 3)


@pytest.mark.parametrize(("share", "kept"), [(0.15, 13), (0.5, 8), (0.99, 1)])
def test_the_student_lacks_a_share_of_the_patches(share: float, kept: int) -> None:
    select, mask = dropping(share), jnp.zeros((5, 2, 4, 4), bool)
    keys = jax.random.split(jax.random.key(0), 5)
    selection = select(mask, keys)
    assert selection.student.kept is not None
    drawn = np.asarray(selection.student.kept)
    assert drawn.shape == (5, 2, kept)
    assert all(len(set(view)) == kept and set(view) <= set(range(16)) for view in drawn[:, 0])
    assert len({tuple(sorted(view)) for view in drawn.reshape(-1, kept).tolist()}) > 1
    assert selection.teacher.kept is None
    assert selection.student.patches.size == selection.teacher.patches.size == 0
    # What an image draws does not depend on the others.
    alone = select(mask[2:3], keys[2:3]).student.kept
    np.testing.assert_array_equal(alone, drawn[2:3])


def test_no_patch_is_dropped_with_a_share_of_zero() -> None:
    selection = dropping(0.0)(jnp.zeros((3, 2, 4, 4), bool), jax.random.split(jax.random.key(0), 3))
    assert selection.student.kept is None


def test_targets_use_the_prototypes_of_the_student() -> None:
    objective = MSN.build(msn_config(), 8, make_mesh(1), Length(10, 5.0), (4, 4))
    student, carried = objective.init(jax.random.key(0))
    teacher, _ = objective.init(jax.random.key(1))
    empty = jnp.zeros((4, 1, 0, 8))
    cls = jax.random.normal(jax.random.key(2), (4, 1, 8))
    shared, _, _ = objective.teach(
        student_params=student,
        teacher_params=teacher,
        carried=carried,
        teacher=Outputs(cls, empty, cls, empty),
        masked=jnp.zeros((4, 2, 0), bool),
        index=jnp.arange(4),
        now={name: schedule(0) for name, schedule in objective.schedules.items()},
        key=jax.random.key(3),
    )
    found = shared["prototypes"]["cls"]["direction"]
    np.testing.assert_array_equal(found, student["prototypes"]["cls"]["direction"])


@pytest.mark.parametrize("method", ["msn", "pmsn"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SWIN, "patch_drop is 0.15, but only a ViT can drop patches"),
        ({"accumulate": 2}, "accumulate is 2, but .*prior is"),
    ],
    ids=["a Swin", "microbatches"],
)
def test_what_it_cannot_do_is_an_error(method: str, changes: dict[str, Any], message: str) -> None:
    check_config(msn_config(method))
    with pytest.raises(UserError, match=message):
        check_config(msn_config(method, **changes))


@pytest.mark.medium
def test_masks_change_nothing() -> None:
    run = assemble(msn_config(batch_size=8, steps=10), make_mesh(1), images=100)
    batch = layouts.make_batch(run.batch)
    measure = put(np.array(False), replicated(run.mesh))

    def loss(mask: np.ndarray) -> float:
        given = {name: put(x, split(run.mesh)) for name, x in (batch | {"mask": mask}).items()}
        _, metrics = run.train_step(run.init(jax.random.key(0)), given, measure)
        return float(metrics["loss"])

    assert loss(batch["mask"]) == loss(np.zeros_like(batch["mask"]))
