"""Clocks: the time and the memory of a call, and the bandwidth that limits it."""

import functools
import gc
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the median, the least and the most of some times."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def call_seconds(fn: Callable[[], Any], repeats: int = 10, warmup: int = 2) -> dict[str, float]:
    """Returns the `spread` of a call's times, each until all returned arrays are computed.

    Args:
        fn: What to measure.
        repeats: Calls that are timed, at least one.
        warmup: Calls before them; the first one compiles.

    Raises:
        ValueError: No call would be timed.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}.")
    for _ in range(warmup):
        jax.block_until_ready(fn())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        seconds.append(time.perf_counter() - start)
    return spread(seconds)


def copy_bandwidth(size: int = 2**30, repeats: int = 10) -> float:
    """Returns the bytes per second, read and written, of x + 1 on an array in place.

    This is the most that a jitted elementwise function moves on JAX's default device. A step that
    must read and write some bytes takes at least their number divided by this bandwidth.

    Args:
        size: Bytes of the float32 array. It must be many times larger than the caches.
        repeats: Passes over it; the median of their times counts.

    Raises:
        ValueError: The array would be empty, or no pass would be timed.
    """
    if size < 4:
        raise ValueError(f"size must be at least 4 bytes, one float32; got {size}.")
    array = jnp.zeros(size // 4, jnp.float32)
    # In place, as the pages of a new array would first have to be allocated and cleared.
    increment = functools.partial(jax.jit, donate_argnums=0)(lambda x: x + 1.0)

    def step() -> jax.Array:
        nonlocal array
        array = increment(array)
        return array

    return 2 * array.nbytes / call_seconds(step, repeats)["median"]


def array_bytes() -> int:
    """Returns the bytes of all live JAX arrays."""
    return sum(array.nbytes for array in jax.live_arrays())


def peak_bytes(call: Callable[[], Any]) -> int:
    """Returns the peak by which a call grows the memory of this process. Linux only.

    Make the call once before, or its compilation is included.
    """
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def _memory(line: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    number = next(row for row in status.splitlines() if row.startswith(line + ":"))
    return int(number.split()[1]) * 1024
