"""Ways of counting paths: exactly, in the mean field, or only whether a path exists.

A counting defines the arithmetic of counts: how they are kept in range, added up and contracted,
and what happens where an axis of equal counts meets padding. All rules leave this to the counting.
A new way of counting is a subclass of `Counting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.paths import values as v
from dpai_jax.paths.values import Flow, Shape, Spread
from dpai_jax.tools.sums import (
    finite_backward,
    product_sum,
    scaled,
    sum_over,
    written_out_backward,
)

# Axes of the two sides of a contraction, as in the dimension numbers of `lax.dot_general`.
Pair = tuple[Sequence[int], Sequence[int]]
# A mantissa, its exponent, and whether any entry is above zero.
Normal = tuple[Spread, Array, Array | np.bool]

# Mantissas below this are close enough to normal form.
_NEAR = 2.0**8


class Counting:
    """Exact counting: every position of every feature map, zero padding and all.

    Attributes:
      averages: whether counts that padding makes uneven along an axis are replaced by their mean.
      gated: whether a network's `gates` apply to products.
      tracks_constants: whether units that only constants reach count as alive.
    """

    averages = False
    gated = True
    tracks_constants = True

    def normalize(self, counts: Spread, exponent: Array, filled: Any = None) -> Normal:
        """Counts in normal form: mantissa, exponent, and whether any count is not zero.

        If the last is given, counts with a small known bound are returned unchanged.
        """
        if filled is not None and counts.below is not None and counts.below <= _NEAR:
            return counts, exponent, filled
        array, exponent, filled = v.normalise(counts.array, exponent)
        return Spread(array, counts.shape, below=1.0), exponent, filled

    def alive(self, flow: Flow) -> Array:
        """One where a unit is alive, zero where it is dead; a constant for gradients."""
        return flow.alive()

    def joined(self, array: Array) -> Array:
        """Called on the sum of two flows, after which paths may part again."""
        return array

    def sum(self, spread: Spread, axes: Sequence[int], by: Spread | None = None) -> Spread:
        """The sums, of products by another array if given, over some axes, then uniform."""
        array = self._sum(spread, by, tuple(axes))
        uniform = (i for i in axes if spread.uniform(i) and (by is None or by.uniform(i)))
        copies = math.prod(spread.shape[i] for i in uniform)
        return Spread(self.scaled(array, float(copies)), spread.shape)

    def scaled(self, array: Array, factor: Array | float) -> Array:
        """An array times a constant."""
        return array * factor

    def product(self, a: Array, b: Array) -> Array:
        """The product of two arrays of one rank, which broadcast."""
        return a * b

    def _sum(self, spread: Spread, by: Spread | None, axes: tuple[int, ...]) -> Array:
        array = spread.array if by is None else spread.array * by.array
        return jnp.sum(array, axes, keepdims=True)

    def dot(self, a: Spread, b: Spread, dims: tuple[Pair, Pair], shape: Shape) -> Spread:
        """`lax.dot_general` that expands uniform axes only where it must."""
        (contract_a, contract_b), (batch_a, batch_b) = dims
        scale = 1.0
        for i, j in zip(contract_a, contract_b, strict=True):
            if a.uniform(i) and b.uniform(j):
                scale *= a.shape[i]
            elif a.uniform(i):
                b = Spread(jnp.sum(b.array, j, keepdims=True), b.shape)
            elif b.uniform(j):
                a = Spread(jnp.sum(a.array, i, keepdims=True), a.shape)
        for i, j in zip(batch_a, batch_b, strict=True):
            if a.uniform(i) != b.uniform(j):
                a, b = a.full(i), b.full(j)
        array = lax.dot_general(
            a.array, b.array, dims, lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        return Spread(self.scaled(array, scale), shape)

    def stays_uniform(self, coverage: np.ndarray) -> bool:
        """Whether a uniform axis stays uniform under windows whose taps have this coverage."""
        return self.averages or bool(np.all(coverage == 1))


class MeanField(Counting):
    """Counting that keeps uniform axes uniform: counts that padding makes uneven are averaged.

    Sums do not depend on the order of their terms.
    """

    averages = True
    tracks_constants = False

    def normalize(self, counts: Spread, exponent: Array, filled: Any = None) -> Normal:
        """See `Counting.normalize`."""
        counts = counts._replace(array=finite_backward(counts.array))
        return super().normalize(counts, exponent, filled)

    def joined(self, array: Array) -> Array:
        """See `Counting.joined`."""
        # Otherwise XLA makes a deep network's gradient one long sum, computed for every weight.
        return written_out_backward(array)

    def scaled(self, array: Array, factor: Array | float) -> Array:
        """See `Counting.scaled`."""
        return scaled(array, factor)

    def product(self, a: Array, b: Array) -> Array:
        """See `Counting.product`."""
        return product_sum(a, b, ())

    def _sum(self, spread: Spread, by: Spread | None, axes: tuple[int, ...]) -> Array:
        if by is None:
            return sum_over(spread.array, axes)
        return product_sum(spread.array, by.array, axes, (spread.below, by.below))

    def dot(self, a: Spread, b: Spread, dims: tuple[Pair, Pair], shape: Shape) -> Spread:
        """As `Counting.dot`; products of an array and a vector are order-independent sums."""
        (contract_a, contract_b), (batch_a, batch_b) = dims
        if _is_vector(b, {*contract_b, *batch_b}):
            sums, ones_first = _dot_vector(a, b, dims), 0
        elif _is_vector(a, {*contract_a, *batch_a}):
            sums = _dot_vector(b, a, ((contract_b, contract_a), (batch_b, batch_a)))
            ones_first = len(a.shape) - len(contract_a) - len(batch_a)
        else:
            return super().dot(a, b, dims, shape)
        batch, others = sums.shape[: len(batch_a)], sums.shape[len(batch_a) :]
        ones_last = len(shape) - len(sums.shape) - ones_first
        sizes = (*batch, *(1,) * ones_first, *others, *(1,) * ones_last)
        return Spread(sums.reshape(sizes), shape)


class Reach(Counting):
    """Whether a path reaches a unit: counts are clipped to {0, 1}, forward and backward."""

    gated = False

    def normalize(self, counts: Spread, exponent: Array, _filled: Any = None) -> Normal:
        """Zeros and ones; see `Counting.normalize`."""
        return Spread(v.saturate(counts.array), counts.shape, below=1.0), exponent, np.True_


EXACT, MEAN_FIELD, REACH = Counting(), MeanField(), Reach()

COUNTINGS = {"exact": EXACT, "mean_field": MEAN_FIELD}


def _is_vector(x: Spread, axes: set[int]) -> bool:
    """Whether an array is uniform along all axes except these."""
    return all(i in axes or x.uniform(i) for i in range(len(x.shape)))


def _dot_vector(x: Spread, vector: Spread, dims: tuple[Pair, Pair]) -> Array:
    """The contraction of `x` with a vector; its axes are the batch axes, then the others of `x`."""
    (contract, contract_vector), (batch, batch_vector) = dims
    pairs = sorted(zip([*batch, *contract], [*batch_vector, *contract_vector], strict=True))
    others = tuple(i for i in range(len(x.shape)) if i not in (*batch, *contract))
    axes = [j for _, j in pairs]
    rest = [j for j in range(len(vector.shape)) if j not in axes]
    aligned = vector.array.transpose(*axes, *rest).reshape([vector.array.shape[j] for j in axes])
    # As the axes lie in memory, which a sum of products would otherwise write out anew.
    order = x.order or tuple(range(len(x.shape)))
    sums = product_sum(
        x.array.transpose(order),
        jnp.expand_dims(aligned, others).transpose(order),
        tuple(order.index(i) for i in contract),
        (x.below, vector.below),
        (False, True),
    )
    uniform = [
        x.shape[i]
        for i, j in zip(contract, contract_vector, strict=True)
        if x.uniform(i) and vector.uniform(j)
    ]
    sums = sums.transpose([order.index(i) for i in (*batch, *others, *contract)])
    sums = jnp.squeeze(sums, tuple(range(sums.ndim - len(contract), sums.ndim)))
    return scaled(sums, float(math.prod(uniform)))
