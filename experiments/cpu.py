"""All that is done for CPUs alone. On accelerators none of it does anything."""

import ctypes
import math
import os
import sys
from typing import Any

import jax
from jax import lax

# Pixels of an image from which on a step of ResNet-20 gains.
_SMALL = 16 * 16

# The numbers of malloc.h: a single heap (M_ARENA_MAX), never trimmed (M_TRIM_THRESHOLD), that large
# blocks come from, too (M_MMAP_MAX).
_MALLOC_OPTIONS = ((-8, 1), (-1, 2**31 - 1), (-4, 0))


def keep_freed_memory(image_shape: tuple[int, ...]) -> None:
    """Keeps freed memory at hand, where images are not small.

    Linux would take back hundreds of megabytes that a step frees, only to hand them out page by
    page at the next step. A step on small images gets slower by it. It works best before JAX starts
    its threads, each of which would have a heap of its own.

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

    On CPUs XLA removes barriers before it fuses, unless it is told to skip that pass. Of its two
    libraries of convolutions there, YNNPACK, the faster one, runs a convolution on a single core;
    so a lone device of several cores takes Eigen, which is left where nothing goes to YNNPACK.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    if jax.local_device_count() == 1 and cores() > 1:
        options["xla_cpu_experimental_ynn_fusion_type"] = ""
    return options


def settled(batch: Any) -> Any:
    """Returns what it is given, on CPUs once it is computed.

    There a step that was started before its batch is ready continues on the threads that computed
    the batch. Devices that wait for one another in a step could then take all threads.
    """
    return jax.block_until_ready(batch) if jax.default_backend() == "cpu" else batch


def convolve(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Returns `lax.conv_general_dilated` of the same arguments, its input written out on CPUs.

    The kernel's gradient reads the input transposed. XLA on CPUs would fuse that with all that
    leads to the input, and so compute the norms and residual sums of a whole stage again for each
    layer, in a slow order. A barrier keeps them apart, in programs that are compiled with
    `compiler_options()`.
    """
    if jax.default_backend() == "cpu":
        x = lax.optimization_barrier(x)
    return lax.conv_general_dilated(x, kernel, *args, **kwargs)
