"""Everything that is done for CPUs only. On accelerators it does nothing."""

import ctypes
import math
import os
import sys
from typing import Any

import jax
from jax import lax

# From this many pixels an image on, a step of ResNet-20 gets faster.
_SMALL = 16 * 16

# Numbers from malloc.h: a single heap (M_ARENA_MAX), which is never trimmed (M_TRIM_THRESHOLD) and
# also holds large blocks (M_MMAP_MAX).
_MALLOC_OPTIONS = ((-8, 1), (-1, 2**31 - 1), (-4, 0))


def keep_freed_memory(image_shape: tuple[int, ...]) -> None:
    """Keeps freed memory in the process, unless images are small.

    Otherwise Linux takes back hundreds of megabytes that a step frees, and hands them out again
    page by page in the next step. On small images it makes steps slower. Call it before JAX starts
    its threads, as each of them would get its own heap.

    Args:
        image_shape: Shape of an image, (height, width, channels); of a text (length,).
    """
    if math.prod(image_shape[:2]) < _SMALL or sys.platform != "linux":
        return
    set_malloc_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_malloc_option is not None:  # of the GNU C library
        for option, value in _MALLOC_OPTIONS:
            set_malloc_option(option, value)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compiler_options() -> dict[str, str]:
    """Returns XLA's options for a training step on this machine's devices.

    On CPUs XLA removes barriers before it fuses, unless told to skip that pass. It has two
    libraries for convolutions. YNNPACK is the faster one, but runs a convolution on one core. So a
    single device with several cores uses Eigen, by sending nothing to YNNPACK.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    if jax.local_device_count() == 1 and cores() > 1:
        options["xla_cpu_experimental_ynn_fusion_type"] = ""
    return options


def settled(batch: Any) -> Any:
    """Returns the batch; on CPUs it first waits until the batch is computed.

    On CPUs a step that was started before its batch is ready runs on the threads that computed the
    batch. Devices that wait for one another within a step could then block all threads.
    """
    return jax.block_until_ready(batch) if jax.default_backend() == "cpu" else batch


def convolve(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Returns `lax.conv_general_dilated` of the same arguments; on CPUs its input is written out.

    The kernel's gradient reads the input transposed. XLA on CPUs would fuse this with everything
    that the input is computed from, and compute the norms and residual sums of a whole stage again
    for each layer, in a slow order. A barrier prevents it, in programs that are compiled with
    `compiler_options()`.
    """
    if jax.default_backend() == "cpu":
        x = lax.optimization_barrier(x)
    return lax.conv_general_dilated(x, kernel, *args, **kwargs)
