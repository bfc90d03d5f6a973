"""Exact selection of the highest scores: by counting, without a sort.

The bits of floats, those of negative ones turned over, are in the order of the floats. So the
lowest score to keep is found by counting how many scores reach each of some probes, between two of
which the search goes on: a few passes over the scores, fewer from where the threshold stood before.
Among equal scores the same search finds the index up to which they are kept. Of scores that are
sharded nothing but counts leaves a device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Combine = Callable[[Array, Array], Array]

# Probes counted in one pass over the scores.
_PROBES = 7

# How far from the threshold before the first probes lie, on both sides, in units of the last place.
_FAN = (2**11, 2**14, 2**19)

# The bits of no score are above those of infinity.
_ABOVE_ALL = np.uint32(0xFF80_0001)

_LAST = np.uint32(0xFFFF_FFFF)


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
        return [], jnp.zeros((1, 0), jnp.uint32)
    layers, numbers, sizes = _layers(scores, keep)
    search = _Layers(layers, shared=not isinstance(keep, list))
    threshold, above, reached = _threshold(search, numbers, sizes, near)
    surplus = reached > numbers
    end = lax.cond(
        jnp.any(surplus),
        lambda: _end_of_ties(search, threshold, sizes, numbers - above, reached - above),
        lambda: jnp.full_like(sizes, _LAST),
    )
    end = jnp.where(surplus, end, _LAST)
    return [layer.kept(threshold, end) for layer in layers], threshold


def _threshold(
    layers: _Layers, numbers: Array, sizes: Array, near: Array | None
) -> tuple[Array, Array, Array]:
    """The highest bits that enough scores reach, how many are above them, and how many reach them.

    A search ends before with lower bits, where just as many scores as asked reach those.
    """
    State = tuple[Array, Array, Array, Array, Array]

    def narrow(state: State) -> State:
        low, high, above, reached, begins = state
        span = high - low
        stride = span // (_PROBES + 1) + jnp.minimum(span % (_PROBES + 1), 1)
        probes = low + jnp.minimum(_column(range(1, _PROBES + 1)) * stride, span)
        if near is not None:
            below = near - jnp.minimum(near, _column(reversed(_FAN)))
            after = near + jnp.minimum(_ABOVE_ALL - near, _column((0, *_FAN)))
            probes = jnp.where(begins, jnp.concatenate([below, after]), probes)
        # Both ends stay within what was known before; a search that is over has no room.
        probes = jnp.clip(probes, low, high)
        counts = layers.count(probes)
        holds = counts >= numbers
        low = jnp.max(jnp.where(holds, probes, low), 0, keepdims=True)
        reached = jnp.min(jnp.where(holds, counts, reached), 0, keepdims=True)
        high = jnp.min(jnp.where(holds, high, probes - 1), 0, keepdims=True)
        above = jnp.max(jnp.where(holds, above, counts), 0, keepdims=True)
        return low, jnp.where(reached == numbers, low, high), above, reached, jnp.zeros((), bool)

    none = jnp.zeros_like(sizes)
    top = jnp.where(sizes == numbers, 0, jnp.full_like(sizes, _ABOVE_ALL))
    start = (none, top, none, sizes, jnp.ones((), bool))
    low, _, above, reached, _ = lax.while_loop(lambda s: jnp.any(s[0] < s[1]), narrow, start)
    return low, above, reached


def _end_of_ties(
    layers: _Layers, threshold: Array, sizes: Array, missing: Array, ties: Array
) -> Array:
    """The index before which just as many scores equal the threshold as are missing."""
    State = tuple[Array, Array, Array, Array]

    def narrow(state: State) -> State:
        low, high, missing, ties = state
        middle = low + (high - low) // 2
        before, first, last = layers.ties(threshold, low, middle, high)
        holds = before <= missing
        halved = (
            jnp.where(holds, middle, low),
            jnp.where(holds, high, middle),
            jnp.where(holds, missing - before, missing),
            jnp.where(holds, ties - before, before),
        )
        # Where one tie is to be taken, or one to be left, the search is over.
        end = jnp.where(missing == 1, first + 1, last)
        over = (missing == 1) | (missing + 1 == ties)
        return tuple(  # type: ignore[return-value]
            jnp.where(over, x, y) for x, y in zip((end, end, none, none), halved, strict=True)
        )

    none = jnp.zeros_like(sizes)
    start = (none, sizes, missing, ties)
    return lax.while_loop(lambda s: jnp.any((s[2] > 0) & (s[2] < s[3])), narrow, start)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
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

    def kept(self, threshold: Array, end: Array) -> Array:
        """What is above the threshold, or equals it before the end."""
        bits, end = self.own(threshold), self.own(end)
        return (self.bits > bits[0]) | ((self.bits == bits[0]) & (self.index < end[0]))

    def own(self, numbers: Array) -> Array:
        """Its own of numbers (row, number), to broadcast to its scores row by row."""
        return numbers[:, self.columns].reshape(-1, *self.shape)

    def reduced(self, arrays: Sequence[Array], combine: Sequence[Combine]) -> Array:
        """Arrays like the scores combined over each copy of the layer: (array, number)."""
        axes = [i for i, copies in enumerate(self.shape) if copies == 1]
        start = [jnp.uint32(_LAST if c is jnp.minimum else 0) for c in combine]
        # One reduction of all arrays reads the scores once. Along the last axis it runs through
        # memory, and what is left of the others is shared out among cores.
        for some in (axes[-1:], axes[:-1]):
            arrays = lax.reduce(
                list(arrays),
                start,
                lambda xs, ys: [c(x, y) for c, x, y in zip(combine, xs, ys, strict=True)],
                some,
            )
        return jnp.stack([array.ravel() for array in arrays])


@dataclasses.dataclass(frozen=True, eq=False)
class _Layers:
    """All layers, each with thresholds of its own, or under one that they share."""

    layers: list[_Layer]
    shared: bool

    def count(self, probes: Array) -> Array:
        """How many scores reach probes (probe, number)."""
        add = [jnp.add] * len(probes)
        each = [
            layer.reduced(
                [(layer.bits >= probe).astype(jnp.uint32) for probe in layer.own(probes)], add
            )
            for layer in self.layers
        ]
        return self._joined(each, add)

    def ties(self, threshold: Array, low: Array, middle: Array, high: Array) -> Array:
        """Of what equals the threshold between two indices, (3, 1, number).

        How much stands before a third, the first index, and the last.
        """
        combine = [jnp.add, jnp.minimum, jnp.maximum]
        each = []
        for layer in self.layers:
            bits, low_, middle_, high_ = (layer.own(x)[0] for x in (threshold, low, middle, high))
            index = jnp.broadcast_to(layer.index, layer.bits.shape)
            tie = (layer.bits == bits) & (index >= low_) & (index < high_)
            arrays = [
                (tie & (index < middle_)).astype(jnp.uint32),
                jnp.where(tie, index, _LAST),
                jnp.where(tie, index, 0),
            ]
            each.append(layer.reduced(arrays, combine))
        return self._joined(each, combine)[:, None]

    def _joined(self, each: list[Array], combine: Sequence[Combine]) -> Array:
        if not self.shared:
            return jnp.concatenate(each, 1)
        rows = zip(combine, *each, strict=True)
        return jnp.stack([functools.reduce(c, row) for c, *row in rows])


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
