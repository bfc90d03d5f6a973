"""Clocks: how long a call takes, and how fast the memory is that it can't outrun."""

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
    """Returns the `spread` of a call's times, until all arrays that it returns are computed.

    Args:
        fn: What to measure.
        repeats: Calls that are timed, at least one.
        warmup: Calls before them, among which the first compiles.

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

    It is what a jitted elementwise function moves at most on JAX's default device, all cores at
    work on the CPU: a step that must read and write so many bytes takes no less than their number
    divided by this one.

    Args:
        size: Bytes of the array of float32. It must be many times larger than the caches.
        repeats: Passes over it, of whose times the median counts.

    Raises:
        ValueError: The array would be empty, or no pass would be timed.
    """
    if size < 4:
        raise ValueError(f"size must be at least 4 bytes, one float32; got {size}.")
    array = jnp.zeros(size // 4, jnp.float32)
    # In place, for the pages of a new array would first have to be found and cleared.
    increment = functools.partial(jax.jit, donate_argnums=0)(lambda x: x + 1.0)

    def step() -> jax.Array:
        nonlocal array
        array = increment(array)
        return array

    return 2 * array.nbytes / call_seconds(step, repeats)["median"]


def array_bytes() -> int:
    """Returns the bytes of all of JAX's arrays that are held just now."""
    return sum(array.nbytes for array in jax.live_arrays())


def peak_bytes(call: Callable[[], Any]) -> int:
    """Returns by how much the memory of this process grows while it makes a call, at most.

    Call it once before, or what is compiled counts too. Linux only.
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
