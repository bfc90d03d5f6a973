"""Meshes of some of the simulated devices."""

import jax
from jax.sharding import AxisType, Mesh

from experiments import devices


def mesh_of(count: int) -> Mesh:
    """The first devices, to share batches."""
    few = jax.devices()[:count]
    return jax.make_mesh((count,), (devices.DATA,), axis_types=(AxisType.Auto,), devices=few)
