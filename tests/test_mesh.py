"""Meshes of eight virtual devices, and the errors of those that cannot be."""

import jax
import numpy as np
import pytest

from sop_jax.errors import UserError
from sop_jax.mesh import check_split, make_mesh, replicated, split, to_devices


@pytest.mark.parametrize(("asked", "used"), [(0, 8), (1, 1), (4, 4), (8, 8)])
def test_uses_as_many_devices_as_asked_or_all(asked: int, used: int) -> None:
    mesh = make_mesh(asked)
    assert mesh.axis_names == ("data",)
    assert mesh.devices.tolist() == jax.devices()[:used]


def test_more_devices_than_there_are_names_the_way_out() -> None:
    with pytest.raises(UserError, match=r"16 devices, but 8 are there.*mesh.data=0"):
        make_mesh(16)


@pytest.mark.parametrize(("devices", "batch_size"), [(0, 12), (3, 16)])
def test_a_batch_that_cannot_be_split_names_the_way_out(devices: int, batch_size: int) -> None:
    count = devices or 8
    message = rf"batch_size {batch_size} cannot be split over {count} .*multiple of {count}.*mesh"
    with pytest.raises(UserError, match=message):
        check_split(make_mesh(devices), batch_size)


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
