"""Devices: the mesh, and where state and batches lie on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sop_jax.errors import UserError


def make_mesh(devices: int = 0) -> Mesh:
    """A mesh of one axis, `data`, that splits batches over so many devices; 0 for all."""
    available = jax.device_count()
    count = devices or available
    if count > available:
        raise UserError(
            f"mesh.data asks for {count} devices, but {available} are there; "
            "set --config.mesh.data=0 to use all"
        )
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def check_split(mesh: Mesh, batch_size: int) -> None:
    """Raises UserError when the devices do not divide a batch."""
    count = mesh.devices.size
    if batch_size % count:
        raise UserError(
            f"batch_size {batch_size} cannot be split over {count} devices; choose a multiple of "
            f"{count}, or fewer devices with --config.mesh.data"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, P("data"))


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's part of a batch as global arrays, split by image."""
    sharding = split(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
