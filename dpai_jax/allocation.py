"""How many weights each layer keeps: densities over layers, as exact integers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from dpai_jax.paths import Layer, Network

PyTree = Any


def weights_to_keep(net: Network, sparsity: float) -> int:
    """The number of weights that a network keeps at a sparsity, `round((1 − sparsity)·N)`.

    As the `allocation` of a method it leaves the choice to one threshold over all layers.

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      The number of weights to keep.

    Raises:
      ValueError: if the sparsity is outside [0, 1), or keeps fewer weights than there are layers.
    """
    if not isinstance(sparsity, numbers.Real) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number in [0, 1), got {sparsity!r}")
    # As a fraction of integers: a float32 product is off by one at 25 million weights.
    total = round((1 - Fraction(str(float(sparsity)))) * net.size)
    layers = sum(layer.copies for layer in net.layers)
    if total < layers:
        raise ValueError(
            f"sparsity {sparsity} keeps {total} of {net.size} weights, fewer than the network has "
            f"layers ({layers}): each needs at least one"
        )
    return total


def er(net: Network, sparsity: float) -> PyTree:
    """Weights to keep per layer by the Erdős-Rényi rule.

    Density is proportional to (in + out)/(in·out), whatever a convolution's taps, capped at one
    and solved again for the layers that are not full.

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      As `erk`.

    Raises:
      ValueError: as `erk`.

    References:
      Mocanu et al., Nature Communications 2018; Evci et al., Rigging the Lottery, ICML 2020.
    """
    return _allocate(net, sparsity, [_features(layer) * _taps(layer) for layer in net.layers])


def erk(net: Network, sparsity: float) -> PyTree:
    """Weights to keep per layer by the Erdős-Rényi-kernel rule.

    Density is proportional to (taps + in + out)/(taps·in·out), the sum over the product of a
    kernel's axes, capped at one and solved again for the layers that are not full.

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      Pytree parallel to the parameters of the number of weights to keep: an int for each layer,
      0 for a leaf that is not prunable, and for layers stacked in one kernel an integer array, of
      the kernel's rank and of size one but along the stack, with a number for each of them.
      The sum is exactly `round((1 − sparsity)·N)`, and at least one weight stays in each layer.

    Raises:
      ValueError: if the sparsity is outside [0, 1), or keeps fewer weights than there are layers.

    References:
      Evci et al., Rigging the Lottery, ICML 2020; Mocanu et al., Nature Communications 2018.
    """
    return _allocate(net, sparsity, [_kernel_sum(layer) for layer in net.layers])


def uniform(net: Network, sparsity: float) -> PyTree:
    """Weights to keep per layer at one density for all layers.

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      As `erk`.

    Raises:
      ValueError: as `erk`.
    """
    return _allocate(net, sparsity, [layer.size // layer.copies for layer in net.layers])


def _kernel_sum(layer: Layer) -> int:
    """The sum of a kernel's sizes: its taps along each axis, its inputs and its outputs."""
    return sum(layer.shape[i] for i in layer.taps) + _features(layer)


def _features(layer: Layer) -> int:
    """The number of a kernel's input features and output features."""
    inputs = math.prod(layer.shape[i] for i in layer.inputs)
    return inputs + math.prod(layer.shape[i] for i in layer.outputs)


def _taps(layer: Layer) -> int:
    return math.prod(layer.shape[i] for i in layer.taps)


def _allocate(net: Network, sparsity: float, shares: Sequence[int]) -> PyTree:
    total = weights_to_keep(net, sparsity)
    single = [layer for layer in net.layers for _ in range(layer.copies)]
    sizes = [layer.size // layer.copies for layer in single]
    each = [
        share for layer, share in zip(net.layers, shares, strict=True) for _ in range(layer.copies)
    ]
    keep = iter(apportion(total, each, sizes))
    return net.tree(
        [_per_copy(layer, [next(keep) for _ in range(layer.copies)]) for layer in net.layers], int
    )


def _per_copy(layer: Layer, keep: list[int]) -> int | np.ndarray:
    if not layer.stack:
        return keep[0]
    shape = [size if i in layer.stack else 1 for i, size in enumerate(layer.shape)]
    return np.asarray(keep, np.int64).reshape(shape)


def apportion(total: int, shares: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Splits a total in proportion to shares, each part between one and its size.

    Args:
      total: what to split, from `len(sizes)` to `sum(sizes)`.
      shares: positive weights.
      sizes: the largest that each part may be.

    Returns:
      The parts, integers that sum to the total, by largest remainder.
    """
    ideal = _capped(total, shares, sizes)
    parts = [min(max(math.floor(x), 1), size) for x, size in zip(ideal, sizes, strict=True)]
    while (missing := total - sum(parts)) != 0:
        step = 1 if missing > 0 else -1
        free = [i for i, part in enumerate(parts) if (part < sizes[i] if missing > 0 else part > 1)]
        free.sort(key=lambda i: step * (parts[i] - ideal[i]))
        for i in free[: abs(missing)]:
            parts[i] += step
    return parts


def _capped(total: int, shares: Sequence[int], sizes: Sequence[int]) -> list[Fraction]:
    """The real solution: parts proportional to shares, but for those that are full."""
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in full]
        left = total - sum(sizes[i] for i in full)
        scale = Fraction(left, sum(shares[i] for i in rest)) if rest else Fraction(0)
        over = {i for i in rest if scale * shares[i] > sizes[i]}
        if not over:
            break
        full |= over
    return [Fraction(s) if i in full else scale * shares[i] for i, s in enumerate(sizes)]
