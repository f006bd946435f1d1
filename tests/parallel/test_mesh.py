"""Meshes of eight virtual devices, and errors of impossible meshes."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sop_jax.errors import UserError
from sop_jax.parallel.mesh import (
    AXES,
    check_split,
    host_rows,
    make_mesh,
    put,
    replicated,
    split,
    to_devices,
    with_shardings,
)


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [
        (0, 1, (8, 1)),
        (1, 1, (1, 1)),
        (4, 1, (4, 1)),
        (0, 4, (2, 4)),
        (2, 2, (2, 2)),
        (1, 8, (1, 8)),
    ],
)
def test_uses_as_many_devices_as_asked_or_all(data: int, fsdp: int, shape: tuple[int, int]) -> None:
    mesh = make_mesh(data, fsdp)
    assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == shape
    assert mesh.devices.ravel().tolist() == jax.devices()[: shape[0] * shape[1]]
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("data", "fsdp", "words"),
    [
        (16, 1, r"mesh.data 16 times mesh.fsdp 1 asks for 16 devices, but 8 are.*mesh.data=0"),
        (4, 4, r"16 devices, but 8 are available.*mesh.fsdp to a divisor of 8"),
        (0, 3, r"mesh.fsdp 3 does not divide the 8 available devices.*divisor of 8"),
    ],
)
def test_devices_that_are_not_there_name_the_way_out(data: int, fsdp: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_mesh(data, fsdp)


class OtherHost(NamedTuple):
    """A device of another process."""

    process_index: int


def test_several_hosts_leave_no_device_idle() -> None:
    devices = [OtherHost(i // 4) for i in range(8)]
    with pytest.raises(UserError, match=r"4 devices, but a run on several hosts must use all 8"):
        make_mesh(4, devices=devices)


@pytest.mark.parametrize(("devices", "batch_size"), [(0, 12), (3, 16)])
def test_a_batch_that_cannot_be_split_names_the_way_out(devices: int, batch_size: int) -> None:
    count = devices or 8
    message = rf"batch_size {batch_size} cannot be split over {count} .*multiple of {count}.*mesh"
    with pytest.raises(UserError, match=message):
        check_split(make_mesh(devices), batch_size)


def test_microbatches_are_split_too() -> None:
    check_split(make_mesh(4, 2), 48, accumulate=3)
    with pytest.raises(UserError, match=r"in 4 microbatches; choose a multiple of 32 or a smaller"):
        check_split(make_mesh(4, 2), 48, accumulate=4)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("student/head/fc1/kernel", (512, 2048), P(None, "fsdp")),
        ("teacher/head/fc3/kernel", (2048, 256), P("fsdp")),
        ("opt_state/1/0/mu/backbone/blocks/fc1/kernel", (12, 768, 3072), P(None, None, "fsdp")),
        ("opt_state/1/0/nu/backbone/blocks/qkv/kernel", (4096, 768, 766), P(None, "fsdp")),
        ("student/backbone/blocks/fc1/bias", (12, 3072), P(None)),  # small
        ("student/head/fc1/kernel", (511, 2047), P()),  # odd
        ("carried/cls/rows", (64, 10, 256), P(AXES)),
        ("carried/patch/image", (64, 10), P(AXES)),
        ("carried/cls/next", (), P()),
        ("carried/frozen/cls", (2, 4096, 256), P()),
        ("step", (), P()),
    ],
)
def test_rules_say_how_a_leaf_is_sharded(path: str, shape: tuple[int, ...], spec: P) -> None:
    tree: Any = jax.ShapeDtypeStruct(shape, np.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    (leaf,) = jax.tree.leaves(with_shardings(tree, make_mesh(2, 4)))
    assert leaf.sharding.spec == spec
    (whole,) = jax.tree.leaves(with_shardings(tree, make_mesh(8, 1)))
    assert "fsdp" not in whole.sharding.spec  # a group of one device shards nothing


def test_one_host_holds_every_place_of_a_batch() -> None:
    assert host_rows(make_mesh(4, 2), 16) == list(range(16))


def test_an_array_that_every_host_has_is_laid_out() -> None:
    mesh = make_mesh(4, 2)
    placed = put(np.arange(16), split(mesh))
    assert [shard.data.tolist() for shard in placed.addressable_shards][3] == [6, 7]
    np.testing.assert_array_equal(placed, np.arange(16))


def test_a_batch_is_split_by_image_in_order() -> None:
    mesh = make_mesh(4)
    batch = {"x": np.arange(24).reshape(8, 3), "index": np.arange(8)}
    placed = to_devices(mesh, batch)
    for name, array in batch.items():
        assert placed[name].sharding.is_equivalent_to(split(mesh), array.ndim)
        np.testing.assert_array_equal(placed[name], array)
        shards = sorted(placed[name].addressable_shards, key=lambda shard: shard.device.id)
        for i, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, array[2 * i : 2 * i + 2])


def test_replicated_is_whole_on_every_device() -> None:
    array = jax.device_put(np.arange(6), replicated(make_mesh()))
    assert [shard.data.shape for shard in array.addressable_shards] == [(6,)] * 8
