"""Exact selection of the highest scores: by counting, without a sort.

The bits of floats, those of negative ones turned over, are in the order of the floats. So the
lowest score to keep is found by counting how many scores reach each of some probes, between two of
which the search goes on: a few passes over the scores, fewer from where the threshold stood before.
Among equal scores the same search finds the index up to which they are kept. Of scores that are
sharded nothing but counts leaves a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Probes counted in one pass over the scores.
_PROBES = 7

# How far from the threshold before the first probes lie, on both sides, in units of the last place.
_FAN = (2**11, 2**14, 2**19)

# The bits of no score are above those of infinity.
_ABOVE_ALL = np.uint32(0xFF80_0001)

_EVERY = np.uint32(0xFFFF_FFFF)


def select(
    scores: Sequence[Array], keep: list[Any] | Any, near: Array | None = None
) -> tuple[list[Array], Array]:
    """The masks of the highest scores; of equal ones those of lower index come first.

    Args:
      scores: a float32 array for each layer, free of NaN.
      keep: a list of the numbers to keep in each layer, arrays of the layer's rank for as many
        layers stacked along its axes; or one number for all layers together.
      near: the thresholds of a selection among similar scores, which shorten the search.

    Returns:
      A boolean mask for each layer, and the thresholds: bits, (1, number to keep).

    Raises:
      ValueError: if one threshold is to be for 2^32 weights or more.
    """
    if not scores:
        return [], jnp.zeros(0, jnp.uint32)
    layers, numbers, sizes = _layers(scores, keep)

    def counts(cut: _Cut) -> Array:
        each = jnp.concatenate([layer.count(cut) for layer in layers], 1)
        return each if isinstance(keep, list) else jnp.sum(each, 1, each.dtype, keepdims=True)

    def narrowed(search: _Search) -> _Search:
        low, high = search.low, search.high
        span = high - low
        stride = span // _PROBES + jnp.minimum(span % _PROBES, 1)
        probes = low + jnp.minimum(_column(range(1, _PROBES + 1)) * stride, span)
        if near is not None:
            below = near - jnp.minimum(near, _column(reversed(_FAN)))
            above = near + jnp.minimum(_ABOVE_ALL - near, _column((0, *_FAN)))
            probes = jnp.where(search.begins, jnp.concatenate([below, above]), probes)
        count = counts(search.cut(probes))
        # More weights reach a lower threshold, and a later end among those that equal it.
        holds = jnp.where(search.tied, count <= numbers, count >= numbers)
        return search.narrowed(probes, holds, count == numbers)

    start = _Search(
        threshold=jnp.zeros_like(numbers),
        tied=jnp.zeros(numbers.shape, bool),
        low=jnp.zeros_like(numbers),
        high=jnp.full_like(numbers, _ABOVE_ALL),
        found=jnp.zeros(numbers.shape, bool),
        begins=jnp.ones((), bool),
    )
    end = lax.while_loop(
        lambda search: jnp.any(search.goes_on),
        lambda search: narrowed(search).turned_to_ties(sizes),
        start,
    )
    cut = end.cut(end.low)
    return [mask for layer in layers for mask in layer.hits(cut)], cut.bits


class _Cut(NamedTuple):
    """Where to cut: keeps what has more than these bits, or the same ones and a lower index."""

    bits: Array
    index: Array


class _Search(NamedTuple):
    """Searches side by side: for thresholds, and then for an end among the scores that equal them.

    Arrays (1, search); probes are (probe, search).

    Attributes:
      threshold: the threshold, once it is found and too many scores reach it.
      tied: whether that is so.
      low, high: bounds of what is searched, the threshold or the end; the lower one holds.
      found: whether the lower one keeps just as many as asked.
      begins: whether nothing was counted yet.
    """

    threshold: Array
    tied: Array
    low: Array
    high: Array
    found: Array
    begins: Array

    @property
    def goes_on(self) -> Array:
        return ~self.found & ((self.low < self.high) | ~self.tied)

    def cut(self, probes: Array) -> _Cut:
        """What probes, of the threshold or of the end, stand for."""
        bits = jnp.where(self.tied, self.threshold, probes)
        return _Cut(bits, jnp.where(self.tied, probes, _EVERY))

    def narrowed(self, probes: Array, holds: Array, ends: Array) -> _Search:
        """The search between the last probe (probe, search) that holds and the first that fails."""
        found = self.found | jnp.any(ends, 0, keepdims=True)
        answer = jnp.max(jnp.where(ends, probes, 0), 0, keepdims=True)
        answer = jnp.where(self.found, self.low, answer)
        low = jnp.max(jnp.where(holds, probes, self.low), 0, keepdims=True)
        high = jnp.min(jnp.where(holds, self.high, probes - 1), 0, keepdims=True)
        return self._replace(
            low=jnp.where(found, answer, jnp.maximum(low, self.low)),
            high=jnp.where(found, answer, jnp.minimum(high, self.high)),
            found=found,
            begins=jnp.zeros((), bool),
        )

    def turned_to_ties(self, sizes: Array) -> _Search:
        """The search for the end among equals, where the threshold is all that can be found."""
        turns = ~self.found & ~self.tied & (self.low >= self.high)
        return self._replace(
            threshold=jnp.where(turns, self.low, self.threshold),
            tied=self.tied | turns,
            low=jnp.where(turns, 0, self.low),
            high=jnp.where(turns, sizes, self.high),
        )


class _Layer(NamedTuple):
    """A layer's scores as bits, and which numbers to keep are about it.

    Attributes:
      bits: unsigned integers in the order of the scores.
      index: the place of each among the scores under one threshold; broadcastable to them.
      shape: that of its numbers, broadcastable to the scores'.
      columns: where its numbers stand among all.
    """

    bits: Array
    index: Array
    shape: tuple[int, ...]
    columns: slice

    def hits(self, cut: _Cut) -> list[Array]:
        """What cuts (cut, number) keep."""
        return [
            (self.bits > bits) | ((self.bits == bits) & (self.index < index))
            for bits, index in zip(*map(self._own, cut), strict=True)
        ]

    def count(self, cut: _Cut) -> Array:
        """How many weights cuts keep, (cut, number)."""
        hits = [hit.astype(jnp.uint32) for hit in self.hits(cut)]
        axes = [i for i, copies in enumerate(self.shape) if copies == 1]
        # One reduction of all of them reads the scores once. Along the last axis it runs through
        # memory, and what is left of the others is shared out among cores.
        sums = lax.reduce(
            hits,
            [jnp.uint32(0)] * len(hits),
            lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
            axes[-1:],
        )
        counts = jnp.sum(jnp.stack(sums), [i + 1 for i in axes[:-1]], jnp.uint32)
        return counts.reshape(len(hits), -1)

    def _own(self, numbers: Array) -> Array:
        return numbers[:, self.columns].reshape(-1, *self.shape)


def _layers(scores: Sequence[Array], keep: Any) -> tuple[list[_Layer], Array, Array]:
    """The layers, the numbers to keep, and of how many weights each of them is."""
    each = keep if isinstance(keep, list) else [1] * len(scores)
    layers, sizes, before, column = [], [], 0, 0
    for score, number in zip(scores, each, strict=True):
        shape = np.shape(number) or (1,) * score.ndim
        copies = math.prod(shape)
        sizes += [score.size // copies] * copies
        columns = slice(column, column + copies)
        inner = [1 if c > 1 else n for c, n in zip(shape, score.shape, strict=True)]
        index = jnp.arange(math.prod(inner), dtype=jnp.uint32).reshape(inner)
        layers.append(_Layer(_ordered_bits(score), index + np.uint32(before), shape, columns))
        if each is keep:
            column += copies
        else:
            before += score.size
    if each is not keep:
        sizes, each = [sum(sizes)], [keep]
    if max(sizes) >= 2**32:
        raise ValueError(f"one threshold can be for less than 2^32 weights, got {max(sizes)}")
    numbers = jnp.concatenate([as_count(number).reshape(1, -1) for number in each], 1)
    return layers, numbers, jnp.asarray(np.asarray([sizes], np.uint32))


def as_count(number: Any) -> Array:
    """Numbers of weights as an array that holds up to 2^32 of them."""
    if isinstance(number, jax.Array):
        return number.astype(jnp.uint32)
    return jnp.asarray(np.asarray(number).astype(np.uint32))


def _column(numbers: Iterable[int]) -> Array:
    return jnp.asarray(tuple(numbers), jnp.uint32)[:, None]


def _ordered_bits(score: Array) -> Array:
    """Unsigned integers in the order of the scores."""
    bits = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)  # -0. is 0.
    return jnp.where(bits >= sign, ~bits, bits | sign)
