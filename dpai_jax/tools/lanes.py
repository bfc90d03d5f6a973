"""Threads that hand programs to a CPU, so that several run at the same time.

What one thread hands to a CPU runs one after another, and a small program leaves cores idle.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import jax

from dpai_jax.tools.switches import all_switches, usual_switches

S = TypeVar("S")
T = TypeVar("T")

# How many threads besides the caller's.
_OTHERS = 1


def shares_of(items: Sequence[T], *, of_one_size: bool = False) -> list[Sequence[T]]:
    """Splits items into as many shares as can run `side_by_side`.

    There is one where JAX's switches in this thread are not as in others, which do not see them.

    Args:
      items: at least one.
      of_one_size: whether all shares must be of one size; then there may be fewer.

    Returns:
      The shares.
    """
    number = min(_most(), len(items))
    if of_one_size:
        number = max(n for n in range(1, number + 1) if len(items) % n == 0)
    if number > 1 and all_switches() != _others()[0].submit(_usual(all_switches)).result():
        number = 1
    ends = [len(items) * i // number for i in range(number + 1)]
    return [items[a:b] for a, b in itertools.pairwise(ends)]


def _most() -> int:
    """How many threads there may be."""
    is_one_cpu = jax.default_backend() == "cpu" and jax.local_device_count() == 1
    return min(os.cpu_count() or 1, 1 + _OTHERS) if is_one_cpu else 1


def side_by_side(fn: Callable[[S], T], shares: Sequence[S]) -> list[T]:
    """The function of each share, each in a thread of its own, the first in this one."""
    own = _usual(fn)
    running = [thread.submit(own, x) for thread, x in zip(_others(), shares[1:], strict=False)]
    try:
        first = fn(shares[0])
    finally:
        wait(running)
    return [first, *(other.result() for other in running)]


def _usual(fn: Callable[..., T]) -> Callable[..., T]:
    """The function with the switches that this thread has within `prune`."""
    return usual_switches()(fn)


@functools.cache
def _others() -> list[ThreadPoolExecutor]:
    return [ThreadPoolExecutor(1, thread_name_prefix="dpai_jax_lane") for _ in range(_OTHERS)]
