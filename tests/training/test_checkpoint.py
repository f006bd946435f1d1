"""Checkpoints: exact, restored on any devices, and never lost or confused."""

import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sop_jax.errors import UserError
from sop_jax.training import checkpoint


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A state with every kind of leaf and container of a train state."""

    step: jax.Array
    key: jax.Array
    teacher: dict[str, Any]
    optimizer: Any
    memory: jax.Array


def init(seed: int | jax.Array) -> State:
    key = jax.random.key(seed)
    params = {
        "block": {"kernel": jax.random.normal(key, (64, 64))},
        "scale": jax.random.normal(key, (64,), jnp.bfloat16),
    }
    return State(
        step=jnp.asarray(seed, jnp.int32),
        key=key,
        teacher=params,
        optimizer=optax.adamw(1e-3).init(params),
        memory=jax.random.normal(key, (512, 4)),
    )


def on(devices: int) -> State:
    """Returns the abstract state, with the memory sharded over this number of devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        jax.eval_shape(init, 0),
    )
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    abstract.memory = jax.ShapeDtypeStruct(
        abstract.memory.shape, abstract.memory.dtype, sharding=sharded
    )
    return abstract


def make(seed: int, devices: int = 8) -> State:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, on(devices))
    return jax.jit(init, out_shardings=shardings)(seed)


def bits(state: Any) -> list[bytes]:
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(state)
    ]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def save(workdir: pathlib.Path, *seeds: int, **kwargs: Any) -> None:
    checkpoints = checkpoint.Checkpoints(workdir, **kwargs)
    for seed in seeds:
        checkpoints.save(seed, make(seed))
    checkpoints.close()


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_restores_every_bit_on_any_number_of_devices(tmp_path: pathlib.Path, devices: int) -> None:
    save(tmp_path, 1)
    abstract = on(devices)
    state = checkpoint.restore(tmp_path, abstract)
    assert bits(state) == bits(make(1))
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.dtype == wanted.dtype
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_restores_one_part_without_the_rest(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1, 2)
    assert bits(checkpoint.restore_part(tmp_path, on(2).teacher, "teacher")) == bits(
        make(2).teacher
    )
    part = checkpoint.restore_part(tmp_path, on(2).teacher, "teacher", step=1)
    assert bits(part) == bits(make(1).teacher)


def test_keeps_the_last_and_every_so_many(tmp_path: pathlib.Path) -> None:
    assert checkpoint.steps(tmp_path) == [] and checkpoint.latest_step(tmp_path) is None
    save(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert checkpoint.steps(tmp_path) == [3, 6, 7, 8]
    assert checkpoint.latest_step(tmp_path) == 8


def test_a_state_may_be_donated_while_it_is_written(tmp_path: pathlib.Path) -> None:
    state = make(1)
    expected = bits(state)
    spoil = jax.jit(
        lambda state: jax.tree.map(
            lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf * 0 - 1,
            state,
        ),
        donate_argnums=0,
    )
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state)
    spoiled = spoil(state)
    assert state.memory.is_deleted() and float(spoiled.memory[0, 0]) == -1
    checkpoints.close()
    assert bits(checkpoint.restore(tmp_path, on(8))) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(tmp_path: pathlib.Path, value: float) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, make(1))
    state = make(2)
    state.teacher["scale"] = state.teacher["scale"].at[3].set(value)
    with pytest.raises(checkpoint.NotFiniteError, match="infinity in teacher/scale. The last"):
        checkpoints.save(2, state)
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [1]
    assert bits(checkpoint.restore(tmp_path, on(8))) == bits(make(1))


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_a_damaged_checkpoint_names_the_one_to_resume_from(
    tmp_path: pathlib.Path, damage: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "2"
    damage(largest_file(newest))
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        checkpoint.restore(tmp_path, on(8))
    message = str(caught.value)
    assert f"the checkpoint {newest} cannot be read" in message
    assert f"steps [1] remain: if it is damaged, delete the folder {newest}" in message
    assert capfd.readouterr().err == ""  # the only error, without messages of libraries
    assert bits(checkpoint.restore(tmp_path, on(8), step=1)) == bits(make(1))


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt", "array_metadatas/process_0"])
@pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink])
def test_damage_to_any_file_is_found(tmp_path: pathlib.Path, file: str, damage: Any) -> None:
    save(tmp_path, 1)
    damage(tmp_path / "checkpoints" / "1" / "state" / file)
    with pytest.raises(UserError, match="No other checkpoint remains: .* resumes from the start"):
        checkpoint.restore(tmp_path, on(8))


@pytest.mark.parametrize(
    "damage, words", [(truncate, " bytes, expected "), (flip, " have changed ")]
)
def test_damage_to_arrays_is_found_in_one_reading(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, damage: Any, words: str
) -> None:
    read: list[str] = []
    monkeypatch.setattr(checkpoint, "_read_in_turn", lambda path: read.append(str(path)))
    save(tmp_path, 1)
    checkpoint.restore(tmp_path, on(8))
    damage(largest_file(tmp_path / "checkpoints" / "1"))
    with pytest.raises(UserError, match=words):
        checkpoint.restore(tmp_path, on(8))
    assert not read


def test_an_array_that_cannot_be_decoded_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax reads in parallel, so that any of the reads can fail first."""

    def fail(*_: Any) -> None:
        raise ValueError("one of many")

    save(tmp_path, 1)
    largest = largest_file(tmp_path / "checkpoints" / "1")
    largest.write_bytes(bytes(largest.stat().st_size))
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fail)
    with pytest.raises(UserError, match="cannot be read: .*[Ee]rror .*memory"):
        checkpoint.restore(tmp_path, on(8))


def test_another_architecture_is_reported_leaf_by_leaf(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    other = on(8)
    other.teacher["bias"] = other.teacher.pop("scale")
    other.teacher["block"]["kernel"] = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    other.memory = jax.ShapeDtypeStruct(other.memory.shape, jnp.bfloat16)
    with pytest.raises(UserError) as caught:
        checkpoint.restore(tmp_path, other)
    assert set(str(caught.value).splitlines()[1:-1]) == {
        "  teacher/bias: missing, expected bfloat16[64]",
        "  teacher/block/kernel: float32[64, 64], expected float32[32, 64]",
        "  memory: float32[512, 4], expected bfloat16[512, 4]",
        "  teacher/scale: bfloat16[64], not expected",
    }
    with pytest.raises(UserError, match="teacher/bias: missing"):
        checkpoint.restore_part(tmp_path, other.teacher, "teacher")


def test_many_differences_are_counted(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    other = {"layers": [jax.ShapeDtypeStruct((1,), jnp.float32)] * 30}
    with pytest.raises(UserError, match="and 20 more"):
        checkpoint.restore_part(tmp_path, other, "teacher")


def test_a_folder_without_checkpoints(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint in .*check --workdir"):
        checkpoint.restore(tmp_path, on(8))
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"no checkpoint of step 5 .* only of \[1\]"):
        checkpoint.restore(tmp_path, on(8), step=5)


CHILD = """
import os, resource, signal, sys
import jax
from sop_jax.errors import Lost
from sop_jax.training import checkpoint
workdir, what = sys.argv[1:]
checkpoints = checkpoint.Checkpoints(workdir, keep_last=1)
small = {"x": jax.random.normal(jax.random.key(1), (4,))}
large = {"x": jax.random.normal(jax.random.key(2), (8_000_000,))}
checkpoints.save(1, small)
checkpoints.wait()
if what == "kill":
    checkpoints.save(2, large)
    while len(os.listdir(f"{workdir}/checkpoints")) < 2:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoints.save(2, large)
try:
    checkpoints.wait() if what == "wait" else checkpoints.save(3, small)
except Lost as error:
    print(error)
"""


def child(workdir: pathlib.Path, what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(workdir), what]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def restored_step(workdir: pathlib.Path) -> int:
    abstract = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}
    abstract = jax.tree.map(
        lambda leaf: leaf.update(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        abstract,
    )
    state = checkpoint.restore(workdir, abstract)
    assert (state["x"] == jax.random.normal(jax.random.key(1), (4,))).all()
    step = checkpoint.latest_step(workdir)
    assert step is not None
    return step


def test_a_kill_in_mid_save_leaves_the_last_good_one(tmp_path: pathlib.Path) -> None:
    assert child(tmp_path, "kill").returncode == -signal.SIGKILL
    folder = tmp_path / "checkpoints"
    assert len(list(folder.iterdir())) == 2, "the save was not under way"
    assert checkpoint.steps(tmp_path) == [1] and restored_step(tmp_path) == 1
    save(tmp_path, 3)
    assert {path.name for path in folder.iterdir()} == {"1", "3"}, "the rest is cleaned up"


@pytest.mark.parametrize("when", ["wait", "next"])
def test_a_write_that_fails_is_reported_and_loses_nothing(
    tmp_path: pathlib.Path, when: str
) -> None:
    result = child(tmp_path, when)
    assert re.search("could not be saved in .*: .*File too large.* resumes from", result.stdout)
    assert result.stderr == ""  # only the caller reports the error
    assert restored_step(tmp_path) == 1


def test_a_disk_too_small_is_reported_before_the_work(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "not" / "there" / "yet"
    checkpoint.check_space(workdir, 1000)
    with pytest.raises(UserError, match=r"need 1000000000 MB, and the disk of .* has .* MB free"):
        checkpoint.check_space(workdir, 10**15)
    checkpoint.check_space("gs://bucket/run", 10**15)


def test_the_sums_are_part_of_the_checkpoint(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"]["sums"]["memory"] ^= 1
    file.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="values have changed since they were saved: memory"):
        checkpoint.restore(tmp_path, on(8))


def test_a_checkpoint_of_an_earlier_version_is_restored_to_the_bit(tmp_path: pathlib.Path) -> None:
    """The field `carried` was called `memories`."""
    rows = jax.random.normal(jax.random.key(0), (4, 8))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(3, {"memories": {"cls": rows}, "step": jnp.int32(3)})
    checkpoints.close()
    now = {"carried": {"cls": rows}, "step": jnp.int32(3)}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), now
    )
    found = checkpoint.restore(tmp_path, abstract)
    assert found["carried"]["cls"].tobytes() == rows.tobytes() and found["step"] == 3
    part = checkpoint.restore_part(tmp_path, abstract["carried"], "carried")
    assert part["cls"].tobytes() == rows.tobytes()
