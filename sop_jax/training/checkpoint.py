"""Checkpoints of a run, in `workdir/checkpoints/<step>`; the only module that uses Orbax.

A checkpoint is committed by renaming its folder at the end of the write. A process that is killed
during a write therefore leaves the earlier checkpoints intact, and nothing that could be mistaken
for a checkpoint.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from orbax.checkpoint import v1 as ocp

from sop_jax.errors import Lost, UserError, is_full_disk

_NAME = "state"  # of the state within a checkpoint
_SUMS = "sums"  # of the checksums within its metadata
_SHOWN_LEAVES = 10  # leaves listed in an error
_POLL = 1.0  # seconds between two looks at a save that has not ended
_RENAMED = {"carried": "memories"}  # parts of a state, and their names in earlier versions

_errors: list[BaseException] = []  # of the newest save of this process, as Orbax logs them


class NotFiniteError(UserError, FloatingPointError):
    """A state was not saved because it contains NaN or infinity."""


class Checkpoints:
    """Writes the checkpoints of one run in the background, one at a time.

    Every process of a run creates one and calls its methods at the same steps.
    """

    def __init__(self, workdir: epath.PathLike, keep_last: int = 2, keep_every: int = 0) -> None:
        """Opens `workdir/checkpoints` and removes incomplete writes of a killed process.

        Args:
            workdir: the folder of the run, local or remote (`gs://`).
            keep_last: the number of newest checkpoints to keep.
            keep_every: checkpoints at multiples of this number of steps are kept forever; 0 for
                none.
        """
        _quieten_orbax()
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(keep_last)]
        if keep_every:
            keep.append(policies.EveryNSteps(keep_every))
        self._folder = _folder(workdir)
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )
        self._running: ocp.AsyncResponse[bool] | None = None
        self._failed = False  # whether a save has failed, which other processes may not know

    def save(self, step: int, state: Any) -> None:
        """Starts to write `state`, and returns when it has been copied and may be donated.

        Waits for the previous save first, and raises its error if it failed.

        Raises:
            NotFiniteError: the state is not finite; nothing was written.
            Lost: this save or the previous one failed, but not because the disk is full.
        """
        self.wait()
        finite, sums = _inspect(state)
        bad = [name for name in finite if not finite[name]]
        if bad:
            raise NotFiniteError(
                f"the state of step {step} is not finite, so it was not saved: there is NaN or "
                f"infinity in {_some(bad, ', ')}. The last good checkpoint was kept. Try a lower "
                "learning rate, a longer warm-up or float32 compute in a new --workdir."
            )
        _errors.clear()
        with self._failures_in_words():
            self._running = self._orbax.save_checkpointables_async(
                step, {_NAME: _as_dicts(state)}, force=True, custom_metadata={_SUMS: sums}
            )

    def wait(self) -> None:
        """Blocks until the running save is committed, and raises its error if it failed."""
        running, self._running = self._running, None
        with self._failures_in_words():
            while running is not None:
                try:
                    running.result(timeout=_POLL)
                    return
                except TimeoutError:
                    # Orbax raises this only after ten minutes in which other processes wait too.
                    if _errors:
                        raise _errors[0] from None

    def close(self) -> None:
        """Waits for the running save, raises its error if it failed, and frees the threads."""
        try:
            self.wait()
        finally:
            if not self._failed:  # else Orbax would wait for the other processes
                with self._failures_in_words():
                    self._orbax.close()

    @contextlib.contextmanager
    def _failures_in_words(self) -> Iterator[None]:
        """Replaces the error of a save, which each kind of storage has its own of.

        A full disk and the loss of another process have messages elsewhere.
        """
        try:
            yield
        except Exception as error:
            self._failed = True
            if is_full_disk(error) or isinstance(error, jax.errors.JaxRuntimeError):
                raise
            reason = str(error).strip().partition("\n")[0][:300]
            raise Lost(
                f"a checkpoint could not be saved in {self._folder}: {reason}. The same command "
                "resumes from the last good checkpoint"
            ) from error


def steps(workdir: epath.PathLike) -> list[int]:
    """Returns the steps with a committed checkpoint, in ascending order."""
    found = ocp.path.step.standard_name_format().find_all(_folder(workdir))
    return sorted(checkpoint.step for checkpoint in found)


def latest_step(workdir: epath.PathLike) -> int | None:
    """Returns the newest step with a committed checkpoint, or None if there is none."""
    return max(steps(workdir), default=None)


def choose_step(workdir: epath.PathLike, step: int | None = None) -> int:
    """Returns a step that has a committed checkpoint: the one that is asked for, or the newest.

    Raises:
        UserError: there is no such checkpoint.
    """
    known = steps(workdir)
    if not known:
        raise UserError(
            f"there is no checkpoint in {_folder(workdir)}: check --workdir, or start or resume "
            "its training with python -m sop_jax.train"
        )
    if step is None:
        return known[-1]
    if step not in known:
        raise UserError(
            f"there is no checkpoint of step {step} in {_folder(workdir)}, only of {known}: choose "
            "one of these"
        )
    return step


def restore(workdir: epath.PathLike, abstract: Any, step: int | None = None) -> Any:
    """Reads a whole state.

    Args:
        workdir: the folder of the run.
        abstract: the tree of the state with `jax.ShapeDtypeStruct` leaves. Arrays are restored
            with their shardings, which may be for another mesh than the one that saved them.
        step: the step of the checkpoint; the newest by default.

    Raises:
        UserError: there is no such checkpoint, it cannot be read, or its leaves differ.
    """
    return _read(workdir, abstract, step, partial=False)


def restore_part(workdir: epath.PathLike, abstract: Any, key: str, step: int | None = None) -> Any:
    """Reads one field of a state, as `restore` does.

    Args:
        workdir: the folder of the run.
        abstract: the tree of this field only, with `jax.ShapeDtypeStruct` leaves.
        key: the name of the field.
        step: the step of the checkpoint; the newest by default.

    Raises:
        UserError: there is no such checkpoint, it cannot be read, or its leaves differ.
    """
    return _read(workdir, {key: abstract}, step, partial=True)[key]


def check_space(workdir: epath.PathLike, bytes_needed: int) -> None:
    """Raises UserError if the disk of a local `workdir` has fewer free bytes than needed."""
    path = epath.Path(workdir)
    if "://" in str(path):
        return
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < bytes_needed:
        raise UserError(
            f"the checkpoints of this run need {bytes_needed / 1e6:.0f} MB, and the disk of "
            f"{workdir} has {free / 1e6:.0f} MB free. Free some space or choose another --workdir."
        )


def _folder(workdir: epath.PathLike) -> epath.Path:
    path = epath.Path(workdir) / "checkpoints"
    return path if "://" in str(path) else path.resolve()


def _read(workdir: epath.PathLike, abstract: Any, step: int | None, partial: bool) -> Any:
    _quieten_orbax()
    step = choose_step(workdir, step)
    path = _folder(workdir) / str(step)
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    try:
        _check_files(path)
        metadata = ocp.checkpointables_metadata(path)
        saved, custom = metadata.metadata[_NAME], metadata.custom_metadata
        if saved is None or not custom:
            raise ValueError("the description of its arrays is missing or damaged")
        names = _saved_names(abstract, saved)
        wanted = {names[name]: leaf for name, leaf in named_leaves(abstract).items()}
        _check_leaves(path, saved, wanted, partial)
        with context:
            loaded = _load(path, {_NAME: _nested(wanted)})[_NAME]
        leaves = named_leaves(loaded)
        state = jax.tree.unflatten(
            jax.tree.structure(abstract), [leaves[saved_name] for saved_name in names.values()]
        )
        if _dtypes(state) != _dtypes(abstract):
            raise ValueError("the types of its arrays are missing or damaged")
        _, sums = _inspect(state)
        changed = [name for name in sums if sums[name] != custom[_SUMS][names[name]]]
        if changed:
            raise ValueError(f"values have changed since they were saved: {_some(changed, ', ')}")
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, step, steps(workdir), error) from error
    return state


def _check_files(path: epath.Path) -> None:
    """Checks that all files are there and have the bytes of each array, without reading these.

    Raises:
        OSError: one is missing, or too short.
        ValueError: what describes the arrays is damaged.
    """
    if "://" in str(path):
        return
    folder = path / _NAME
    for file in (folder / "array_metadatas").glob("*"):
        json.loads(file.read_text())
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
    manifest = tensorstore.ocdbt.dump(store).result()
    nodes = [manifest["versions"][-1]["root"]["location"]]
    ends: dict[str, int] = {}
    for node in nodes:
        for entry in tensorstore.ocdbt.dump(store, node).result()["entries"]:
            if "location" in entry:  # of a node further down the tree
                nodes.append(entry["location"])
            elif "indirect_value" in entry:
                _, *parts, offset, length = entry["indirect_value"].split(":")
                name = "".join(parts)
                ends[name] = max(ends.get(name, 0), int(offset) + int(length))
    for name, end in ends.items():
        if (there := (folder / name).stat().length) < end:
            raise OSError(f"{folder / name} has {there} bytes, expected {end} or more")


def _load(path: epath.Path, abstract: Any) -> Any:
    """Reads the arrays; Orbax does so in parallel, which buries the first error in many."""
    try:
        return ocp.load_checkpointables(path, abstract)
    except (OSError, ValueError, KeyError):
        _read_in_turn(path)
        raise


def _read_in_turn(path: epath.Path) -> None:
    """Reads array after array, so that the error names the one that is damaged."""
    if "://" in str(path):
        return
    store = {"driver": "ocdbt", "base": f"file://{path / _NAME}/"}
    keys = tensorstore.KvStore.open(store).result().list().result()
    names = [key.decode().removesuffix("zarr.json") for key in keys if key.endswith(b"/zarr.json")]
    for name in names:
        array = {"driver": "zarr3", "kvstore": store | {"path": name}}
        tensorstore.open(array | {"fill_missing_data_reads": False}).result().read().result()


def _unreadable(
    path: epath.Path, step: int, known: Sequence[int], cause: BaseException
) -> UserError:
    while cause.__cause__:
        cause = cause.__cause__
    others = [other for other in known if other != step]
    rest = f"Checkpoints of steps {others} remain" if others else "No other checkpoint remains"
    then = "the newest of them" if others else "the start"
    reason = str(cause).strip().partition("\n")[0][:300]
    return UserError(
        f"the checkpoint {path} cannot be read: {reason}. {rest}: if it is damaged, delete the "
        f"folder {path}, and the same command resumes from {then}."
    )


def _check_leaves(path: epath.Path, saved: Any, wanted: Mapping[str, Any], partial: bool) -> None:
    have = {name: _describe(leaf) for name, leaf in named_leaves(saved).items()}
    want = {name: _describe(leaf) for name, leaf in wanted.items()}
    different = [f"{name}: missing, expected {want[name]}" for name in want if name not in have]
    different += [
        f"{name}: {have[name]}, expected {want[name]}"
        for name in want
        if name in have and have[name] != want[name]
    ]
    if not partial:
        different += [f"{name}: {have[name]}, not expected" for name in have if name not in want]
    if different:
        raise UserError(
            f"the checkpoint {path} is of another architecture or method; it differs from the "
            f"config in:\n  {_some(different, chr(10) + '  ')}\n"
            "Use the config that the checkpoint was made with, or another --workdir."
        )


def _describe(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _dtypes(tree: Any) -> list[Any]:
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their path."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def with_leaves(tree: Any, leaves: Mapping[str, np.ndarray]) -> Any:
    """Returns a tree with the leaves at some paths replaced, each with the sharding of the old one.

    Raises:
        AssertionError: a leaf has another shape than the one that it replaces.
    """

    def value(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in leaves:
            return leaf
        chex.assert_shape(leaves[name], leaf.shape)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, leaves[name].__getitem__)

    return jax.tree_util.tree_map_with_path(value, tree)


def _saved_names(abstract: Any, saved: Any) -> dict[str, str]:
    """Maps the names of the leaves of a state to their names in a checkpoint."""
    parts = {name.partition("/")[0] for name in named_leaves(saved)}
    names = {}
    for name in named_leaves(abstract):
        part, slash, rest = name.partition("/")
        older = _RENAMED.get(part, part)
        names[name] = (older if older in parts and part not in parts else part) + slash + rest
    return names


def _as_dicts(tree: Any) -> dict[str, Any]:
    """Returns a tree as nested dicts, so that files do not depend on the types in memory."""
    return _nested(named_leaves(tree))


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns leaves given by their path as nested dicts."""
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def _inspect(state: Any) -> tuple[dict[str, bool], dict[str, int]]:
    """Returns, by leaf, whether it is finite, and the sum of its elements' bits modulo 2**32.

    The sum does not depend on the sharding, so that it can be compared after any restore.
    """
    leaves = named_leaves(state)
    finite, sums = jax.device_get(_finite_and_sums(list(leaves.values())))
    return dict(zip(leaves, finite.tolist(), strict=True)), dict(
        zip(leaves, sums.tolist(), strict=True)
    )


@jax.jit
def _finite_and_sums(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    arrays = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in leaves
    ]
    finite = [jnp.isfinite(array).all() for array in arrays]
    sums = [_bits(array).astype(jnp.uint32).sum() for array in arrays]
    return jnp.stack(finite), jnp.stack(sums)


def _bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool:
        return array
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def _some(items: Sequence[str], separator: str) -> str:
    more = len(items) - _SHOWN_LEAVES
    tail = [f"and {more} more"] if more > 0 else []
    return separator.join([*items[:_SHOWN_LEAVES], *tail])


def _quieten_orbax() -> None:
    """Drops the log messages of Orbax: its failures are raised here, once and with a remedy."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    if "orbax" not in record.pathname:
        return True
    if record.module == "async_checkpointer" and record.exc_info and record.exc_info[1]:
        _errors.append(record.exc_info[1])
    return False
