"""Training on all devices: batches are split over them, everything else is whole on each."""

import ctypes
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.config import ConfigError

DATA = "data"
"""The mesh axis over which batches are split."""


# Pixels of an image from which on a step of ResNet-20 gains.
_SMALL = 16 * 16

# The numbers of malloc.h: a single heap (M_ARENA_MAX), never trimmed (M_TRIM_THRESHOLD), that large
# blocks come from, too (M_MMAP_MAX).
_MALLOC_OPTIONS = ((-8, 1), (-1, 2**31 - 1), (-4, 0))


def use_all_cores(batch_size: int, image_shape: tuple[int, ...]) -> None:
    """Makes each core a device of JAX's CPU platform, and lets freed memory stay at hand.

    The fastest convolutions that XLA has for CPUs run on one core each; as many devices as share a
    batch keep all cores busy. And of what a step frees, Linux would take back hundreds of
    megabytes, to hand them out page by page at the next step. Steps on small images are the slower
    for both, so for those nothing is done; nor where JAX has computed something already, or where
    `XLA_FLAGS` sets the number of devices.

    Args:
        batch_size: Images in a batch; the devices are as many as divide it, one a core at most.
        image_shape: Shape of an image, (height, width, channels).
    """
    height, width, _ = image_shape
    if height * width < _SMALL or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    number = max(n for n in range(1, (cores or 1) + 1) if batch_size % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        return
    # Before JAX starts its threads, each of which would have a heap of its own.
    if sys.platform != "linux":
        return
    set_malloc_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_malloc_option is not None:  # of the GNU C library
        for option, value in _MALLOC_OPTIONS:
            set_malloc_option(option, value)


def data_mesh() -> Mesh:
    """Returns the mesh of all devices, those of other processes too, along one axis."""
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


def split(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """Returns arrays split along their first axis, of which each process has the whole."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    return [jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in arrays]


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_each(mesh: Mesh, tree: Any) -> Any:
    """Returns a tree of arrays, each of them whole on every device."""
    return jax.device_put(tree, whole(mesh))
