"""Exact selection of the highest scores: by counting, without a sort.

The lowest score to keep is found by counting how many scores reach each of some probes, between
two of which the search goes on: a few passes over the scores, fewer from where the threshold stood
before. The search runs over the floats by their *rank*, an integer: their bits, those of negative
ones turned over, are in the order of the floats. Of scores that are sharded nothing but counts
leaves a device.
"""

from __future__ import annotations

import dataclasses
import functools
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
_FAN = (2**9, 2**13, 2**18)

# The ranks of −∞, of zero, and of no number, which nothing reaches.
_LEAST = np.uint32(0x007F_FFFF)
_ZERO = np.uint32(0x8000_0000)
_BEYOND = np.uint32(0xFF80_0001)

_LAST = np.uint32(0xFFFF_FFFF)


def select(
    scores: Sequence[Array],
    keep: list[Any] | Any,
    near: Array | None = None,
    *,
    magnitude: bool = False,
) -> tuple[list[Array], Array]:
    """The masks of the highest scores; of equal ones those of lower index come first.

    Args:
      scores: a float32 array for each layer, free of NaN.
      keep: a list of the numbers to keep in each layer, arrays of the layer's rank for as many
        layers stacked along its axes; or one number for all layers together.
      near: the thresholds of a selection among similar scores, which shorten the search.
      magnitude: whether to go by the scores' magnitude.

    Returns:
      A boolean mask for each layer, and the thresholds: ranks, uint32 (1, number to keep).

    Raises:
      ValueError: if one threshold is to be for 2^32 weights or more.
    """
    if not scores:
        return [], jnp.zeros((1, 0), jnp.uint32)
    layers, numbers, sizes = _layers(scores, keep, magnitude)
    threshold, above, reached = _threshold(layers, numbers, sizes, near)
    ties = lax.cond(
        jnp.any(reached > numbers),
        lambda: layers.first_ties(threshold, numbers - above),
        lambda: [layer.all_ties() for layer in layers.layers],
    )
    pairs = zip(layers.layers, ties, strict=True)
    masks = [layer.kept(threshold, some) for layer, some in pairs]
    return [m.reshape(score.shape) for m, score in zip(masks, scores, strict=True)], threshold


def _threshold(
    layers: _Layers, numbers: Array, sizes: Array, near: Array | None
) -> tuple[Array, Array, Array]:
    """The highest ranks that enough scores reach, how many are above, and how many reach them.

    A search ends before at a lower rank, where just as many scores as asked reach that.
    """
    State = tuple[Array, Array, Array, Array, Array]

    def narrow(state: State) -> State:
        low, high, above, reached, begins = state
        span = high - low
        stride = span // (_PROBES + 1) + jnp.minimum(span % (_PROBES + 1), 1)
        probes = low + jnp.minimum(_column(range(1, _PROBES + 1)) * stride, span)
        if near is not None:
            below = near - jnp.minimum(near, _column(reversed(_FAN)))
            after = near + jnp.minimum(_BEYOND - near, _column((0, *_FAN)))
            probes = jnp.where(begins, jnp.concatenate([below, after]), probes)
        # Both ends stay within what was known before; a search that is over has no room.
        probes = jnp.clip(probes, low, high)
        counts = layers.count(probes, low < high)
        holds = counts >= numbers
        low = jnp.max(jnp.where(holds, probes, low), 0, keepdims=True)
        least = jnp.min(jnp.where(holds, counts, reached), 0, keepdims=True)
        reached = jnp.minimum(reached, least)
        high = jnp.min(jnp.where(holds, high, probes - 1), 0, keepdims=True)
        above = jnp.max(jnp.where(holds, above, counts), 0, keepdims=True)
        return low, jnp.where(reached == numbers, low, high), above, reached, jnp.zeros((), bool)

    none = jnp.zeros_like(sizes)
    bottom = jnp.full_like(sizes, _ZERO if layers.magnitude else _LEAST)
    top = jnp.where(sizes == numbers, bottom, jnp.full_like(sizes, _BEYOND))
    start = (bottom, top, none, sizes, jnp.ones((), bool))
    low, _, above, reached, _ = lax.while_loop(lambda s: jnp.any(s[0] < s[1]), narrow, start)
    return low, above, reached


class _Rows(NamedTuple):
    """Where scores equal a threshold: how many in each row along the last axis, first, and last."""

    ties: Array
    first: Array
    last: Array


class _Ties(NamedTuple):
    """Which of the scores that equal a threshold are kept, as arrays that broadcast to a layer.

    Attributes:
      rows: the rows, along the last axis, of which all are kept.
      part: the row of which those in some columns are.
      columns: these columns.
    """

    rows: Array
    part: Array
    columns: Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's scores, and which numbers to keep are about it.

    Attributes:
      scores: their ranks; or float32, if they go by their magnitude.
      shape: that of its numbers, broadcastable to the scores'.
      columns: where its numbers stand among all.
      magnitude: whether the scores go by their magnitude.
    """

    scores: Array
    shape: tuple[int, ...]
    columns: slice
    magnitude: bool

    @property
    def axes(self) -> list[int]:
        """The axes of a single copy."""
        return [i for i, copies in enumerate(self.shape) if copies == 1]

    def own(self, numbers: Array) -> Array:
        """Its own of numbers (row, number), to broadcast to its scores row by row."""
        return numbers[:, self.columns].reshape(-1, *self.shape)

    # Ranks of magnitudes would be written out for the whole search. So floats are compared as they
    # are, though subnormal ones count as zero then.
    def reach(self, rank: Array) -> Array:
        """Which scores have a rank or a higher one."""
        if not self.magnitude:
            return self.scores >= rank
        return (self.scores >= _float(rank)) | (self.scores <= -_float(rank))

    def equal(self, rank: Array) -> Array:
        """Which scores have a rank."""
        if not self.magnitude:
            return self.scores == rank
        return (self.scores == _float(rank)) | (self.scores == -_float(rank))

    def kept(self, ranks: Array, ties: _Ties) -> Array:
        """What is above the threshold, and of what equals it some."""
        threshold = self.own(ranks)[0]
        tie = self.equal(threshold)
        some = jnp.where(ties.part, ties.columns, ties.rows)
        return (self.reach(threshold) & ~tie) | (tie & some)

    def count(self, probes: Array) -> Array:
        """How many scores reach probes (probe, number)."""
        flags = [self.reach(probe) for probe in self.own(probes)]
        partial = _sums(flags, self.axes[-1:])
        return jnp.stack([count.ravel() for count in _sums(partial, self.axes[:-1])])

    def ties(self, ranks: Array) -> _Rows:
        """Where scores equal the threshold, row by row along the last axis."""
        column = self.axes[-1]
        tie = self.equal(self.own(ranks)[0])
        index = _index(self.scores.shape, column)
        found = lax.reduce(
            [tie.astype(jnp.uint32), jnp.where(tie, index, _LAST), jnp.where(tie, index, 0)],
            [jnp.uint32(0), _LAST, jnp.uint32(0)],
            lambda x, y: [x[0] + y[0], jnp.minimum(x[1], y[1]), jnp.maximum(x[2], y[2])],
            (column,),
        )
        return _Rows(*(jnp.expand_dims(x, column) for x in found))

    def first_ties(self, ranks: Array, rows: _Rows, taken: Array) -> _Ties:
        """Which ties to keep, so many of each copy."""
        *others, column = self.axes
        before = _sum_before(rows.ties, others)
        taken = taken.reshape(self.shape)
        whole = before + rows.ties <= taken
        part = ~whole & (before < taken)

        def of_part(x: Array) -> Array:
            return _sums([jnp.where(part, x, 0)], others)[0]

        left, ties, first, last = map(of_part, (taken - before, *rows))
        # Where one tie is to be taken, or one to be left, its place is known.
        end = jnp.where(left == 1, first + 1, last)
        index = _index(self.scores.shape, column)

        def by_count() -> Array:
            tie = part & self.equal(self.own(ranks)[0])
            (flags,) = _sums([tie], others)
            return _sum_before(flags, [column]) < left

        crowded = jnp.any((left > 1) & (left + 1 < ties))
        columns = lax.cond(crowded, by_count, lambda: index < end)
        return _Ties(whole, part, columns)

    def all_ties(self) -> _Ties:
        """That all ties are kept."""
        column = self.axes[-1]
        rows, columns = list(self.scores.shape), list(self.shape)
        rows[column], columns[column] = 1, rows[column]
        return _Ties(jnp.ones(rows, bool), jnp.zeros(rows, bool), jnp.zeros(columns, bool))


@dataclasses.dataclass(frozen=True, eq=False)
class _Layers:
    """All layers, each with thresholds of its own, or under one that they share."""

    layers: list[_Layer]
    shared: bool
    magnitude: bool

    def count(self, probes: Array, wanted: Array) -> Array:
        """How many scores reach probes (probe, number); anything high for numbers not wanted."""
        if self.shared:
            counts = [layer.count(probes) for layer in self.layers]
            return functools.reduce(jnp.add, counts)
        each = [
            lax.cond(
                jnp.any(wanted[:, layer.columns]),
                functools.partial(layer.count, probes),
                functools.partial(jnp.full_like, probes[:, layer.columns], _LAST),
            )
            for layer in self.layers
        ]
        return jnp.concatenate(each, 1)

    def first_ties(self, threshold: Array, missing: Array) -> list[_Ties]:
        """Which of the scores that equal the thresholds are kept, so many by lowest index."""
        chosen = []
        for layer in self.layers:
            rows = layer.ties(threshold)
            taken = missing[:, layer.columns]
            if self.shared:
                taken = jnp.minimum(taken, jnp.sum(rows.ties, dtype=jnp.uint32))
                missing = missing - taken
            chosen.append(layer.first_ties(threshold, rows, taken))
        return chosen


def _layers(scores: Sequence[Array], keep: Any, magnitude: bool) -> tuple[_Layers, Array, Array]:
    """The layers, the numbers to keep, and of how many weights each of them is."""
    shared = not isinstance(keep, list)
    layers, sizes, column = [], [], 0
    for score, number in zip(scores, [1] * len(scores) if shared else keep, strict=True):
        shape = np.shape(number) or (1,) * score.ndim
        copies = math.prod(shape)
        sizes += [score.size // copies] * copies
        # Each copy has an axis, if only one of size one.
        score, shape = (score, shape) if 1 in shape else (score[..., None], (*shape, 1))
        columns = slice(column, column + copies)
        score = score.astype(jnp.float32)
        layers.append(_Layer(score if magnitude else _rank(score), shape, columns, magnitude))
        column += 0 if shared else copies
    sizes = [sum(sizes)] if shared else sizes
    if max(sizes) >= 2**32:
        raise ValueError(f"one threshold can be for less than 2^32 weights, got {max(sizes)}")
    each = [as_count(number).reshape(1, -1) for number in ([keep] if shared else keep)]
    numbers = jnp.concatenate(each, 1)
    return _Layers(layers, shared, magnitude), numbers, jnp.asarray(np.asarray([sizes], np.uint32))


def as_count(number: Any) -> Array:
    """Numbers of weights as an array that holds up to 2^32 of them."""
    if isinstance(number, jax.Array):
        return number.astype(jnp.uint32)
    return jnp.asarray(np.asarray(number).astype(np.uint32))


def _sums(arrays: Sequence[Array], axes: Sequence[int]) -> list[Array]:
    """The sums of several arrays over some axes, which are left with size one.

    One reduction of all of them reads what they are made of once. Along the last axis it runs
    through memory, and what is left of the others is shared out among cores.
    """
    sums = lax.reduce(
        [array.astype(jnp.uint32) for array in arrays],
        [jnp.uint32(0)] * len(arrays),
        lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
        tuple(axes),
    )
    return [jnp.expand_dims(x, tuple(axes)) for x in sums]


def _sum_before(array: Array, axes: Sequence[int]) -> Array:
    """For each entry the sum of those before it, in C order along some axes."""
    order = [*(i for i in range(array.ndim) if i not in axes), *axes]
    moved = array.transpose(order)
    flat = moved.reshape(*moved.shape[: array.ndim - len(axes)], -1)
    before = jnp.cumsum(flat, -1, jnp.uint32) - flat
    return before.reshape(moved.shape).transpose(np.argsort(order))


def _column(numbers: Iterable[int]) -> Array:
    return jnp.asarray(tuple(numbers), jnp.uint32)[:, None]


def _index(shape: tuple[int, ...], axis: int) -> Array:
    """The places along an axis, which is the only one not of size one."""
    sizes = [size if i == axis else 1 for i, size in enumerate(shape)]
    return jnp.arange(shape[axis], dtype=jnp.uint32).reshape(sizes)


def _rank(score: Array) -> Array:
    """The rank of a float; that of −0. is that of 0."""
    bits = lax.bitcast_convert_type(score, jnp.uint32)
    bits = jnp.where(bits == _ZERO, jnp.uint32(0), bits)
    return jnp.where(bits >= _ZERO, ~bits, bits | _ZERO)


def _float(rank: Array) -> Array:
    """The number of a rank; no number below that of −∞ and above that of ∞."""
    bits = jnp.where(rank >= _ZERO, rank - _ZERO, ~rank)
    return lax.bitcast_convert_type(bits, jnp.float32)
