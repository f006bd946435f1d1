"""The command that converts weights in both directions; agreement with other projects."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import numbers, save_pth
from PIL import Image
from safetensors.numpy import load_file, save_file

from sop_jax import config as config_lib
from sop_jax import pretrained
from sop_jax.convert import convert, save
from sop_jax.errors import UserError
from sop_jax.extract import export, open_images
from sop_jax.models import MEAN, STD, build
from sop_jax.training.checkpoint import named_leaves
from sop_jax.weights import files, mapping

pytestmark = pytest.mark.medium

TOLERANCE = 2e-4  # absolute; features have unit scale


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def swin_file(path: pathlib.Path, depths: tuple[int, ...], heads: tuple[int, ...]) -> pathlib.Path:
    config = config_lib.paper()
    settings = {"family": "swin", "size": "custom", "width": 16, "window": 7}
    config.model.update(settings | {"stage_depths": depths, "stage_heads": heads})
    shapes = jax.eval_shape(build(config, 224).init, jax.random.key(0))
    leaves = {name: numbers(*leaf.shape) for name, leaf in named_leaves(shapes).items()}
    return save_pth(path, mapping.export("ibot", "swin", leaves).arrays)


# -------------------------------------------------------------------------------------- the command


def run_command(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sop_jax.convert", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_converts_and_exports(tmp_path: pathlib.Path) -> None:
    file = save_pth(tmp_path / "f.pth", {"teacher": checkpoints.ibot(), "epoch": 3})
    folder, out = tmp_path / "net", tmp_path / "sub" / "out.safetensors"
    done = run_command(f"--from={file}", f"--to={folder}", "--heads=2")
    assert done.returncode == 0, done.stderr
    assert "by the names of ibot" in done.stdout and str(folder) in done.stdout
    done = run_command(f"--workdir={folder}", "--export=timm", f"--to={out}")
    assert done.returncode == 0, done.stderr
    assert "not exported: backbone/mask_token, head/fc1/bias" in done.stdout
    assert "model.positions=ibot, but timm uses antialiased" in done.stdout
    arrays = load_file(out)
    expected = checkpoints.vit()
    assert arrays.keys() == expected.keys()
    assert all(arrays[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_command_fails_with_one_line(tmp_path: pathlib.Path) -> None:
    done = run_command(f"--from={tmp_path / 'absent.pth'}", f"--to={tmp_path / 'net'}")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"error: there is no file {tmp_path / 'absent.pth'}; give")
    assert done.stderr.count("\n") == 1
    done = run_command(f"--from={tmp_path}/f.pth")
    assert done.returncode == 2 and "--to is required" in done.stderr


def test_converted_folder_is_read_by_the_commands(tmp_path: pathlib.Path) -> None:
    file = save_pth(tmp_path / "f.pth", {"student": {}, "teacher": checkpoints.ibot()})
    convert(file, tmp_path / "net", heads=2)
    config, model, params, step = pretrained.load_network(tmp_path / "net")
    assert step == 0 and config.model.size == "custom" and not config.init_from
    assert pretrained.origin(tmp_path / "net") == pretrained.Origin(str(file), [])
    assert config.eval.crop == config.augment.global_size == 16
    (tmp_path / "images").mkdir()
    pixels = images(16, 16)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    config.eval.resize = 16
    (tmp_path / "net" / "config.json").write_text(json.dumps(config.to_dict()))
    export(tmp_path / "net", open_images([str(tmp_path / "images")]), tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as arrays:
        (tokens,) = model.features(params, jnp.asarray(pixels[None]))
        np.testing.assert_allclose(arrays["features"], tokens[:, 0], atol=1e-5)
        assert arrays["step"] == 0


def test_key_chooses_the_network(tmp_path: pathlib.Path) -> None:
    teacher = checkpoints.ibot()
    student = {f"module.{name}": array + 1 for name, array in teacher.items()}
    file = save_pth(tmp_path / "f.pth", {"student": student, "teacher": teacher})
    convert(file, tmp_path / "net", key="student", heads=2)
    params = pretrained.load_network(tmp_path / "net")[2]
    bias = student["module.backbone.norm.bias"]
    np.testing.assert_array_equal(params["backbone"]["norm"]["bias"], bias)


def test_known_sizes_have_their_name_and_heads(tmp_path: pathlib.Path) -> None:
    arrays = checkpoints.vit(width=192, depth=12, patch=14, rows=1 + 37 * 37)
    save_file(arrays, tmp_path / "f.safetensors")
    told = convert(tmp_path / "f.safetensors", tmp_path / "net")
    assert any("--positions=ibot" in line for line in told)  # as for weights of DINO
    config = pretrained.load_network(tmp_path / "net")[0]
    assert (config.model.size, config.model.patch, config.model.positions) == (
        *("ti", 14),
        "antialiased",
    )
    assert (config.augment.global_size, config.augment.local_size, config.eval.crop) == (
        518,
        98,
        224,
    )


def test_what_cannot_be_converted_is_reported(tmp_path: pathlib.Path) -> None:
    file = save_pth(tmp_path / "f.pth", checkpoints.ibot())
    net = tmp_path / "net"
    for arguments, words in (
        ({"to": net}, "no size is known for a ViT of width 32 and depth 2, .* give --heads=N"),
        ({"to": tmp_path, "heads": 2}, "already exists; give a new or empty folder"),
        ({"to": net, "project": "timm"}, "must end in .safetensors"),
        ({"to": net, "project": "keras"}, "unknown --export=keras; expected one of: timm"),
        ({"to": net, "key": "teacher", "heads": 2}, "has no network 'teacher'"),
    ):
        with pytest.raises(UserError, match=words):
            convert(file, **arguments)
    scaled = checkpoints.vit() | {f"blocks.{i}.ls1.gamma": numbers(32) for i in range(2)}
    file = save_pth(tmp_path / "half.pth", scaled)
    with pytest.raises(UserError, match=r"half.pth: (.|\n)*missing: blocks.0.ls2.gamma"):
        convert(file, net, heads=2)
    assert not net.exists()


@pytest.mark.parametrize("kind", checkpoints.MISSHAPEN)
def test_misshapen_weights_are_reported(tmp_path: pathlib.Path, kind: str) -> None:
    file = save_pth(tmp_path / "f.pth", checkpoints.misshapen(kind, depth=2))
    with pytest.raises(UserError) as error:
        convert(file, tmp_path / "net", heads=2)
    for words in checkpoints.MISSHAPEN[kind][1]:
        assert words in str(error.value)


def test_flags_without_use_are_refused(tmp_path: pathlib.Path) -> None:
    file = save_pth(tmp_path / "f.pth", checkpoints.vit())
    swin = swin_file(tmp_path / "swin.pth", (2, 2, 2, 2), (1, 2, 4, 8))
    net = tmp_path / "net"
    convert(file, net, heads=2)
    for source, arguments, words in (
        (net, {"heads": 2}, "--heads is for files of weights"),
        (net, {"positions": "size"}, "--positions is for files of weights"),
        (file, {"step": 77, "heads": 2}, "--step=77 is for folders with checkpoints"),
        (swin, {"heads": 2}, "swin.pth: --heads is for a ViT, .* of a swin"),
        (swin, {"positions": "size"}, "swin.pth: --positions is for a ViT"),
        (net, {"key": "student"}, "contains only the teacher"),
    ):
        with pytest.raises(UserError, match=words):
            convert(source, tmp_path / "other", **arguments)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"source": "f.pth", "absent": [3]}'])
def test_a_damaged_record_of_a_conversion_is_named(tmp_path: pathlib.Path, text: str) -> None:
    net = tmp_path / "net"
    convert(save_pth(tmp_path / "f.pth", checkpoints.vit()), net, heads=2)
    (net / "converted.json").write_text(text)
    with pytest.raises(UserError, match=r"net/converted.json is damaged .*Convert it again"):
        convert(net, tmp_path / "again")


def test_export_overwrites_nothing(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "f.safetensors"
    save_file(checkpoints.vit(), file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="f.safetensors already exists; give a new file"):
        convert(file, file, "timm")
    assert file.read_bytes() == before


def test_folder_of_another_project_names_the_file_in_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(checkpoints.vit(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="give the file in it: .*/model.safetensors"):
        convert(tmp_path, tmp_path / "net")


def test_networks_that_cannot_be_are_refused(tmp_path: pathlib.Path) -> None:
    file = save_pth(tmp_path / "f.pth", checkpoints.vit())
    with pytest.raises(UserError, match="width 32 cannot be split over model.heads 5"):
        convert(file, tmp_path / "net", heads=5)
    for depths, heads, words in (
        ((1, 2, 1, 1), (1, 2, 4, 8), r"expected even numbers"),
        ((2, 2, 2), (1, 2, 4), r"stage_depths is \(2, 2, 2\).*; expected four stages"),
    ):
        with pytest.raises(UserError, match=words):
            convert(swin_file(tmp_path / "swin.pth", depths, heads), tmp_path / "net")
    assert not (tmp_path / "net").exists()


# ----------------------------------------------------------------------------------- other projects


class Peer(NamedTuple):
    """A network of another project.

    Attributes:
        make: (library, torch) -> the network, with random weights.
        tokens: (network, pixels) -> [B, 1+L, D], or [B, L, D] without [CLS].
        sizes: of images, height and width.
        heads: of a ViT.
    """

    make: Callable[..., Any]
    tokens: Callable[..., Any]
    sizes: tuple[tuple[int, int], ...]
    heads: int | None = None


HF_VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224)
PATCH_16 = ((224, 224), (96, 96), (224, 160))
PATCH_14 = ((224, 224), (98, 98), (224, 154))


def hf(network: str, **settings: Any) -> Callable[..., Any]:
    def make(library: Any) -> Any:
        config = getattr(library, f"{network}Config")(**settings)
        pooled = {} if network.startswith(("Dino", "Res")) else {"add_pooling_layer": False}
        return getattr(library, f"{network}Model")(config, **pooled)

    return make


def timm(network: str, **settings: Any) -> Callable[..., Any]:
    return lambda library: library.create_model(network, num_classes=0, **settings)


def spatial(network: Any, pixels: Any) -> Any:
    """Returns the tokens, row by row, of a network that returns a grid of channels."""
    return network(pixels).last_hidden_state.flatten(2).transpose(1, 2)


HF = {
    "ViT": Peer(
        hf("ViT", intermediate_size=128, patch_size=16, **HF_VIT),
        lambda network, x: network(x, interpolate_pos_encoding=True).last_hidden_state,
        *(PATCH_16, 2),
    ),
    "DINOv2": Peer(
        hf("Dinov2", patch_size=14, **HF_VIT),
        lambda network, x: network(x).last_hidden_state,
        *(PATCH_14, 2),
    ),
    "DINOv2 with registers": Peer(
        hf("Dinov2WithRegisters", patch_size=14, num_register_tokens=3, **HF_VIT),
        lambda network, x: network(x).last_hidden_state[:, [0, *range(4, 4 + count(x, 14))]],
        *(PATCH_14, 2),
    ),
    # Only at its own image size: it pads the windows of other sizes differently.
    "Swin": Peer(
        hf("Swin", embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], image_size=224),
        lambda network, x: network(x).last_hidden_state,
        ((224, 224),),
    ),
    "Swin of 384": Peer(
        hf(
            "Swin",
            embed_dim=16,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 4, 8],
            window_size=12,
            image_size=384,
        ),
        lambda network, x: network(x).last_hidden_state,
        ((384, 384),),
    ),
    "ResNet": Peer(
        hf("ResNet", embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 3, 1]),
        spatial,
        ((96, 96), (64, 96)),
    ),
    "ResNet of basic blocks": Peer(
        hf(
            "ResNet",
            embedding_size=8,
            hidden_sizes=[8, 16, 32, 64],
            depths=[1, 2, 3, 1],
            layer_type="basic",
        ),
        spatial,
        ((96, 96), (64, 96)),
    ),
}
SMALL = dict(embed_dim=32, depth=2, num_heads=2)
TIMM = {
    "ViT": Peer(
        timm("vit_small_patch16_224", dynamic_img_size=True, **SMALL),
        lambda network, x: network.forward_features(x),
        *(PATCH_16, 2),
    ),
    "DINOv2": Peer(
        timm("vit_small_patch14_dinov2", dynamic_img_size=True, img_size=224, **SMALL),
        lambda network, x: network.forward_features(x),
        *(PATCH_14, 2),
    ),
    "DINOv2 with registers": Peer(
        timm("vit_small_patch14_reg4_dinov2", dynamic_img_size=True, img_size=224, **SMALL),
        lambda network, x: network.forward_features(x)[:, [0, *range(5, 5 + count(x, 14))]],
        *(PATCH_14, 2),
    ),
    "Swin": Peer(
        timm("swin_tiny_patch4_window7_224", embed_dim=16, num_heads=(1, 2, 4, 8)),
        lambda network, x: network.forward_features(x).flatten(1, 2),
        ((224, 224),),
    ),
    "ResNet": Peer(
        timm("resnet50", layers=(1, 2, 3, 1)),
        lambda network, x: network.forward_features(x).flatten(2).transpose(1, 2),
        ((96, 96), (64, 96)),
    ),
    "ResNet of basic blocks": Peer(
        timm("resnet18", layers=(1, 2, 1, 1)),
        lambda network, x: network.forward_features(x).flatten(2).transpose(1, 2),
        ((96, 96), (64, 96)),
    ),
}


def write_names(folder: pathlib.Path, file: pathlib.Path, project: str) -> None:
    """Writes the network of a folder to a file with the names of a project."""
    config, _, params, _ = pretrained.load_network(folder)
    leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(params).items()}
    files.write(file, mapping.export(project, config.model.family, leaves).arrays)


def count(pixels: Any, patch: int) -> int:
    return (pixels.shape[2] // patch) * (pixels.shape[3] // patch)


def agree(
    peer: Peer, network: Any, folder: pathlib.Path, sizes: tuple[tuple[int, int], ...]
) -> None:
    """Asserts that the network in a folder has the features of the other project's network."""
    import torch

    config, model, params, _ = pretrained.load_network(folder)
    for height, width in sizes:
        pixels = images(1, height, width)
        given = ((pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)).transpose(
            0, 3, 1, 2
        )
        with torch.no_grad():
            expected = peer.tokens(network, torch.tensor(given)).numpy()
        (tokens,) = model.features(params, jnp.asarray(pixels))
        found = np.asarray(tokens)[:, 1 - (config.model.family == "vit") :]
        scale = max(1.0, np.abs(expected).mean())  # the features of a ResNet do not have unit scale
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.filterwarnings("ignore")  # those of the other project
@pytest.mark.parametrize(
    "project, name", [("hf", name) for name in HF] + [("timm", n) for n in TIMM]
)
def test_features_agree_both_ways(project: str, name: str, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip({"hf": "transformers", "timm": "timm"}[project])
    peer = {"hf": HF, "timm": TIMM}[project][name]
    torch.manual_seed(0)
    theirs = peer.make(library).eval()
    with torch.no_grad():
        for array in theirs.state_dict().values():
            if array.ndim == 1:  # these are initialized to ones or zeros
                array += 0.2 * torch.rand_like(array)

    # Their weights here, and back, from each of their files.
    weights = {key: array.numpy() for key, array in theirs.state_dict().items()}
    save_file(weights, tmp_path / "theirs.safetensors")
    convert(tmp_path / "theirs.safetensors", tmp_path / "net", heads=peer.heads)
    agree(peer, theirs, tmp_path / "net", peer.sizes)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pth")
    with files.opened(tmp_path / "theirs.pth") as read:
        assert {key: x.tobytes() for key, x in read.items()} == {
            f"state_dict.{key}": x.tobytes() for key, x in weights.items()
        }
    write_names(tmp_path / "net", tmp_path / "back.safetensors", project)
    back = load_file(tmp_path / "back.safetensors")
    assert all(back[key].tobytes() == weights[key].tobytes() for key in back)
    rest = weights.keys() - back.keys()
    assert all(key.endswith("num_batches_tracked") for key in rest)

    # Our weights there.
    config = pretrained.load_network(tmp_path / "net")[0]
    model = build(config, config.augment.global_size)
    params = model.init(jax.random.key(7))
    save(config, params, 0, pretrained.Origin("", []), tmp_path / "ours")
    write_names(tmp_path / "ours", tmp_path / "ours.safetensors", project)
    arrays = load_file(tmp_path / "ours.safetensors")
    theirs.load_state_dict({key: torch.tensor(x) for key, x in arrays.items()}, strict=True)
    agree(peer, theirs, tmp_path / "ours", peer.sizes[-1:])


@pytest.mark.filterwarnings("ignore")
def test_files_of_the_hub_have_the_names_of_hf4(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    library = pytest.importorskip("transformers")
    for name in ("ViT", "DINOv2 with registers", "Swin"):
        folder = tmp_path / name
        HF[name].make(library).save_pretrained(folder)
        convert(folder / "model.safetensors", folder / "net", heads=HF[name].heads)
        write_names(folder / "net", folder / "back.safetensors", "hf4")
        theirs, back = (load_file(folder / f"{x}.safetensors") for x in ("model", "back"))
        assert theirs.keys() == back.keys()
        assert all(back[key].tobytes() == array.tobytes() for key, array in theirs.items())


def test_settings_without_which_features_differ_come_with_the_weights(
    tmp_path: pathlib.Path,
) -> None:
    leaves = {}
    config = config_lib.paper()
    config.update_from_flattened_dict(
        {
            "augment.global_size": 16,
            "model.size": "custom",
            "model.width": 32,
            "model.depth": 1,
            "model.heads": 2,
            "model.patch": 4,
        }
    )
    model = build(config, 16)
    for path, leaf in named_leaves(model.init(jax.random.key(0))).items():
        leaves[path] = np.asarray(leaf)
    for project, positions, eps in (
        ("ibot", "ibot", 1e-6),
        ("timm", "antialiased", 1e-6),
        ("hf", "size", 1e-12),
    ):
        save_file(mapping.export(project, "vit", leaves).arrays, tmp_path / "f.safetensors")
        convert(tmp_path / "f.safetensors", tmp_path / project, heads=2)
        found = pretrained.load_network(tmp_path / project)[0].model
        assert (found.positions, found.norm_eps) == (positions, eps)


def test_a_path_that_cannot_be_written_to_is_reported_first(read_only: pathlib.Path) -> None:
    for to, project in ((read_only / "net", None), (read_only / "f.safetensors", "timm")):
        with pytest.raises(UserError, match=f"{read_only}: .*choose another --to"):
            convert("/there/is/no.pth", to, project)
