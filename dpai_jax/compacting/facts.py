"""What is known of a value before it is computed, entry by entry.

All arrays here are boolean and may have size one along an axis whose logical size is larger: the
same then holds for every index along it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]
Flags: TypeAlias = np.ndarray
# For each axis the indices that stay, or None where all do.
Kept: TypeAlias = tuple[np.ndarray | None, ...]


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of one value.

    Attributes:
      shape: its shape.
      live: the entries that can change: they depend on the input, or on weights that stay.
      filled: the entries that may be other than zero.
      activation: whether it depends on the input when nothing is pruned.
    """

    shape: Shape
    live: Flags
    filled: Flags
    activation: bool = False


def flags(shape: Shape, value: bool) -> Flags:
    """The same for every entry."""
    return np.full((1,) * len(shape), value)


def spread(x: Flags, shape: Shape, *axes: int) -> Flags:
    """Flags with these axes written out."""
    target = [shape[i] if i in axes else x.shape[i] for i in range(x.ndim)]
    return np.broadcast_to(x, target)


def any_of(x: Flags, axes: Sequence[int], keepdims: bool = False) -> Flags:
    """Whether any flag is set along some axes."""
    axes = tuple(axes)
    return np.any(x, axes, keepdims=True) if keepdims else np.asarray(np.any(x, axes))


def along(x: Flags, axis: int, size: int) -> np.ndarray:
    """For each index along an axis, whether any flag is set."""
    vector = np.any(x, tuple(i for i in range(x.ndim) if i != axis))
    return np.broadcast_to(vector, size)


def rectangle(x: Flags) -> Flags:
    """The smallest block of indices along each axis that holds all flags."""
    if not x.any():
        return np.zeros((1,) * x.ndim, bool)
    vectors = []
    for axis, size in enumerate(x.shape):
        vector = along(x, axis, size)
        vectors.append(vector.reshape([-1 if i == axis else 1 for i in range(x.ndim)]))
    return functools.reduce(np.logical_and, vectors, np.ones((1,) * x.ndim, bool))


def block(kept: Kept, shape: Shape) -> Flags:
    """Flags for the block of these indices."""
    result = np.ones((1,) * len(shape), bool)
    for axis, indices in enumerate(kept):
        if indices is not None:
            vector = np.zeros(shape[axis], bool)
            vector[indices] = True
            result = result & vector.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return result


def kept_of(x: Flags, shape: Shape) -> Kept | None:
    """The indices along each axis that hold all flags; None if there is no flag."""
    if not x.any():
        return None
    kept: list[np.ndarray | None] = []
    for axis, size in enumerate(shape):
        vector = along(x, axis, size)
        kept.append(None if vector.all() else np.flatnonzero(vector))
    return tuple(kept)


def within(x: Flags, kept: Kept) -> Flags:
    """The flags at these indices; axes that are held once stay so."""
    for axis, indices in enumerate(kept):
        if indices is not None and x.shape[axis] > 1:
            x = np.take(x, indices, axis)
    return x


def indices(kept: np.ndarray | None, size: int) -> np.ndarray:
    """The indices that stay along an axis, written out."""
    return np.arange(size) if kept is None else kept


def matmul(a: Flags, b: Flags) -> Flags:
    """Whether any index of the last axis of `a` and the last but one of `b` is set in both."""
    size = max(a.shape[-1], b.shape[-2])
    a = np.broadcast_to(a, (*a.shape[:-1], size))
    b = np.broadcast_to(b, (*b.shape[:-2], size, b.shape[-1]))
    product: Flags = np.matmul(a.astype(np.float32), b.astype(np.float32)) > 0
    return product


def merged(x: Flags, shape: Shape, axes: Sequence[int]) -> Flags:
    """Flags with these axes, moved to the end, as one; size one if they are held once."""
    rest = [i for i in range(x.ndim) if i not in axes]
    if all(x.shape[i] == 1 for i in axes):
        return x.transpose(*rest, *axes).reshape(*(x.shape[i] for i in rest), 1)
    x = spread(x, shape, *axes).transpose(*rest, *axes)
    return x.reshape(*x.shape[: len(rest)], math.prod(shape[i] for i in axes))
