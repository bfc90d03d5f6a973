"""NumPy's floats as XLA's on CPUs: numbers below the smallest normal one are zero."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

# The word of the C library's `fenv_t` that holds the processor's MXCSR on Linux, and in it the bits
# by which results and operands below the smallest normal number are taken as zero.
_MXCSR, _FLUSH = 7, 0x8040


@contextlib.contextmanager
def as_xla() -> Iterator[None]:
    """Within the block NumPy takes numbers below the smallest normal one as zero; this thread's."""
    before, libm = _Environment(), _libm()
    libm.fegetenv(ctypes.byref(before))
    within = _Environment.from_buffer_copy(before)
    within.words[_MXCSR] |= _FLUSH
    libm.fesetenv(ctypes.byref(within))
    try:
        with np.errstate(all="ignore"), _blas_in_this_thread():
            yield
    finally:
        libm.fesetenv(ctypes.byref(before))


@functools.cache
def flushes() -> bool:
    """Whether `as_xla` works here."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    least, below = np.full(64, 2.0**-126, np.float32), np.full(64, 2.0**-130, np.float32)
    with as_xla():
        return not np.any(least / 2) and not np.any(below > 0)


@contextlib.contextmanager
def _blas_in_this_thread() -> Iterator[None]:
    """Within the block BLAS uses this thread alone: in others small numbers are not zero.

    Besides, while programs compile on all cores, threads of BLAS wait long for each other. Their
    number is a setting of the process, so that only one thread can be in such a block.
    """
    with _TURN, _blas().limit(limits=1):
        yield


_TURN = threading.RLock()


@functools.cache
def _blas() -> Any:
    import threadpoolctl  # here, so that importing the library stays quick

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


class _Environment(ctypes.Structure):
    """The control of floats, as the C library stores it."""

    _fields_ = (("words", ctypes.c_uint32 * 8),)


@functools.cache
def _libm() -> ctypes.CDLL:
    return ctypes.CDLL("libm.so.6")
