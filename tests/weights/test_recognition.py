"""Backbones in the checkpoints of other trainers: which one is used, and what is not."""

import collections
import functools
import json
import pathlib
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from checkpoints import Call, Named, numbers, save_pth, vit
from safetensors.numpy import load_file, save_file
from test_weights import NETWORKS, random_leaves, tiny_config

from sop_jax import pretrained
from sop_jax.convert import convert
from sop_jax.errors import UserError
from sop_jax.models import build
from sop_jax.training.checkpoint import named_leaves
from sop_jax.weights import mapping, recognition

Arrays = dict[str, np.ndarray]
DEPTH = 4


class Filled(Call):
    """A dictionary and list of a special type, in which a trainer stores its settings."""

    def __reduce__(self) -> Any:
        return self.function, self.args, {"a": 1}, iter([1, 2]), iter([("lr", 0.1), ("wd", 0.2)])


def under(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def mlp(prefix: str, *widths: int) -> Arrays:
    """Returns linear layers with batch norm between them, as in a projection head."""
    arrays: Arrays = {}
    for layer, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        arrays[f"{prefix}{3 * layer}.weight"] = numbers(outputs, inputs)
        arrays[f"{prefix}{3 * layer + 1}.running_mean"] = numbers(outputs)
        arrays[f"{prefix}{3 * layer + 1}.num_batches_tracked"] = np.array(7)
    return arrays


def other(arrays: Arrays) -> Arrays:
    """Returns the same names with other numbers, which must not be used."""
    return {name: array + 1 for name, array in arrays.items()}


def dinov2() -> Arrays:
    """Returns a backbone under the names of DINOv2's trainer, without chunks."""
    scales = {f"blocks.{i}.ls{n}.gamma": numbers(32, seed=i) for i in range(DEPTH) for n in (1, 2)}
    return vit(depth=DEPTH) | scales | {"mask_token": numbers(1, 32)}


def chunked(arrays: Arrays) -> Arrays:
    """Returns blocks in two chunks, which do not change their numbers."""
    renamed = {}
    for name, array in arrays.items():
        if name.startswith("blocks."):
            number = name.split(".")[1]
            name = f"blocks.{2 * int(number) // DEPTH}.{name.removeprefix('blocks.')}"
        renamed[name] = array
    return renamed


def dinov2_teacher() -> Any:
    heads = under("dino_head.", checkpoints.head()) | under("ibot_head.", checkpoints.head())
    return {"teacher": under("backbone.", chunked(dinov2())) | heads}


def dinov2_both() -> Any:
    teacher = dinov2_teacher()["teacher"]
    student = other(teacher)
    center = {"dino_loss.center": numbers(1, 8)}
    return {"model": under("teacher.", teacher) | under("student.", student) | center}


def solo_learn() -> Any:
    backbone = vit(depth=DEPTH)
    arrays = under("backbone.", other(backbone)) | under("momentum_backbone.", backbone)
    arrays |= mlp("projector.", 32, 48, 16) | mlp("momentum_projector.", 32, 48, 16)
    arrays |= {"classifier.weight": numbers(10, 32), "classifier.bias": numbers(10)}
    arrays |= {"queue": numbers(2, 16, 64), "queue_ptr": np.array([3])}
    settings = Filled(Named("lightning_fabric.utilities.data", "AttributeDict"))
    return {
        "epoch": 3,
        "state_dict": collections.OrderedDict(arrays),
        "optimizer_states": [{"state": {0: {"momentum_buffer": numbers(3)}}}],
        "callbacks": {Named("pytorch_lightning.callbacks", "ModelCheckpoint"): {"best": 1.0}},
        "hyper_parameters": settings,
    }


def msn() -> Any:
    encoder = vit(depth=DEPTH) | mlp("fc.fc", 32, 48, 16) | {"pred.fc1.weight": numbers(16, 16)}
    return {
        "encoder": under("module.", other(encoder)),
        "target_encoder": under("module.", encoder),
        "prototypes": numbers(8, 16),
        "opt": {"state": {0: {"exp_avg": numbers(3)}}},
        "epoch": 3,
    }


def moco_v3() -> Any:
    encoder = vit(depth=DEPTH) | mlp("head.", 32, 48, 16)
    arrays = under("module.base_encoder.", other(encoder))
    arrays |= under("module.momentum_encoder.", encoder) | mlp("module.predictor.", 16, 48, 16)
    return {"arch": "vit_small", "state_dict": arrays, "scaler": {"scale": 65536.0}}


def lightly() -> Any:
    wrapped = under("vit.", vit(depth=DEPTH)) | {"mask_token": numbers(1, 1, 32)}
    arrays = under("student_backbone.", other(wrapped)) | under("teacher_backbone.", wrapped)
    arrays |= mlp("student_head.dino_head.layers.", 32, 48, 16)
    arrays |= mlp("teacher_head.dino_head.layers.", 32, 48, 16)
    return {"state_dict": arrays, "hyper_parameters": {"batch_size_per_device": 64}}


def lightly_dino() -> Any:
    """Here the teacher is the network whose names have no prefix."""
    wrapped = under("vit.", vit(depth=DEPTH))
    return {"state_dict": under("backbone.", wrapped) | under("student_backbone.", other(wrapped))}


def mae() -> Any:
    decoder = {name: x for name, x in vit(width=16).items() if name.startswith(("blocks", "norm"))}
    arrays = vit(depth=DEPTH) | under("decoder_", decoder)
    arrays |= {"decoder_embed.weight": numbers(16, 32), "decoder_embed.bias": numbers(16)}
    arrays |= {"decoder_pred.weight": numbers(48, 16), "decoder_pos_embed": numbers(1, 17, 16)}
    return {"model": arrays | {"mask_token": numbers(1, 1, 16)}, "epoch": 3}


def compiled() -> Any:
    arrays = under("_orig_mod.", vit(depth=DEPTH))
    return {"model": {name.replace("blocks.", "blocks.module."): x for name, x in arrays.items()}}


# What each trainer saves, the project whose names it uses, the other backbone that is reported, and
# what is not used.
TRAINERS: dict[str, tuple[Any, str, str, str]] = {
    "DINOv2's teacher": (
        dinov2_teacher,
        "dinov2",
        "",
        "not used: dino_head (8 arrays), ibot_head (8 arrays)",
    ),
    "DINOv2's teacher and student": (
        dinov2_both,
        "dinov2",
        "taken: model.teacher.backbone, as the teacher; not taken: model.student.backbone",
        "dino_head (8 arrays), ibot_head (8 arrays), student (16 arrays), dino_loss (1 array)",
    ),
    "solo-learn": (
        solo_learn,
        "timm",
        "taken: state_dict.momentum_backbone, as the teacher; not taken: state_dict.backbone",
        "not used: projector (6 arrays), momentum_projector (6 arrays), classifier (2 arrays), "
        "queue (1 array), queue_ptr (1 array)",
    ),
    "MSN": (
        msn,
        "msn",
        "taken: target_encoder.module, as the teacher; not taken: encoder.module",
        "not used: prototypes (1 array), opt (1 array)",
    ),
    "MoCo-v3": (
        moco_v3,
        "timm",
        "taken: state_dict.module.momentum_encoder, as the teacher; not taken: "
        "state_dict.module.base_encoder",
        "not used: predictor (6 arrays)",
    ),
    "lightly": (
        lightly,
        "timm",
        "taken: state_dict.teacher_backbone.vit, as the teacher; not taken: "
        "state_dict.student_backbone.vit",
        "student_head (6 arrays), teacher_head (6 arrays)",
    ),
    "lightly's DINO": (
        lightly_dino,
        "timm",
        "taken: state_dict.backbone.vit, as the teacher; not taken: "
        "state_dict.student_backbone.vit",
        "",
    ),
    "MAE with its decoder": (mae, "mae", "", "not needed: decoder_blocks.0"),
    "a compiled network": (compiled, "ibot", "", ""),
}


@functools.cache
def network(scaled: bool) -> tuple[ml_collections.ConfigDict, dict[str, tuple[int, ...]]]:
    """Returns settings and shapes of a network of 4 layers, with or without LayerScale."""
    config = tiny_config(**{"model.depth": DEPTH, "model.layer_scale": 0.1 * scaled})
    leaves = named_leaves(jax.eval_shape(build(config, 16).init, jax.random.key(0)))
    return config.model, {path: leaf.shape for path, leaf in leaves.items()}


def start_of(file: pathlib.Path, scaled: bool = False) -> pretrained.InitialWeights:
    settings, shapes = network(scaled)
    return pretrained.of_arrays(pretrained.read_file(file), shapes, settings)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_backbone_is_found_in_the_checkpoint_of_another_trainer(
    tmp_path: pathlib.Path, trainer: str
) -> None:
    make, project, choice, aside = TRAINERS[trainer]
    scaled = project == "dinov2"
    plain = save_pth(tmp_path / "plain.pth", dinov2() if scaled else vit(depth=DEPTH))
    whole = save_pth(tmp_path / "f.pth", make())
    expected, found = (start_of(file, scaled) for file in (plain, whole))
    assert found.leaves.keys() == expected.leaves.keys()
    for path, leaf in expected.leaves.items():
        np.testing.assert_array_equal(found.leaves[path], leaf)
    told = "\n".join(found.words)
    assert f"by the names of {project}" in told
    assert choice in told and aside in told, told
    assert choice or "not taken" not in told


@pytest.mark.medium
def test_features_of_a_checkpoint_are_those_of_its_backbone_by_itself(
    tmp_path: pathlib.Path,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    features = []
    for name, content in (("plain", dinov2()), ("whole", dinov2_both())):
        told = convert(save_pth(tmp_path / f"{name}.pth", content), tmp_path / name, heads=2)
        _, model, params, _ = pretrained.load_network(tmp_path / name)
        features.append(np.asarray(model.features(params, jnp.asarray(pixels))[0]))
    np.testing.assert_array_equal(*features)
    assert "taken: model.teacher.backbone, as the teacher" in told[0]


def test_other_network_is_taken_by_key_or_prefix(tmp_path: pathlib.Path) -> None:
    for make, key, prefix in (
        (solo_learn, "student", "backbone"),
        (moco_v3, "student", "module.base_encoder"),
        (msn, "encoder", "encoder.module."),
        (lightly, "student", "student_backbone"),
        (dinov2_both, "student", "model.student"),
    ):
        file = save_pth(tmp_path / "f.pth", make())
        for choice in ({"network": key}, {"prefix": prefix}):
            found = pretrained.read_file(file, **choice)
            np.testing.assert_array_equal(
                found.arrays["cls_token"], vit(depth=DEPTH)["cls_token"] + 1
            )


@pytest.mark.parametrize(
    "parts, key, expected",
    [
        ({"student": 1, "teacher": 2}, None, 2),
        ({"student": 1, "teacher": 2}, "student", 1),
        ({"state_dict": {"teacher": 2, "student": 1}}, None, 2),
        ({"model": 3, "model_ema": 4}, None, 4),
        ({"state_dict": 1, "state_dict_ema": 2}, "state_dict", 1),
        ({"encoder_q": 1, "encoder_k": 2}, None, 2),
        ({"backbone": 2, "anchor_backbone": 1}, None, 2),
        ({"online": 1, "target": 2}, "student", 1),
    ],
)
def test_network_of_several_is_found(parts: Any, key: str | None, expected: int) -> None:
    def arrays(tree: Any, prefix: str = "") -> Arrays:
        if isinstance(tree, dict):
            return {
                k: x for name in tree for k, x in arrays(tree[name], f"{prefix}{name}.").items()
            }
        return {f"{prefix}{name}": np.full_like(x, tree) for name, x in vit().items()}

    found = recognition.recognise(arrays(parts), "ibot", key)
    assert found.arrays.keys() == vit().keys()
    assert all((array == expected).all() for array in found.arrays.values())
    with pytest.raises(UserError, match="has no network 'another'; choose"):
        recognition.recognise(arrays(parts), "ibot", "another")


def test_networks_of_equal_names_are_asked_for() -> None:
    both = under("net_a.", vit()) | under("net_b.", vit())
    with pytest.raises(UserError, match="several networks: net_a, net_b; choose one with --prefix"):
        recognition.recognise(both, "ibot")
    for choice in ({"network": "net_b"}, {"prefix": "net_b"}, {"prefix": "net_b."}):
        assert recognition.recognise(both, "ibot", **choice).arrays.keys() == vit().keys()
    wrapped = under("backbone.", vit()) | under("module.", vit())
    with pytest.raises(UserError, match="several networks: module, backbone"):
        recognition.recognise(wrapped, "ibot")


@pytest.mark.parametrize(
    "prefix, words",
    [
        ("teacher", "no name has the prefix teacher; its prefixes are: state_dict.backbone, "),
        ("backbon", "no name has the prefix backbon; its prefixes are: state_dict.backbone, "),
        ("projector", r"do not fit a known backbone .*: 0.weight"),
    ],
)
def test_prefix_without_a_network_is_reported(
    tmp_path: pathlib.Path, prefix: str, words: str
) -> None:
    file = save_pth(tmp_path / "f.pth", solo_learn())
    with pytest.raises(UserError, match=f"f.pth: .*{words}"):
        convert(file, tmp_path / "net", heads=2, prefix=prefix)
    with pytest.raises(UserError, match="the prefix x; its prefixes are: bert"):
        recognition.recognise({"bert.layer.0": numbers(2)}, "ibot", prefix="x")


def test_prefix_is_for_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--prefix is for files of weights"):
        convert(tmp_path, tmp_path / "net", prefix="backbone")


def test_what_is_in_a_backbone_is_always_checked(tmp_path: pathlib.Path) -> None:
    content = solo_learn()
    content["state_dict"]["momentum_backbone.blocks.1.attn.rope.weight"] = numbers(3)
    del content["state_dict"]["momentum_backbone.norm.bias"]
    file = save_pth(tmp_path / "f.pth", content)
    with pytest.raises(UserError, match=r"missing: norm.bias\n  unexpected: blocks.1.attn.rope"):
        start_of(file)


def test_layer_in_two_chunks_is_refused() -> None:
    arrays = chunked(dinov2())
    arrays["blocks.0.3.norm1.weight"] = arrays["blocks.1.3.norm1.weight"]
    with pytest.raises(UserError, match="are both blocks.3.norm1.weight of the network"):
        recognition.recognise(arrays, "ibot")


@pytest.mark.parametrize("kind", ["named", "stacked"])
def test_resnet_in_a_checkpoint_of_contrastive_training(kind: str) -> None:
    """Its stages look like networks themselves, and lightly can number its modules."""
    leaves = random_leaves(tiny_config(**NETWORKS["resnet"]))
    plain = mapping.export("timm", "resnet", leaves).arrays
    numbered = {"conv1": "0", "bn1": "1", **{f"layer{n}": str(n + 3) for n in range(1, 5)}}
    arrays = {}
    for name, array in plain.items():
        first, rest = name.split(".", 1)
        name = f"{numbered[first]}.{rest}" if kind == "stacked" else name
        arrays |= {f"module.encoder_k.{name}": array, f"module.encoder_q.{name}": array + 1}
    arrays |= mlp("module.encoder_k.fc.", 32, 16) | {"module.queue": numbers(16, 64)}
    found = recognition.recognise(arrays, "ibot")
    assert found.layout.family == "resnet"
    assert "taken: module.encoder_k, as the teacher" in found.words[0]
    shapes = {path: leaf.shape for path, leaf in leaves.items() if path.startswith("backbone/")}
    loaded = mapping.load_leaves(found.layout, found.arrays, shapes, lambda table, rows: table)
    assert not loaded.missing
    for path, leaf in loaded.leaves.items():
        np.testing.assert_array_equal(leaf, leaves[path])


@pytest.mark.parametrize("kind", ["of DINOv2", "of transformers", "packed"])
def test_gated_layers_are_named(kind: str) -> None:
    arrays = dinov2()
    if kind == "packed":
        arrays |= {f"blocks.{i}.mlp.fc1.weight": numbers(160, 32) for i in range(DEPTH)}
        arrays |= {f"blocks.{i}.mlp.fc2.weight": numbers(32, 80) for i in range(DEPTH)}
    elif kind == "of DINOv2":
        arrays = {name: x for name, x in chunked(arrays).items() if ".mlp." not in name}
        arrays |= {f"blocks.0.{i}.mlp.w12.weight": numbers(160, 32) for i in range(DEPTH)}
    else:
        leaves = random_leaves(tiny_config(**NETWORKS["vit with LayerScale"]))
        arrays = mapping.export("hf4", "vit", leaves).arrays
        arrays = {name: x for name, x in arrays.items() if ".mlp." not in name}
        arrays |= {f"encoder.layer.{i}.mlp.weights_in.weight": numbers(9) for i in range(2)}
    with pytest.raises(UserError, match="SwiGLU feed-forward networks .*giant"):
        recognition.recognise(arrays, "ibot")


def test_part_of_one_process_says_which_file_is_whole(tmp_path: pathlib.Path) -> None:
    shard = Call(Named("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"))
    file = save_pth(tmp_path / "model_0000.rank_0.pth", {"model": {"teacher": shard}})
    with pytest.raises(UserError, match="of one process .*teacher_checkpoint.pth"):
        pretrained.read_file(file)


# ----------------------------------------------------------------------------- one of several files


def sharded(folder: pathlib.Path, kind: str = "safetensors") -> pathlib.Path:
    """Writes a backbone in three files and an index."""
    name = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    folder.mkdir()
    arrays = vit()
    where = {}
    for part in range(3):
        file = f"{name}-{part + 1:05}-of-00003.{kind}"
        own = dict([*arrays.items()][part::3])
        where |= dict.fromkeys(own, file)
        save_pth(folder / file, own) if kind == "bin" else save_file(own, folder / file)
    index = folder / f"{name}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_through_their_index(
    tmp_path: pathlib.Path, kind: str
) -> None:
    index = sharded(tmp_path / "theirs", kind)
    for source in (index, index.parent):
        config = tiny_config(init_from=str(source))
        start = pretrained.read_initial_weights(config, build(config, 16))
        np.testing.assert_array_equal(start.leaves["backbone/norm/bias"], vit()["norm.bias"])
    if kind == "safetensors":
        convert(index.parent, tmp_path / "out.safetensors", "timm")
        exported = load_file(tmp_path / "out.safetensors")
        assert {name: x.tobytes() for name, x in exported.items()} == {
            name: x.tobytes() for name, x in vit().items()
        }
    with pytest.raises(UserError, match=f"give the file in it: {index}"):
        pretrained.load_network(index.parent)


def test_one_of_several_files_says_so(tmp_path: pathlib.Path) -> None:
    index = sharded(tmp_path / "theirs")
    shard = index.parent / "model-00001-of-00003.safetensors"
    for where in ("in the same folder", "which must be in the same folder"):
        with pytest.raises(UserError) as error:
            convert(shard, tmp_path / "net", heads=2)
        assert str(error.value) == (
            f"{shard} is one of 3 files that form one network; give their index, "
            f"model.safetensors.index.json, {where}"
        )
        index.unlink(missing_ok=True)
    single = tmp_path / "model-00001-of-00001.safetensors"
    save_file(vit(), single)
    assert pretrained.read_file(single).arrays.keys() == vit().keys()


def test_index_that_does_not_fit_its_files_is_reported(tmp_path: pathlib.Path) -> None:
    index = sharded(tmp_path / "theirs")
    part = index.parent / "model-00002-of-00003.safetensors"
    data = part.read_bytes()
    part.unlink()
    with pytest.raises(UserError, match=f"names 3 files, .* missing from its folder: {part.name}"):
        pretrained.read_file(index)
    save_file({"a": numbers(2)}, part)
    with pytest.raises(UserError, match=f"is in {part.name}, but it is not"):
        pretrained.read_file(index)
    part.write_bytes(data[:40])
    with pytest.raises(UserError, match=f"{part.name} cannot be read"):
        pretrained.read_file(index)
    for text in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(UserError, match="index.json cannot be read"):
            pretrained.read_file(index)
