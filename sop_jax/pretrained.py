"""Loads trained networks from the checkpoints of runs and from files of weights."""

import contextlib
import hashlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from sop_jax import check
from sop_jax import config as config_lib
from sop_jax.errors import UserError
from sop_jax.models import FAMILIES, Model, Params, build, size_of
from sop_jax.models.positions import resize_positions
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import make_mesh, replicated
from sop_jax.paths import write_whole
from sop_jax.settings import flatten
from sop_jax.training import checkpoint
from sop_jax.training.checkpoint import named_leaves, with_leaves
from sop_jax.weights import files, mapping, recognition
from sop_jax.weights.tables import Arrays, Layout


class InitialWeights(NamedTuple):
    """The initial weights of a network.

    Attributes:
        leaves: the leaves by path; absent leaves keep their initial values.
        words: lines for the user: what was loaded, what was not, and what was resized.
    """

    leaves: Arrays
    words: list[str]


class Origin(NamedTuple):
    """The origin of a network in a folder that `sop_jax.convert` created.

    Attributes:
        source: the file, or the folder of a run.
        absent: the paths of leaves that the source did not have; the folder has initial values.
    """

    source: str
    absent: list[str]


NETWORKS = ("teacher", "student")  # of a run
_ORIGIN = "converted.json"
_ENDINGS = (".safetensors", ".bin", ".pth")  # of files of weights


def settings_of(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """Reads the settings of a run, or of a folder that `sop_jax.convert` created.

    Raises:
        UserError: the folder is not that of a run.
    """
    folder = epath.Path(workdir)
    weights = [x for x in folder.iterdir() if x.suffix in _ENDINGS] if folder.is_dir() else []
    if weights and not (folder / "checkpoints").exists():
        raise UserError(
            f"{folder} is not a folder of a run or of sop_jax.convert; give the file in it: "
            f"{files.index_of(folder) or min(weights)}"
        )
    return config_lib.read_config(workdir)


def load_network(
    workdir: epath.PathLike, step: int | None = None, network: str = "teacher"
) -> tuple[ml_collections.ConfigDict, Model, Params, int]:
    """Loads a network of a run, or of a folder that `sop_jax.convert` created.

    Args:
        workdir: the folder, local or remote (`gs://`).
        step: the step of the checkpoint; the newest by default.
        network: `teacher` or `student`; a converted folder contains only the teacher.

    Returns:
        The config of the run, the network, its parameters replicated over all devices, and the
        step of the checkpoint.

    Raises:
        UserError: the folder is not that of a run, or it has no such checkpoint or an unreadable
            one.
    """
    config = settings_of(workdir)
    if network not in NETWORKS:
        raise UserError(
            f"there is no network {network!r} in {workdir}; expected key to be one of: "
            f"{', '.join(NETWORKS)}"
        )
    if network != "teacher" and origin(workdir):
        raise UserError(
            f"{workdir} has no {network}: a converted folder contains only the teacher; leave out "
            f"--key={network}"
        )
    model = build(config, config.augment.global_size)
    everywhere = replicated(make_mesh())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    if step is None:
        # The first process decides, because another one may already see a newer checkpoint.
        newest = checkpoint.latest_step(workdir)
        agreed = hosts.agree(-1 if newest is None else newest)
        step = None if agreed < 0 else agreed
    params = checkpoint.restore_part(workdir, abstract, network, step)
    assert step is not None  # restore_part raises if there is no checkpoint
    return config, model, params, step


def fingerprint(config: ml_collections.ConfigDict, params: Params) -> str:
    """Returns a hash of a network: the settings of the model, and all its parameters.

    Args:
        config: the config of its run.
        params: its parameters, replicated over devices or in NumPy; also by their paths.
    """
    own = flatten(config.model) | {"size": config.augment.global_size}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for path, leaf in sorted(named_leaves(params).items()):
        here = leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
        digest.update(path.encode() + np.ascontiguousarray(here).data)
    return digest.hexdigest()[:16]


def origin(workdir: epath.PathLike) -> Origin | None:
    """Returns the origin of a converted folder, or None for the folder of a run.

    Raises:
        UserError: the file that records it is damaged.
    """
    file = epath.Path(workdir) / _ORIGIN
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        source, absent = content["source"], content["absent"]
        if isinstance(source, str) and all(isinstance(path, str) for path in absent):
            return Origin(source, list(absent))
        reason = f"it contains {content}"
    except (ValueError, TypeError, KeyError) as error:  # of json.loads and of other content
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{file} is damaged ({reason}). Expected the source and the absent leaves of a converted "
        "network. Convert it again to a new folder."
    )


def save_origin(origin: Origin, workdir: epath.PathLike) -> None:
    """Writes the file that `origin` reads."""
    write_whole(epath.Path(workdir) / _ORIGIN, json.dumps(origin._asdict(), indent=2) + "\n")


def network_of_file(
    path: epath.Path,
    key: str | None,
    prefix: str | None,
    heads: int | None,
    positions: str | None,
    exports: bool,
) -> tuple[ml_collections.ConfigDict, Params, list[str], list[str]]:
    """Reads the network of a file; `exports` says that it is only exported and needs no heads.

    Returns:
        Its config, its parameters, the paths of the parameters that the file does not have, and
        lines for the user that describe what was done.

    Raises:
        UserError: the file cannot be read, or this project has no such network.
    """
    file = read_file(path, key, prefix)
    try:
        config, params, start = _network(file, heads, positions, exports)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    words = [] if positions else _other_positions(file.alike, config.model.positions)
    absent = [path for path in named_leaves(params) if path not in start.leaves]
    return config, with_leaves(params, start.leaves), absent, start.words + words


def _other_positions(alike: list[Layout], chosen: str) -> list[str]:
    """Returns hints about projects that use the same names but resize positions differently."""
    projects: dict[str, list[str]] = {}
    for layout in alike:
        rule = layout.settings.get("positions", chosen)
        if rule != chosen:
            projects.setdefault(rule, []).append(layout.project)
    return [
        f"these are also the names of {' and '.join(names)}: if the weights are from there, give "
        f"--positions={rule}"
        for rule, names in projects.items()
    ]


def _network(
    file: recognition.Recognised, heads: int | None, positions: str | None, exports: bool
) -> tuple[ml_collections.ConfigDict, Params, InitialWeights]:
    """Returns the config of a file's network, initial parameters, and what the file provides."""
    family = file.layout.family
    for flag, value in (("heads", heads), ("positions", positions)):
        if value is not None and flag in FAMILIES[family].unused:
            raise UserError(
                f"--{flag} is for a ViT, but these are the weights of a {family}; leave it out"
            )
    if exports and heads is None and "heads" not in FAMILIES[family].unused:
        heads = 1  # an export does not depend on it
    config = _settings(mapping.describe(file.layout, file.arrays), heads)
    if positions:
        config.model.positions = positions
    check.check_sizes(config)
    model = build(config, config.augment.global_size)
    params = model.init(jax.random.key(config.seed))
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    return config, params, of_arrays(file, shapes, config.model)


def _settings(found: dict[str, object], heads: int | None) -> ml_collections.ConfigDict:
    """Returns the config of a network, with the name of its size if it has one.

    Args:
        found: settings by their dotted names, from `weights.mapping.describe`.
        heads: the number of heads of a ViT whose size has no name.

    Raises:
        UserError: the number of heads is needed and not given.
    """
    config = config_lib.paper()
    config.update_from_flattened_dict(found)
    config.model.dtype = "float32"
    config.data.source = "folder"  # with which evaluate needs only --data.path
    crop = min(224, config.augment.global_size)
    if crop % config.model.patch:
        crop = config.augment.global_size
    config.eval.crop, config.eval.resize = crop, crop * 256 // 224
    patch = config.model.patch
    config.augment.local_size = -(-config.augment.local_size // patch) * patch
    family = FAMILIES[config.model.family]
    unknown = heads is None and "heads" not in family.unused
    if heads is not None:
        config.model.heads = heads
    for name, size in family.sizes.items():
        custom = family.custom(config.model)
        if unknown:
            custom = custom._replace(heads=size.heads)
        if custom == size:
            config.model.size = name
            return config
    if unknown:
        raise UserError(
            f"no size is known for a ViT of width {config.model.width} and depth "
            f"{config.model.depth}, and its number of heads cannot be inferred from the weights; "
            "give --heads=N"
        )
    return config


def read_initial_weights(config: ml_collections.ConfigDict, model: Model) -> InitialWeights:
    """Reads `config.init_from` for the network of a run; all processes call it.

    Args:
        config: the config of the run.
        model: the network of the run.

    Raises:
        UserError: the file or folder cannot be read, or is not of this network; lists the
            differences.
    """
    source = epath.Path(config.init_from)
    if source.is_dir():
        source = files.index_of(source) or source
    shapes = {
        path: leaf.shape
        for path, leaf in named_leaves(jax.eval_shape(model.init, jax.random.key(0))).items()
    }
    try:
        if source.is_dir():
            start = _of_run(source, config, shapes)
        else:
            start = of_arrays(read_file(source), shapes, config.model)
    except UserError as error:
        raise UserError(f"init_from={source}: {error}") from error
    if hosts.several():
        digest = hashlib.sha256()
        for path in sorted(start.leaves):
            digest.update(path.encode() + np.ascontiguousarray(start.leaves[path]).data)
        hosts.check_agreement({f"what is in {source}": digest.hexdigest()[:12]})
    return start


def read_file(
    path: epath.PathLike, network: str | None = None, prefix: str | None = None
) -> recognition.Recognised:
    """Reads the weights of one network of a file, and recognizes the project's names.

    Args:
        path: the file, or the index of several files.
        network: which of several networks to take, see `recognition.recognise`.
        prefix: the prefix of its names, see `recognition.recognise`.

    Raises:
        UserError: the file cannot be read, or its names are unknown.
    """
    # Of the projects with the same names, timm publishes these formats, and DINO .pth files.
    of_timm = {".safetensors", ".npz"} & set(epath.Path(path).suffixes)
    likely = "timm" if of_timm else "ibot"
    with files.opened(path) as arrays:
        try:
            return recognition.recognise(arrays, likely, network, prefix)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def of_arrays(
    file: recognition.Recognised,
    shapes: dict[str, tuple[int, ...]],
    settings: ml_collections.ConfigDict,
) -> InitialWeights:
    """Converts the arrays of a file to the leaves of a network.

    Args:
        file: the arrays, from `read_file`.
        shapes: the shapes of the network's leaves by path.
        settings: `config.model`.

    Raises:
        UserError: the arrays are not of this network; lists the differences.
    """
    layout, who = file.layout, file.layout.project
    if layout.family != settings.family:
        raise UserError(
            f"its names are those of a {layout.family} of {who}, but this network is a "
            f"{settings.family}; set model.family={layout.family}"
        )
    try:
        loaded = mapping.load_leaves(layout, file.arrays, shapes, resizer(settings.positions))
    except UserError as error:
        text = f"{error}\nIts names are {who}'s"
        with contextlib.suppress(UserError):  # arrays that are needed are among the differences
            theirs = mapping.describe(layout, file.arrays)
            text += ", its settings: " + ", ".join(f"{name}={x}" for name, x in theirs.items())
        raise UserError(f"{text}. Use the same settings, or another file") from error
    words = [*file.words, *_words(loaded, f"by the names of {who}")]
    for name, value in layout.settings.items():
        if settings[name] != value:
            words.append(
                f"{who} uses model.{name}={value}, but this network has {settings[name]}, so its "
                f"features will differ slightly from {who}'s"
            )
    return InitialWeights(loaded.leaves, words)


def _of_run(
    workdir: epath.Path, config: ml_collections.ConfigDict, shapes: dict[str, tuple[int, ...]]
) -> InitialWeights:
    """Reads the leaves of a network from the teacher of another run, or of a converted folder."""
    theirs, _, params, step = load_network(workdir)
    converted = origin(workdir)
    absent = converted.absent if converted else []
    arrays = {
        path: np.asarray(leaf) for path, leaf in named_leaves(params).items() if path not in absent
    }
    if size_of(theirs.model) != size_of(config.model):  # shapes do not show the number of heads
        names = [theirs.model.family, config.model.family]
        if names[0] != names[1]:
            raise UserError(
                f"its network is a {names[0]}, but this one is a {names[1]}; set "
                f"model.family={names[0]}"
            )
        raise UserError(
            f"its network is {size_of(theirs.model)}, but this one is {size_of(config.model)}; "
            "set the same model.size, or the same numbers"
        )
    layout = mapping.own_layout(theirs.model.family, {*shapes, *arrays})
    loaded = mapping.load_leaves(layout, arrays, shapes, resizer(config.model.positions))
    words = _words(loaded, f"of the teacher of step {step}")
    words += [
        f"it has model.{name}={theirs.model[name]}, but this network has {config.model[name]}, so "
        "its features will differ slightly"
        for name in ("positions", "norm_eps", "pool")
        if theirs.model[name] != config.model[name]
    ]
    return InitialWeights(loaded.leaves, words)


def _words(loaded: mapping.Loaded, origin: str) -> list[str]:
    count = sum(leaf.size for leaf in loaded.leaves.values())
    words = [f"loaded: {count / 1e6:.3g} M parameters in {len(loaded.leaves)} leaves, {origin}"]
    words += [f"resized: {what}" for what in loaded.resized]
    if loaded.missing:
        words.append(f"missing, so kept at their initial values: {', '.join(loaded.missing)}")
    if loaded.ignored:
        words.append(f"not needed: {', '.join(mapping.shortened(loaded.ignored))}")
    return words


def resizer(rule: str) -> Any:
    """Returns a function that resizes positions [1 + n, D], [CLS] first, to a number of rows."""

    def resize(table: np.ndarray, rows: int) -> np.ndarray:
        old, new = (round((count - 1) ** 0.5) for count in (len(table), rows))
        grid = jnp.asarray(table[1:]).reshape(old, old, -1)
        resized = resize_positions(grid, (new, new), rule).reshape(new * new, -1)
        return np.concatenate([table[:1], np.asarray(resized)])

    return resize
