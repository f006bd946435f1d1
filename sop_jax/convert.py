"""Brings weights in from other projects, and takes them there.

    python -m sop_jax.convert --from=FILE --to=DIR [--key=teacher|student] [--prefix=P] [--heads=N]
    python -m sop_jax.convert --from=FILE|DIR --export=timm|hf|hf4|ibot --to=FILE.safetensors

FILE is a `.pth`, `.safetensors` or `.npz` by the names of iBOT, DINO, SOP, MaSSL, DINOv2, MAE, MSN,
MoCo-v3, solo-learn, lightly, timm, torchvision or transformers, or the index of several such files
(`model.safetensors.index.json`, or its folder); nothing in it is executed. DIR is what
`sop_jax.evaluate`, `sop_jax.extract` and `--config.init_from` take: the workdir of a run (for
--from, --workdir says the same), or the folder that this command makes, with config.json, the
network as step 0, and converted.json, which says what the file did not have.
An export has the backbone alone and loads with `strict=True`; `hf` has the names of transformers 5,
`hf4` those of the versions before.
"""

import jax
import ml_collections
from absl import flags
from etils import epath

from sop_jax import check, paths, pretrained
from sop_jax import config as config_lib
from sop_jax.errors import UserError
from sop_jax.models import FAMILIES, Params, build
from sop_jax.models.positions import RULES
from sop_jax.training import checkpoint
from sop_jax.training.checkpoint import named_leaves
from sop_jax.weights import files, mapping, recognition
from sop_jax.weights.tables import Layout

PROJECTS = ("timm", "hf", "hf4", "ibot")


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
    """Makes a folder of a network, or a file for another project.

    Args:
        source: a file of weights, the index of several or their folder, or the folder of a run or
            of an earlier conversion.
        to: the folder, which is new; with `project` the .safetensors.
        project: one of PROJECTS, to export.
        key: which network of several; the teacher by default.
        step: of which checkpoint of a folder; the newest by default.
        heads: of a ViT whose width and depth are of no known size: weights do not tell.
        positions: the rule for positions of other grids, one of `RULES`; of the project that the
            weights are from by default.
        prefix: what the names of the network in a file begin with, if it is not found otherwise.

    Returns:
        What was done, a line each.

    Raises:
        UserError: `source` cannot be read or `to` not written, or the weights are of no network
            that is known here, or there.
    """
    source, to = epath.Path(source), epath.Path(to)
    if project:
        if project not in PROJECTS:
            raise UserError(f"unknown --export={project}; expected one of: {', '.join(PROJECTS)}")
        if to.suffix != ".safetensors":
            raise UserError(f"an export is a file: --to={to} must end in .safetensors")
        if to.exists():
            raise UserError(f"--to={to} is there already; name a new file")
    elif to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to={to} is there already; name a new folder")
    paths.check_writable(to.parent if project else to, "--to")
    if source.is_dir():
        source = files.index_of(source) or source
    if source.is_dir():
        for flag, value in (("heads", heads), ("positions", positions), ("prefix", prefix)):
            if value is not None:
                raise UserError(
                    f"--{flag} is for a file of weights: config.json in {source} says it already"
                )
        config, _, params, step = pretrained.load_network(source, step, key or "teacher")
        earlier = pretrained.origin(source)
        absent = earlier.absent if earlier else []
        words = [f"the {key or 'teacher'} of {source}, step {step}"]
    else:
        if step is not None:
            raise UserError(f"--step={step} is of the checkpoints of a folder; {source} is a file")
        config, params, absent, words = read(source, key, prefix, heads, positions, bool(project))
        step = 0
    if project:
        leaves = {path: jax.device_get(leaf) for path, leaf in named_leaves(params).items()}
        exported = mapping.export(project, config.model.family, leaves)
        files.write(to, exported.arrays)
        if left := [leaf for leaf in exported.left if leaf not in absent]:
            words.append(f"left out: {', '.join(left)}")
        words += [
            f"this network has model.{name}={config.model[name]}, and {project}'s own is {value}"
            for name, value in {"pool": "cls", **exported.settings}.items()
            if config.model[name] != value
        ]
        return [*words, f"{to}: {len(exported.arrays)} arrays by {project}'s names"]
    save(config, params, step, pretrained.Origin(str(source), absent), to)
    return [*words, f"{to}: the network, for evaluate, extract and init_from"]


def read(
    path: epath.Path,
    key: str | None,
    prefix: str | None,
    heads: int | None,
    positions: str | None,
    exports: bool,
) -> tuple[ml_collections.ConfigDict, Params, list[str], list[str]]:
    """The network of a file; one that is only exported needs no heads.

    Returns:
        The settings that describe it, its parameters, the paths of those that the file does not
        have, and what was done.

    Raises:
        UserError: as `convert`.
    """
    file = pretrained.read_file(path, key, prefix)
    try:
        config, params, start = _network(file, heads, positions, exports)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    words = [] if positions else _other_positions(file.alike, config.model.positions)
    absent = [path for path in named_leaves(params) if path not in start.leaves]
    return config, pretrained.replace(params, start.leaves), absent, start.words + words


def _other_positions(alike: list[Layout], chosen: str) -> list[str]:
    """What to say of projects that have a file's names and resize positions by other rules."""
    projects: dict[str, list[str]] = {}
    for layout in alike:
        rule = layout.settings.get("positions", chosen)
        if rule != chosen:
            projects.setdefault(rule, []).append(layout.project)
    return [
        f"the names of {' and '.join(names)} are the same: if these weights are from there, say "
        f"--positions={rule}"
        for rule, names in projects.items()
    ]


def _network(
    file: recognition.Recognised, heads: int | None, positions: str | None, exports: bool
) -> tuple[ml_collections.ConfigDict, Params, pretrained.InitialWeights]:
    """What describes the network of a file, how it starts, and what the file gives it."""
    family = file.layout.family
    for flag, value in (("heads", heads), ("positions", positions)):
        if value is not None and family != "vit":
            raise UserError(f"--{flag} is for a ViT, and these are the weights of a {family}")
    if exports and heads is None and family == "vit":
        heads = 1  # makes no difference there
    config = settings(mapping.describe(file.layout, file.arrays), heads)
    if positions:
        config.model.positions = positions
    check.check_sizes(config)
    model = build(config, config.augment.global_size)
    params = model.init(jax.random.key(config.seed))
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    return config, params, pretrained.of_arrays(file, shapes, config.model)


def settings(found: dict[str, object], heads: int | None) -> ml_collections.ConfigDict:
    """The config of a network that is described by its numbers: its size by name if it has one.

    Args:
        found: settings by their dotted names, as `weights.mapping.describe` gives them.
        heads: of a ViT that has no name.

    Raises:
        UserError: these are missing.
    """
    config = config_lib.paper()
    config.update_from_flattened_dict(found)
    config.model.dtype = "float32"
    config.data.source = "folder"  # for which evaluate's --data.path is all that it takes
    crop = min(224, config.augment.global_size)
    if crop % config.model.patch:
        crop = config.augment.global_size
    config.eval.crop, config.eval.resize = crop, crop * 256 // 224
    patch = config.model.patch
    config.augment.local_size = -(-config.augment.local_size // patch) * patch
    family = FAMILIES[config.model.family]
    if heads is not None:
        config.model.heads = heads
    for name, size in family.sizes.items():
        custom = family.custom(config.model)
        if config.model.family == "vit" and heads is None:
            custom = custom._replace(heads=size.heads)
        if custom == size:
            config.model.size = name
            return config
    if config.model.family == "vit" and heads is None:
        raise UserError(
            f"a ViT of width {config.model.width} and depth {config.model.depth} has no name, and "
            "weights do not tell its heads; give --heads=N"
        )
    return config


def save(
    config: ml_collections.ConfigDict,
    params: Params,
    step: int,
    origin: pretrained.Origin,
    to: epath.PathLike,
) -> None:
    """Writes a folder that `pretrained.load_network` reads, the config last."""
    to = epath.Path(to)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {to}: {error}; choose another --to") from error
    checkpoints = checkpoint.Checkpoints(to)
    try:
        checkpoints.save(step, {"teacher": params})
    finally:
        checkpoints.close()
    pretrained.save_origin(origin, to)
    config_lib.save(config, to)


def main() -> None:
    """Converts what the flags name."""
    args = flags.FLAGS
    source = args["from"].value or args.workdir
    if not source or (args["from"].value and args.workdir):
        raise UserError("say what to convert: either --from=FILE (or a folder) or --workdir=DIR")
    told = convert(
        source,
        args.to,
        args.export,
        args.key,
        args.step,
        args.heads,
        args.positions,
        args.prefix,
    )
    print("\n".join(told))


if __name__ == "__main__":
    from sop_jax import cli

    cli.define_path("from", "The file of weights, or a folder as --workdir.")
    cli.define_path("workdir", "The folder of a run, or of an earlier conversion.")
    cli.define_path("to", "The folder to make; for --export the file.", required=True)
    flags.DEFINE_string("export", None, f"The project to export to: {', '.join(PROJECTS)}.")
    flags.DEFINE_string(
        "key", None, "The network to take: teacher (the default where there are both) or student."
    )
    flags.DEFINE_string(
        "prefix", None, "What the names of the network begin with, if it is not found otherwise."
    )
    flags.DEFINE_integer("step", None, "The checkpoint of a folder to take; the newest by default.")
    flags.DEFINE_integer(
        "heads", None, "Attention heads of a ViT whose size has no name.", lower_bound=1
    )
    flags.DEFINE_enum("positions", None, list(RULES), "The rule by which positions are resized.")
    cli.run(main, devices=False)
