"""Files of weights of other projects: what is read, what is refused, and both directions."""

import argparse
import os
import pathlib
import pickle
import zipfile
from typing import Any

import checkpoints
import jax
import ml_collections
import ml_dtypes
import numpy as np
import pytest
import test_golden
from checkpoints import Call, Named, Stated, bfloat16, numbers, save_pth
from safetensors.numpy import save_file

from sop_jax import config as config_lib
from sop_jax.errors import UserError
from sop_jax.models import build
from sop_jax.settings import flatten
from sop_jax.training.checkpoint import named_leaves
from sop_jax.weights import files, mapping, pytorch, recognition
from sop_jax.weights.tables import LAYOUTS

NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit with LayerScale": {"model.layer_scale": 0.1},
    "vit with registers": {"model.layer_scale": 0.1, "model.registers": 3},
    "swin": {
        "model.family": "swin",
        "model.width": 12,
        "model.stage_depths": (1, 2, 2, 1),
        "model.stage_heads": (1, 2, 3, 6),
        "augment.global_size": 224,
    },
    "resnet": {"model.family": "resnet", "model.width": 4, "model.stage_depths": (2, 1, 3, 1)},
    "resnet for small images": {
        "model.family": "resnet",
        "model.width": 4,
        "model.stage_depths": (2, 1, 3, 1),
        "model.stem": "small",
    },
    "resnet of basic blocks": {
        "model.family": "resnet",
        "model.width": 4,
        "model.stage_depths": (2, 1, 3),
        "model.block": "basic",
    },
}
# The networks that each project has.
EXPORTS = [
    *((network, "timm") for network in NETWORKS),
    *((network, project) for network in NETWORKS for project in ("hf", "hf4")),
    *((network, "ibot") for network in ("vit", "swin", "resnet")),
    *((network, "dinov2") for network in ("vit with LayerScale", "vit with registers")),
    *(("vit", project) for project in ("mae", "msn")),
]


def tiny_config(**changes: Any) -> ml_collections.ConfigDict:
    config = config_lib.paper()
    config.update_from_flattened_dict(
        {
            "augment.global_size": 16,
            "model.size": "custom",
            "model.width": 32,
            "model.depth": 2,
            "model.heads": 2,
            "model.patch": 4,
            "model.dtype": "float32",
            "head.hidden": 24,
            "head.dim": 16,
        }
        | changes
    )
    return config


def random_leaves(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Returns the parameters of a network, all of whose layers differ."""
    model = build(config, config.augment.global_size)
    shapes = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
    return {
        path: numbers(*leaf.shape, seed=i) for i, (path, leaf) in enumerate(sorted(shapes.items()))
    }


def shapes_of(leaves: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves.items()}


def never(table: np.ndarray, rows: int) -> np.ndarray:
    raise AssertionError("resized")


def load(
    arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], likely: str = "ibot"
) -> mapping.Loaded:
    file = recognition.recognise(arrays, likely)
    return mapping.load_leaves(file.layout, file.arrays, shapes, never)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    with files.opened(path) as arrays:
        return dict(arrays)


def ibot_shapes() -> dict[str, tuple[int, ...]]:
    return shapes_of(random_leaves(tiny_config()))


# ------------------------------------------------------------------------------------------- files

CONTENT = {"a": numbers(2, 3), "b.c": bfloat16(numbers(5)), "d": np.arange(3)}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pth_gives_its_arrays_bit_for_bit(tmp_path: pathlib.Path, legacy: bool) -> None:
    base = numbers(6, 8)
    content = CONTENT | {"view": base[1:4, ::2], "transposed": base.T, "half": np.float16([1, 2])}
    found = read(save_pth(tmp_path / "f.pth", content, legacy))
    assert found.keys() == content.keys()
    for name, array in content.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_safetensors_and_npz_give_their_arrays(tmp_path: pathlib.Path) -> None:
    save_file(CONTENT, tmp_path / "f.safetensors")
    plain = {name: array for name, array in CONTENT.items() if name != "b.c"}
    np.savez(tmp_path / "f.npz", **plain)
    for found, expected in (
        (read(tmp_path / "f.safetensors"), CONTENT),
        (read(tmp_path / "f.npz"), plain),
    ):
        assert found.keys() == expected.keys()
        assert all((found[name] == array).all() for name, array in expected.items())


def test_settings_of_a_training_are_passed_over(tmp_path: pathlib.Path) -> None:
    settings = argparse.Namespace(arch="vit_small", path=pathlib.PurePosixPath("/data"))
    settings.path = Call(Named("pathlib", "PosixPath"), "/", "data")
    settings.best = Call(
        Named("numpy._core.multiarray", "scalar"), Call(Named("numpy", "dtype"), "f8"), b"12345678"
    )
    array = Call(Named("numpy._core.multiarray", "_reconstruct"), Named("numpy", "ndarray"), (0,))
    others = {"seen": {1, 2}, "array": array, "epoch": 3, "lr": [0.1, None]}
    content = {"teacher": {"a": numbers(2)}, "args": settings} | others
    assert read(save_pth(tmp_path / "f.pth", content)).keys() == {"teacher.a"}


EVIL = {
    "a command": lambda file: Call(os.system, f"touch {file}"),
    "a command by name": lambda file: Call(Named("subprocess", "getoutput"), f"touch {file}"),
    "an expression": lambda file: Call(eval, f"open({str(file)!r}, 'w')"),
    "an attribute": lambda file: Call(getattr, os, "system"),
    "a method": lambda file: Call(Named("pathlib", "Path.touch"), str(file)),
    "an import": lambda file: Call(Named("importlib", "import_module"), "antigravity"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", EVIL)
def test_code_in_a_pickle_is_refused_and_never_run(
    tmp_path: pathlib.Path, kind: str, legacy: bool
) -> None:
    made = tmp_path / "made"
    if kind == "an attribute":
        evil: Any = Call(getattr, Named("os", "environ"), "clear")
    else:
        evil = EVIL[kind](made)
    content = {"teacher": {"a": numbers(2)}, "args": evil}
    with pytest.raises(UserError, match=r"is refused: it contains .* nothing .* was run or loaded"):
        read(save_pth(tmp_path / "f.pth", content, legacy))
    assert not made.exists()


@pytest.mark.parametrize(
    "named, state",
    [
        (("torch", "BFloat16Storage"), (3, ">", None, None, None, 1 << 20, 64, 0)),
        (("torch._utils", "_rebuild_tensor_v2"), {"made": 1}),
        (("torch._utils", "_rebuild_tensor_v2"), (None, {"__defaults__": (1,)})),
        (("torch", "Size"), {"made": 1}),
        (("torch", "device"), (None, {"made": 1})),
        (("collections", "OrderedDict"), (None, {"made": 1})),
    ],
)
def test_a_pickle_changes_nothing_that_it_names(
    tmp_path: pathlib.Path, named: tuple[str, str], state: Any
) -> None:
    bfloat16_type = np.dtype(ml_dtypes.bfloat16)

    def things() -> Any:
        functions = (pytorch._rebuild, pytorch._as_given)
        of_functions = [(dict(vars(x)), x.__defaults__) for x in functions]
        return of_functions, sorted(vars(pytorch._Gap)), bfloat16_type.__reduce__()[2]

    before = things()
    content = {"teacher": {"a": numbers(2)}, "args": Stated(Named(*named), state)}
    file = save_pth(tmp_path / "f.pth", content)
    try:
        with pytest.raises(UserError, match="cannot be read"):
            read(file)
        assert things() == before
        assert bfloat16_type.itemsize == 2
    finally:  # it is global, and other tests follow
        bfloat16_type.__setstate__(before[-1])


def test_the_malicious_files_would_run_code_elsewhere(tmp_path: pathlib.Path) -> None:
    pickle.loads(checkpoints.pickled(EVIL["a command"](tmp_path / "made")))
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["f.pth", "legacy.pth", "f.safetensors", "f.npz"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file_is_one_error(tmp_path: pathlib.Path, name: str, share: float) -> None:
    file = tmp_path / name
    content = {"a": numbers(40, 50), "b": numbers(60)}
    if file.suffix == ".pth":
        save_pth(file, content, legacy=name == "legacy.pth")
    elif file.suffix == ".npz":
        np.savez(file, **content)
    else:
        save_file(content, file)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=f"{name} cannot be read: .*It may be truncated"):
        read(file)


def test_changed_bytes_are_noticed(tmp_path: pathlib.Path) -> None:
    file = save_pth(tmp_path / "f.pth", {"a": numbers(40, 50)})
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        read(file)


@pytest.mark.parametrize(
    "offset, shape, strides",
    [(0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 2), (1, 9)), (-1, (2,), (1,)), (3, (2,), (-1,))],
)
def test_array_beyond_its_bytes_is_refused(
    tmp_path: pathlib.Path, offset: int, shape: Any, strides: Any
) -> None:
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    storage = checkpoints.Storage("0", numbers(6))
    data = checkpoints.pickled({"a": Call(rebuild, storage, offset, shape, strides, False, {})})
    with zipfile.ZipFile(tmp_path / "f.pth", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", numbers(6).tobytes())
    with pytest.raises(UserError, match="cannot be read: an array"):
        read(tmp_path / "f.pth")


def test_other_files_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="there is no file .*absent.pth"):
        read(tmp_path / "absent.pth")
    np.savez(tmp_path / "f.npz", a=np.array([{"a": 1}], object))
    (tmp_path / "text.pth").write_text("once upon a time")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme", "an archive")
    for name in ("f.npz", "text.pth", "other.pth"):
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path / name)


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("network, project", EXPORTS)
def test_round_trip_is_bit_exact(network: str, project: str) -> None:
    config = tiny_config(**NETWORKS[network])
    leaves = random_leaves(config)
    if (network, project) == ("vit with registers", "timm"):  # it has no position for [CLS]
        leaves["backbone/pos_embed"][0] = 0
    arrays, left, _ = mapping.export(project, config.model.family, leaves)
    assert all(path.startswith("head/") or path == "backbone/mask_token" for path in left)

    file = recognition.recognise(arrays, project)
    assert file.layout.project in (project, {"hf4": "hf"}.get(project))  # a ResNet's are the same
    loaded = mapping.load_leaves(file.layout, file.arrays, shapes_of(leaves), never)
    assert sorted(loaded.missing) == sorted(left) and not loaded.ignored
    for path, leaf in loaded.leaves.items():
        assert leaf.tobytes() == leaves[path].tobytes(), path
    again, *_ = mapping.export(project, config.model.family, leaves | loaded.leaves)
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }

    found = mapping.describe(file.layout, file.arrays)
    same = [name for name in found if name in NETWORKS[network] or name == "model.width"]
    asked = flatten(config)
    for name in set(same) - {"model.layer_scale"}:
        value = list(found[name]) if isinstance(found[name], tuple) else found[name]
        assert value == asked[name], name


def test_every_layout_makes_a_round_trip() -> None:
    tried = {
        (project, NETWORKS[network].get("model.family", "vit")) for network, project in EXPORTS
    }
    assert tried == {(layout.project, layout.family) for layout in LAYOUTS}


def test_layout_is_recognised_by_names() -> None:
    vit = checkpoints.vit()
    classifier = {"head.weight": numbers(10, 32), "head.bias": numbers(10)}
    gammas = {f"blocks.{i}.ls{n}.gamma": numbers(32) for i in range(2) for n in (1, 2)}
    for arrays, expected in (
        (checkpoints.ibot(wrapper="module."), "ibot"),
        (vit, "ibot"),  # like the backbones of DINO
        (vit | {"masked_embed": numbers(1, 32)}, "ibot"),
        (vit | classifier, "timm"),
        (vit | gammas, "timm"),
        (vit | gammas | {"mask_token": numbers(1, 32)}, "dinov2"),
    ):
        assert recognition.recognise(arrays, "ibot").layout.project == expected
    file = recognition.recognise(vit, "timm")
    assert file.layout.project == "timm"
    assert [x.project for x in file.alike] == ["ibot", "mae", "msn"]
    assert recognition.recognise(checkpoints.ibot(), "timm").layout.project == "ibot"


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_table_gives_what_golden_numbers_were_computed_with(family: str) -> None:
    golden = test_golden.load("backbone.npz")
    before = f"{family}/weights/"
    arrays = {name.removeprefix(before): x for name, x in golden.items() if before in name}
    if family == "vit":
        expected = test_golden.vit_params(golden, int(golden["vit/config"][3]))
    else:
        expected = test_golden.swin_params(golden, (2, 2, 2, 2))
    leaves = named_leaves({"backbone": expected})
    loaded = load(arrays, shapes_of(leaves))
    assert loaded.leaves.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(loaded.leaves[path], leaf)


def test_ibot_checkpoint_gives_backbone_and_head() -> None:
    arrays = checkpoints.ibot(wrapper="module.")
    loaded = load(arrays, ibot_shapes())
    expected = {
        "backbone/cls_token": arrays["module.backbone.cls_token"][0, 0],
        "backbone/mask_token": arrays["module.backbone.masked_embed"][0],
        "head/fc1/kernel": arrays["module.head.mlp.0.weight"].T,
        "head/fc3/bias": arrays["module.head.mlp.4.bias"],
    }
    for path, leaf in expected.items():
        np.testing.assert_array_equal(loaded.leaves[path], leaf)
    layer = loaded.leaves["backbone/blocks/qkv/kernel"][1]
    np.testing.assert_array_equal(layer, arrays["module.backbone.blocks.1.attn.qkv.weight"].T)
    assert loaded.ignored == ["head.last_layer.weight_g", "head.last_layer.weight_v"]
    assert not loaded.missing


def test_spare_parts_may_be_missing_and_a_head_of_other_layers_is_passed_over() -> None:
    arrays = {name: x for name, x in checkpoints.ibot().items() if "masked" not in name}
    norms = {f"head.mlp.1.{name}": numbers(24) for name in ("weight", "running_mean")}
    loaded = load(arrays | norms, ibot_shapes())
    assert {"backbone/mask_token", "head/fc1/kernel"} <= set(loaded.missing)
    assert not any(path.startswith("head/") for path in loaded.leaves)
    assert {"head.mlp.0.weight", "head.mlp.1.running_mean"} <= set(loaded.ignored)


@pytest.mark.medium
def test_a_head_of_two_layers_is_described_and_loaded() -> None:
    others = {name: x for name, x in checkpoints.ibot().items() if not name.startswith("head.mlp")}
    shapes = {"0.weight": (20, 32), "0.bias": (20,), "2.weight": (6, 20), "2.bias": (6,)}
    head = {f"head.mlp.{name}": numbers(*shape) for name, shape in shapes.items()}
    file = recognition.recognise(others | head, "ibot")
    found = mapping.describe(file.layout, file.arrays)
    assert {name: found[name] for name in found if name.startswith("head.")} == {
        "head.layers": 2,
        "head.hidden": 20,
        "head.dim": 6,
    }
    config = tiny_config()
    config.head.update(layers=2, hidden=20, dim=6)
    loaded = load(others | head, shapes_of(random_leaves(config)))
    np.testing.assert_array_equal(loaded.leaves["head/fc2/kernel"], head["head.mlp.2.weight"].T)
    assert not loaded.missing
    with pytest.raises(UserError, match=r"head\.mlp\.4\.weight"):
        load(others | head, ibot_shapes())


@pytest.mark.medium
def test_a_head_without_norm_does_not_fit_one_with_batch_norm() -> None:
    config = tiny_config()
    config.head.batch_norm = True
    with pytest.raises(UserError, match="missing: an array for head/bn1/bias"):
        load(checkpoints.ibot(), shapes_of(random_leaves(config)))


def test_differences_are_one_error_that_lists_them() -> None:
    arrays = checkpoints.ibot()
    del arrays["backbone.norm.bias"], arrays["backbone.blocks.1.mlp.fc1.weight"]
    arrays["backbone.blocks.0.attn.rope.weight"] = numbers(3)
    arrays["backbone.cls_token"] = numbers(1, 1, 31)
    arrays["head.mlp.2.bias"] = numbers(25)
    arrays["backbone.blocks.0.norm1.bias"] = np.full(32, np.nan, np.float32)
    with pytest.raises(UserError) as error:
        load(arrays, ibot_shapes())
    for line in (
        "its arrays do not match the network:",
        "missing: blocks.1.mlp.fc1.weight; norm.bias",
        "unexpected: blocks.0.attn.rope.weight",
        "cls_token is [1, 1, 31], expected [1, 1, 32]",
        "head.mlp.2.bias is [25], expected [24]",
        "not finite: blocks.0.norm1.bias",
    ):
        assert line in str(error.value)


def test_many_differences_are_shortened() -> None:
    shapes = shapes_of(random_leaves(tiny_config(**{"model.depth": 40})))
    with pytest.raises(UserError) as error:
        load(checkpoints.ibot(), shapes)
    assert "blocks.2.norm1.weight (and 37 similar)" in str(error.value)
    assert "and 6 more" in str(error.value) and len(str(error.value)) < 700
    with pytest.raises(UserError, match="unexpected: blocks.1.norm1.weight"):
        load(checkpoints.ibot(), shapes_of(random_leaves(tiny_config(**{"model.depth": 1}))))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model.patch": 2, "augment.global_size": 8},
            r"patch_embed.proj.weight is \[32, 3, 4, 4\]",
        ),
        ({"model.layer_scale": 0.1}, "missing: an array for backbone/blocks/ls1/scale"),
        ({"model.registers": 2}, "missing: an array for backbone/register_tokens"),
    ],
)
def test_network_of_another_kind_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(checkpoints.ibot(), shapes_of(random_leaves(tiny_config(**changes))))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="do not fit a known backbone .*: bert.layer.0"):
        recognition.recognise({"bert.layer.0": numbers(2), "bert.pooler": numbers(2)}, "ibot")
    with pytest.raises(UserError, match="none at all"):
        recognition.recognise({}, "ibot")


def test_export_says_which_networks_a_project_lacks() -> None:
    leaves = random_leaves(tiny_config(**{"model.registers": 2}))
    with pytest.raises(UserError, match="has no place for backbone/register_tokens"):
        mapping.export("hf", "vit", leaves)
    windows = random_leaves(tiny_config(**NETWORKS["swin"] | {"model.window": 14}))
    with pytest.raises(UserError, match="transformers has no Swin with a smaller window"):
        mapping.export("hf", "swin", windows)
    with pytest.raises(UserError, match="dinov2 has no .*: it has no swin"):
        mapping.export("dinov2", "swin", random_leaves(tiny_config(**NETWORKS["swin"])))
