"""Devices: the mesh, and how state and batches are sharded over it."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sop_jax.errors import UserError

# Both axes split images and memories; `fsdp` splits parameters and optimizer state as well.
AXES = ("data", "fsdp")

GATHERED = "gathered"  # the checkpoint name of gathered parameters, see `is_gathered`

SMALL = 2**14  # numbers; a smaller parameter costs less to replicate than to gather


def make_mesh(data: int = 0, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of data x fsdp devices.

    Args:
        data: the number of groups that each hold all parameters; 0 for as many as the devices
            allow.
        fsdp: the number of devices in each group, over which its parameters are split.
        devices: the devices to choose from; by default all that JAX sees.

    Raises:
        UserError: there are too few devices, a run of several processes would leave some unused,
            or the axes do not fit the interconnect of TPUs.
    """
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    if data == 0 and available % fsdp:
        raise UserError(
            f"mesh.fsdp {fsdp} does not divide the {available} available devices; choose a divisor "
            f"of {available}, or set both axes: --config.mesh.data and --config.mesh.fsdp"
        )
    data = data or available // fsdp
    count = data * fsdp
    asked = f"mesh.data {data} times mesh.fsdp {fsdp} asks for {count} devices"
    remedy = f"set --config.mesh.data=0 to use all, and mesh.fsdp to a divisor of {available}"
    if count > available:
        raise UserError(f"{asked}, but {available} are available; {remedy}")
    if count < available and len({device.process_index for device in devices}) > 1:
        raise UserError(f"{asked}, but a run on several hosts must use all {available}; {remedy}")
    try:
        return jax.make_mesh(
            (data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:count]
        )
    except (NotImplementedError, AssertionError) as error:
        # Raised for TPUs only, where JAX requires the axes of a mesh to follow the interconnect.
        sizes = np.max([device.coords for device in devices], axis=0) + 1
        torus = " x ".join(map(str, sizes))
        raise UserError(
            f"{asked}, which do not fit the axes of the {torus} torus of chips; use all chips, and "
            "set mesh.fsdp to the length of an axis of the torus or to a product of such lengths"
        ) from error


def check_split(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError if the devices do not divide a batch, or each microbatch of a batch."""
    count = mesh.devices.size
    if batch_size % (count * accumulate):
        parts = f"{count} device{'s' * (count > 1)}" + f" in {accumulate} microbatches" * (
            accumulate > 1
        )
        raise UserError(
            f"batch_size {batch_size} cannot be split over {parts}; choose a multiple of "
            f"{count * accumulate}"
            + " or a smaller --config.accumulate" * (accumulate > 1)
            + ", or fewer devices with --config.mesh.data"
            * (count > 1 and jax.process_count() == 1)
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is the same on every device."""
    return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is split over all devices."""
    return NamedSharding(mesh, P(AXES))


def share_parameter(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the partition of a parameter of a given shape.

    The widest axis that `fsdp` divides is split over it. Parameters of fewer than SMALL numbers
    are replicated.
    """
    fsdp = mesh.shape["fsdp"]
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < SMALL or not axes:
        return P()
    widest = max(axes, key=lambda axis: (shape[axis], axis))
    return P(*(None,) * widest, "fsdp")


# How the leaves of a train state are sharded, by their path; the first matching pattern decides.
SHARDING: tuple[tuple[str, Callable[[tuple[int, ...], Mesh], P]], ...] = (
    (r"carried/(\w+/)*queue/rows$", lambda shape, mesh: P(None, AXES)),  # by lane, of each view
    (r"carried/(\w+/)*(rows|image)$", lambda shape, mesh: P(AXES)),  # memories, by lane
    # The axis of stacked layers is never split, because only one layer is used at a time.
    (r".*/blocks/", lambda shape, mesh: P(None, *share_parameter(shape[1:], mesh))),
    (r"(student|teacher|opt_state)/", share_parameter),
    (r"", lambda shape, mesh: P()),
)


def with_shardings(abstract: Any, mesh: Mesh) -> Any:
    """Returns an abstract train state whose leaves have the shardings that SHARDING gives them."""

    def lay(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(rule for pattern, rule in SHARDING if re.match(pattern, name))
        sharding = NamedSharding(mesh, spec(leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(lay, abstract)


def shardings(abstract: Any) -> Any:
    """Returns the shardings of the leaves of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def gatherer(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a function that gathers parameters, which `share_parameter` splits, for their use.

    Their gradients are summed over the devices and sharded as the parameters are. Without this,
    XLA may choose to split the activations instead of gathering the weights, and does.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        spec = share_parameter(leaf.shape, mesh)
        return leaf if spec == P() else whole(leaf, NamedSharding(mesh, spec))

    return lambda params: jax.tree.map(gather, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole(parameter: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns the whole parameter on every device; its gradient is split as `sharding` says."""
    return _whole(parameter, sharding)


def _whole(parameter: jax.Array, sharding: NamedSharding) -> jax.Array:
    gathered = jax.lax.with_sharding_constraint(parameter, NamedSharding(sharding.mesh, P()))
    return checkpoint_name(gathered, GATHERED)


def _whole_forward(parameter: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, None]:
    return _whole(parameter, sharding), None  # not `whole`, whose inside `is_gathered` cannot see


def _whole_backward(sharding: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, sharding),)


def is_gathered(primitive: Any, *_: Any, name: str | None = None, **__: Any) -> bool:
    """Whether an operation gathers a parameter, for policies of `jax.checkpoint`."""
    return primitive.name == "sharding_constraint" or name == GATHERED


whole.defvjp(_whole_forward, _whole_backward)


def host_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the positions in a global batch that this process's devices hold, ascending."""
    parts = split(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts])).tolist()


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns an array that every process has in full as one global array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the global arrays of a batch, split by image, from the parts of all hosts.

    Args:
        mesh: the devices.
        batch: this host's part of the batch, with images on the leading axis.
    """
    sharding = split(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
