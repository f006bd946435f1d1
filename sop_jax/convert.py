"""Converts weights of other projects to this one, and exports networks to them.

    python -m sop_jax.convert --from=FILE --to=DIR [--key=teacher|student] [--prefix=P] [--heads=N]
    python -m sop_jax.convert --from=FILE|DIR --export=hf|stablehlo --to=NEW_DIR
    python -m sop_jax.convert --from=FILE|DIR --export=timm|ibot --to=F.safetensors
    python -m sop_jax.convert --from=FILE|DIR --export=onnx --to=F.onnx

FILE is a `.pth`, `.safetensors` or `.npz` file with the names of iBOT, DINO, SOP, MaSSL, DINOv2,
MAE, MSN, MoCo-v3, solo-learn, lightly, timm, torchvision or transformers, or the index of several
such files (`model.safetensors.index.json`, or its folder); nothing in it is executed. DIR is a
folder that `sop_jax.evaluate`, `sop_jax.extract` and `--config.init_from` accept: the workdir of a
run (--workdir=DIR is the same as --from=DIR), or the folder that this command creates, which
contains config.json, the network as step 0, and converted.json, which lists what the file lacked.

An export contains only the backbone. `hf` is a folder for AutoModel and AutoImageProcessor of
transformers 4 and 5, with a model card; `timm` and `ibot` are files that load with `strict=True`;
`stablehlo` and `onnx` are programs that need neither this package nor PyTorch.

For example, after the quick start:

    python -m sop_jax.convert --workdir=runs/digits --export=hf --to=runs/digits_hf
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import flags
from etils import epath

from sop_jax import config as config_lib
from sop_jax import paths, pretrained
from sop_jax.errors import UserError
from sop_jax.exports import huggingface, onnx, stablehlo, timm
from sop_jax.exports.trained import Trained
from sop_jax.models import Params
from sop_jax.models.positions import RULES
from sop_jax.training import checkpoint
from sop_jax.training.checkpoint import named_leaves
from sop_jax.weights import files, mapping


class Target(NamedTuple):
    """Something to export to.

    Attributes:
        write: maps a network and the new file or folder to lines for the user.
        ending: the extension of the file; "" for a folder.
        needs_heads: whether the number of attention heads has to be known.
    """

    write: Callable[[Trained, epath.Path], list[str]]
    ending: str
    needs_heads: bool = True


def _write_names(project: str) -> Callable[[Trained, epath.Path], list[str]]:
    """Returns a function that writes a file of weights with the names of a project."""

    def write(trained: Trained, to: epath.Path) -> list[str]:
        model = trained.config.model
        exported = mapping.export(project, model.family, trained.leaves)
        files.write(to, exported.arrays)
        words = []
        if left := [leaf for leaf in exported.not_exported if leaf not in trained.absent]:
            words.append(f"not exported: {', '.join(left)}")
        words += [
            f"this network has model.{name}={model[name]}, but {project} uses {value}"
            + "; average its patch tokens after the final norm instead" * (name == "pool")
            for name, value in {"pool": "cls", **exported.settings}.items()
            if model[name] != value
        ]
        return [*words, f"{to}: {len(exported.arrays)} arrays by {project}'s names"]

    return write


def _write_timm(trained: Trained, to: epath.Path) -> list[str]:
    return [*_write_names("timm")(trained, to), *timm.call(trained, to)]


TARGETS = {
    "timm": Target(_write_timm, ".safetensors", needs_heads=False),
    "hf": Target(huggingface.write, ""),
    "ibot": Target(_write_names("ibot"), ".safetensors", needs_heads=False),
    "onnx": Target(onnx.write, ".onnx"),
    "stablehlo": Target(stablehlo.write, ""),
}


def convert(
    source: epath.PathLike,
    to: epath.PathLike,
    project: str | None = None,
    key: str | None = None,
    step: int | None = None,
    heads: int | None = None,
    positions: str | None = None,
    prefix: str | None = None,
) -> list[str]:
    """Creates a folder with a network, or with `project` an export.

    Args:
        source: a file of weights, the index of several files or their folder, or the folder of a
            run or of an earlier conversion.
        to: the new folder, or with `project` the new folder or file, see `TARGETS`.
        project: what to export to, one of TARGETS.
        key: which of several networks to take, `teacher` or `student`, or for a file a part of the
            prefix of its names; the teacher by default.
        step: the step of the checkpoint, if `source` is a folder; the newest by default.
        heads: the number of attention heads of a ViT whose width and depth are not those of a named
            size; it cannot be inferred from the weights.
        positions: the rule for resizing positions, one of `RULES`; by default that of the project
            that the weights are from.
        prefix: the prefix of the network's names in a file, if it is not found otherwise.

    Returns:
        Lines for the user that describe what was done.

    Raises:
        UserError: `source` cannot be read, `to` cannot be written, or this project or the other
            one has no such network.
    """
    source, to = epath.Path(source), epath.Path(to)
    target = _target(project) if project else None
    _check_to(to, target.ending if target else "", project)
    if source.is_dir():
        source = files.index_of(source) or source
    network: str | None
    if source.is_dir():
        for flag, value in (("heads", heads), ("positions", positions), ("prefix", prefix)):
            if value is not None:
                raise UserError(
                    f"--{flag} is for files of weights, but {source} is a folder whose config.json "
                    f"sets it; leave out --{flag}"
                )
        network = key or "teacher"
        config, _, params, step = pretrained.load_network(source, step, network)
        earlier = pretrained.origin(source)
        absent = earlier.absent if earlier else []
        words = [f"the {network} of {source}, step {step}"]
    else:
        network = None
        if step is not None:
            raise UserError(
                f"--step={step} is for folders with checkpoints, but {source} is a file; leave out "
                "--step"
            )
        config, params, absent, words = pretrained.network_of_file(
            source, key, prefix, heads, positions, bool(target and not target.needs_heads)
        )
    if target:
        shown = step is not None or heads is not None  # by config.json, or by the user
        leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(params).items()}
        trained = Trained(config, leaves, source, step, absent, network, heads_known=shown)
        return [*words, *target.write(trained, to)]
    save(config, params, step or 0, pretrained.Origin(str(source), absent), to)
    return [*words, f"{to}: the network, for evaluate, extract and init_from"]


def _target(project: str) -> Target:
    if project == "hf4":
        raise UserError(
            "--export=hf4 is now --export=hf: versions 4 and 5 of transformers load its folder"
        )
    if project not in TARGETS:
        raise UserError(f"unknown --export={project}; expected one of: {', '.join(TARGETS)}")
    return TARGETS[project]


def _check_to(to: epath.Path, ending: str, project: str | None) -> None:
    """Raises UserError if the file or folder exists, has another extension, or is unwritable."""
    if ending:
        if to.suffix != ending:
            raise UserError(f"--to={to} must end in {ending} for --export={project}")
        if to.exists():
            raise UserError(f"--to={to} already exists; give a new file")
    elif to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to={to} already exists; give a new or empty folder")
    elif not to.exists() and to.suffix in (".safetensors", ".onnx"):
        raise UserError(
            f"--to={to} would be a folder, though it ends in {to.suffix}; name a folder, or choose "
            f"another --export: {', '.join(x for x in TARGETS if TARGETS[x].ending == to.suffix)}"
        )
    paths.check_writable(to.parent if ending else to, "--to")


def save(
    config: ml_collections.ConfigDict,
    params: Params,
    step: int,
    origin: pretrained.Origin,
    to: epath.PathLike,
) -> None:
    """Writes a folder that `pretrained.load_network` reads; the config is written last.

    Raises:
        UserError: the folder cannot be created.
    """
    to = epath.Path(to)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {to}: {error}; choose another --to") from error
    checkpoints = checkpoint.Checkpoints(to)
    try:
        checkpoints.save(step, {"teacher": params})
    finally:
        checkpoints.close()
    pretrained.save_origin(origin, to)
    config_lib.save(config, to)


def main() -> None:
    """Converts the weights that the flags name."""
    args = flags.FLAGS
    source = args["from"].value or args.workdir
    if not source or (args["from"].value and args.workdir):
        raise UserError("give either --from=FILE (or a folder) or --workdir=DIR, and not both")
    lines = convert(
        source,
        args.to,
        args.export,
        args.key,
        args.step,
        args.heads,
        args.positions,
        args.prefix,
    )
    print("\n".join(lines))


if __name__ == "__main__":
    from sop_jax import cli

    cli.define_path("from", "The file of weights, or a folder as for --workdir.")
    cli.define_path("workdir", "The folder of a run, or of an earlier conversion.")
    cli.define_path("to", "The folder or file to create.", required=True)
    flags.DEFINE_string("export", None, f"What to export to: {', '.join(TARGETS)}.")
    flags.DEFINE_string(
        "key",
        None,
        "The network to take: teacher (the default if there are both) or student; in a file also a "
        "part of the prefix of the network's names.",
    )
    flags.DEFINE_string(
        "prefix", None, "The prefix of the network's names, if it is not found otherwise."
    )
    flags.DEFINE_integer("step", None, "The step of the checkpoint to take; the newest by default.")
    flags.DEFINE_integer(
        "heads",
        None,
        "The number of attention heads of a ViT whose size has no name.",
        lower_bound=1,
    )
    flags.DEFINE_enum("positions", None, list(RULES), "The rule for resizing positions.")
    cli.run(main, devices=False)
