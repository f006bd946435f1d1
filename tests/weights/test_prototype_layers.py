"""Layers of prototypes in files of weights: which are found, which are taken, and their rows."""

import pathlib
from typing import Any

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from checkpoints import numbers, save_pth

from sop_jax.errors import UserError
from sop_jax.weights import files, prototype_layers

LENGTHS, ROWS = np.linspace(0.5, 2, 6, dtype=np.float32)[:, None], numbers(6, 4, seed=1)
NORMED = LENGTHS * ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
OTHER = numbers(5, 4, seed=2)

OLD = {"weight_g": LENGTHS, "weight_v": ROWS}
NEW = {"parametrizations.weight.original0": LENGTHS, "parametrizations.weight.original1": ROWS}


def layer(name: str, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}.{part}": array for part, array in parts.items()}


def network(wrapper: str, head: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a part of a checkpoint in which the arrays of a head follow those of a backbone."""
    return {f"{wrapper}backbone.norm.weight": numbers(4)} | {
        f"{wrapper}{name}": array for name, array in head.items()
    }


# The contents of files as each project's code writes them, and the layers that are taken.
FILES: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "DINO and CARP": (
        {
            "student": network(
                "module.", layer("head.last_layer", {"weight_v": OTHER, "weight_g": LENGTHS[:5]})
            ),
            "teacher": network("", layer("head.last_layer", OLD)),
            "optimizer": {"state": {0: {"exp_avg": ROWS}}},
            "epoch": 800,
            "dino_loss": {"center": numbers(1, 6)},
        },
        {"teacher.head.last_layer": NORMED},
    ),
    "iBOT with prototypes of patches": (
        {
            "student": network("module.", layer("head.last_layer", OLD)),
            "teacher": network(
                "module.",
                layer("head.last_layer", OLD)
                | layer(
                    "head.last_layer2", {"weight_g": np.ones((5, 1), np.float32), "weight_v": OTHER}
                ),
            ),
        },
        {
            "teacher.module.head.last_layer": NORMED,
            "teacher.module.head.last_layer2": OTHER / np.linalg.norm(OTHER, axis=1, keepdims=True),
        },
    ),
    "iBOT with shared prototypes": (
        {"teacher": layer("head.last_layer", OLD) | layer("head.last_layer2", OLD)},
        {"teacher.head.last_layer": NORMED},
    ),
    "DINOv2": (
        {
            "teacher": layer("dino_head.last_layer", NEW)
            | layer("ibot_head.last_layer", {"weight": OTHER})
        },
        {"teacher.dino_head.last_layer": NORMED, "teacher.ibot_head.last_layer": OTHER},
    ),
    "MSN": (
        {
            "encoder": network("module.", {"fc.fc1.weight": numbers(4, 4)}),
            "target_encoder": network("module.", {"fc.fc1.weight": numbers(4, 4)}),
            "prototypes": ROWS,
        },
        {"prototypes": ROWS},
    ),
    "SwAV": (
        network("module.", {"projection_head.0.weight": numbers(4, 4), "prototypes.weight": ROWS}),
        {"module.prototypes.weight".removesuffix(".weight"): ROWS},
    ),
    "SwAV with several heads": (
        {
            "state_dict": {
                "module.prototypes.prototypes0.weight": ROWS,
                "module.prototypes.prototypes1.weight": OTHER,
            }
        },
        {
            "state_dict.module.prototypes.prototypes0": ROWS,
            "state_dict.module.prototypes.prototypes1": OTHER,
        },
    ),
    "CAPI's teacher": (
        network("", {"head.layer.weight": ROWS, "head.layer.bias": numbers(6)}),
        {"head.layer": ROWS},
    ),
    "CAPI's training": (
        {
            "model": {
                **network("student.", layer("head.last_layer", OLD)),
                **network("student_ema.", layer("head.last_layer", OLD)),
                **network("teacher.", {"head.layer.weight": OTHER}),
            }
        },
        {"model.teacher.head.layer": OTHER},
    ),
}


def read(path: pathlib.Path, *asked: Any) -> tuple[dict[str, np.ndarray], str]:
    with files.opened(path) as arrays:
        layers, words = prototype_layers.read(arrays, *asked)
    return {found.name: found.rows for found in layers}, "\n".join(words)


@pytest.mark.parametrize("project", FILES)
def test_the_prototypes_of_a_project_are_found(project: str, tmp_path: pathlib.Path) -> None:
    content, expected = FILES[project]
    found, _ = read(save_pth(tmp_path / "f.pth", content))
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-6)


def test_both_forms_of_weight_norm_and_half_precision_give_the_same(tmp_path: pathlib.Path) -> None:
    old, _ = read(save_pth(tmp_path / "old.pth", layer("head.last_layer", OLD)))
    new, _ = read(save_pth(tmp_path / "new.pth", layer("head.last_layer", NEW)))
    np.testing.assert_array_equal(old["head.last_layer"], new["head.last_layer"])
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in OLD.items()}
    low, _ = read(save_pth(tmp_path / "low.pth", layer("head.last_layer", half)))
    np.testing.assert_allclose(low["head.last_layer"], old["head.last_layer"], atol=0.02)


def test_what_was_taken_and_how_to_take_another_is_said(tmp_path: pathlib.Path) -> None:
    path = save_pth(tmp_path / "f.pth", FILES["DINO and CARP"][0])
    _, words = read(path)
    assert words == (
        "taken: teacher.head.last_layer, as the teacher's; not taken: "
        "student.module.head.last_layer (choose one with --layer)"
    )
    for asked in (("student",), (None, "student"), (None, "student.module.head.last_layer")):
        found, _ = read(path, *asked)
        assert found.keys() == {"student.module.head.last_layer"}
    _, words = read(save_pth(tmp_path / "g.pth", FILES["iBOT with shared prototypes"][0]))
    assert words.endswith(
        "teacher.head.last_layer2 is the same as teacher.head.last_layer, and left out"
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((None, "techer"), "no layer of prototypes is called 'techer'.*expected one of student"),
        ((None, "last_layer"), "several layers fit 'last_layer'; expected one of student"),
        (("student", "teacher"), "no layer of prototypes is called 'teacher'"),
    ],
)
def test_a_layer_that_is_not_there_is_an_error(
    asked: tuple[Any, ...], message: str, tmp_path: pathlib.Path
) -> None:
    path = save_pth(tmp_path / "f.pth", FILES["DINO and CARP"][0])
    with pytest.raises(UserError, match=message):
        read(path, *asked)


def test_prototypes_of_both_networks_belong_to_neither(tmp_path: pathlib.Path) -> None:
    path = save_pth(tmp_path / "f.pth", FILES["MSN"][0])
    with pytest.raises(UserError, match="belongs to a teacher: it has prototypes; leave out"):
        read(path, "teacher")


def test_a_backbone_alone_has_none(tmp_path: pathlib.Path) -> None:
    path = save_pth(tmp_path / "dino_deitsmall16_pretrain.pth", checkpoints.vit())
    with pytest.raises(
        UserError, match=r"it has no prototypes: none of its .*_full_checkpoint\.pth"
    ):
        read(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"prototypes": numbers(4)}, r"prototypes has the shape \[4\]; expected"),
        ({"prototypes": numbers(0, 4)}, r"prototypes has the shape \[0, 4\]; expected"),
        (layer("last_layer", {"weight_g": LENGTHS[:2], "weight_v": ROWS}), "6 directions, but 2"),
    ],
)
def test_what_is_no_matrix_of_prototypes_is_an_error(
    arrays: dict[str, np.ndarray], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=message):
        read(save_pth(tmp_path / "f.pth", arrays))


@pytest.mark.parametrize(
    "values", [np.array([["a"]]), np.ones((2, 3), np.complex64), np.array([[None]])]
)
def test_what_is_no_number_is_an_error(values: np.ndarray) -> None:
    with pytest.raises(UserError, match="prototypes has values of the type .*expected real num"):
        prototype_layers.read({"prototypes": values})
