"""Training on all devices: batches are split over them, everything else is replicated."""

from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.config import ConfigError

DATA = "data"
"""The mesh axis over which batches are split."""


def data_mesh() -> Mesh:
    """Returns a mesh of all devices, including those of other processes, with one axis."""
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Checks that the mesh can split a batch.

    Raises:
        ConfigError: Some devices would get more images than others.
    """
    if batch_size % mesh.shape[DATA]:
        raise ConfigError(
            f"batch_size must be a multiple of the {mesh.shape[DATA]} devices that share a batch; "
            f"got {batch_size}."
        )


def split(mesh: Mesh, *trees: Any, axis: int = 0) -> list[Any]:
    """Returns trees of arrays split along an axis; each process must have the full arrays."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), list(trees)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, PartitionSpec())


def on_each(mesh: Mesh, tree: Any) -> Any:
    """Returns a tree of arrays replicated on every device.

    Args:
        mesh: The devices.
        tree: Arrays that each process has in full.
    """
    if jax.process_count() > 1:
        return multihost_utils.host_local_array_to_global_array(tree, mesh, PartitionSpec())
    return jax.device_put(tree, replicated(mesh))
