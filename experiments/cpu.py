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


def use_all_cores(batch_size: int, image_shape: tuple[int, ...]) -> None:
    """Makes each core a device of JAX's CPU platform, and keeps freed memory at hand.

    XLA's fastest convolutions for CPUs run on one core each; as many devices as share a batch keep
    all cores busy. And Linux would take back hundreds of megabytes that a step frees, only to hand
    them out page by page at the next step. Both make steps on small images slower, so those are
    left alone. So is a process in which JAX has computed already, or in which `XLA_FLAGS` sets the
    number of devices.

    Args:
        batch_size: Images in a batch; the devices are as many as divide it, one a core at most.
        image_shape: Shape of an image, (height, width, channels); of a text (length,).
    """
    if math.prod(image_shape[:2]) < _SMALL or "device_count" in os.environ.get("XLA_FLAGS", ""):
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


def compiler_options() -> dict[str, str]:
    """Returns XLA's options for a training step on this machine's devices.

    On CPUs XLA removes barriers before it fuses, unless it is told to skip that pass. Of its two
    libraries of convolutions there, YNNPACK, the faster one, runs a convolution on a single core;
    so a lone device takes Eigen, which is left where nothing goes to YNNPACK.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    if jax.local_device_count() == 1:
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
