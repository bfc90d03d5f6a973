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
_FAN = (2**9, 2**11, 2**15)

# The ranks of −∞, of zero, and of no number, which nothing reaches.
_LEAST = np.uint32(0x007F_FFFF)
_ZERO = np.uint32(0x8000_0000)
_BEYOND = np.uint32(0xFF80_0001)

_LAST = np.uint32(0xFFFF_FFFF)


class Cut(NamedTuple):
    """Which scores are kept: those above thresholds, and some of those that equal them.

    Attributes:
      thresholds: ranks, uint32 (1, number to keep).
      layers: how each layer's scores are cut.
    """

    thresholds: Array
    layers: list[_LayerCut]


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
    cut = find_cut(scores, keep, near, magnitude=magnitude)
    return kept(scores, keep, cut, magnitude=magnitude), cut.thresholds


def find_cut(
    scores: Sequence[Array],
    keep: list[Any] | Any,
    near: Array | None = None,
    *,
    magnitude: bool = False,
) -> Cut:
    """Where to cut, for the masks of `select`; small beside the scores."""
    if not scores:
        return Cut(jnp.zeros((1, 0), jnp.uint32), [])
    layers, numbers, sizes = _layers(scores, keep, magnitude)
    threshold, above, reached = _threshold(layers, numbers, sizes, near)
    cuts = lax.cond(
        jnp.any(reached > numbers),
        lambda: layers.cut(threshold, numbers - above),
        lambda: [layer.whole_cut(threshold) for layer in layers.layers],
    )
    return Cut(threshold, cuts)


def kept(
    scores: Sequence[Array], keep: list[Any] | Any, cut: Cut, *, magnitude: bool = False
) -> list[Array]:
    """The masks of scores by where they are cut, an elementwise function of them."""
    if not scores:
        return []
    pairs = zip(_layers(scores, keep, magnitude)[0].layers, cut.layers, strict=True)
    masks = [layer.kept(cut) for layer, cut in pairs]
    return [m.reshape(score.shape) for m, score in zip(masks, scores, strict=True)]


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


class _LayerCut(NamedTuple):
    """How a layer's scores are cut, as arrays of uint32 that broadcast to them.

    Attributes:
      rows: the lowest rank to keep in each row along the last axis: the threshold, or the next
        rank where what equals the threshold is not kept.
      part: one in the row in which the threshold itself is kept up to some column.
      columns: one from this column on.
    """

    rows: Array
    part: Array
    columns: Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's scores, and which numbers to keep are about it.

    Attributes:
      scores: float32.
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

    @property
    def ranks(self) -> Array:
        """The ranks of its scores, or of their magnitudes."""
        return _rank(self.scores, self.magnitude)

    def kept(self, cut: _LayerCut) -> Array:
        """What is above the threshold, and of what equals it some."""
        return self.ranks >= cut.rows + (cut.part & cut.columns)

    def count(self, probes: Array) -> Array:
        """How many scores reach probes (probe, number)."""
        flags = [self.ranks >= probe for probe in self.own(probes)]
        partial = _sums(flags, self.axes[-1:])
        return jnp.stack([count.ravel() for count in _sums(partial, self.axes[:-1])])

    def ties(self, ranks: Array) -> _Rows:
        """Where scores equal the threshold, row by row along the last axis."""
        column = self.axes[-1]
        tie = self.ranks == self.own(ranks)[0]
        index = _index(self.scores.shape, column)
        found = lax.reduce(
            [tie.astype(jnp.uint32), jnp.where(tie, index, _LAST), jnp.where(tie, index, 0)],
            [jnp.uint32(0), _LAST, jnp.uint32(0)],
            lambda x, y: [x[0] + y[0], jnp.minimum(x[1], y[1]), jnp.maximum(x[2], y[2])],
            (column,),
        )
        return _Rows(*(jnp.expand_dims(x, column) for x in found))

    def cut(self, ranks: Array, rows: _Rows, taken: Array) -> _LayerCut:
        """The cut that keeps so many ties of each copy."""
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
            tie = part & (self.ranks == self.own(ranks)[0])
            (flags,) = _sums([tie], others)
            return _sum_before(flags, [column]) >= left

        crowded = jnp.any((left > 1) & (left + 1 < ties))
        columns = lax.cond(crowded, by_count, lambda: index >= end)
        lowest = self.own(ranks)[0] + (~whole & ~part).astype(jnp.uint32)
        return _LayerCut(lowest, part.astype(jnp.uint32), columns.astype(jnp.uint32))

    def whole_cut(self, ranks: Array) -> _LayerCut:
        """The cut that keeps all ties."""
        column = self.axes[-1]
        rows, columns = list(self.scores.shape), list(self.shape)
        rows[column], columns[column] = 1, rows[column]
        lowest = jnp.broadcast_to(self.own(ranks)[0], rows)
        return _LayerCut(lowest, jnp.zeros(rows, jnp.uint32), jnp.zeros(columns, jnp.uint32))


@dataclasses.dataclass(frozen=True, eq=False)
class _Layers:
    """All layers, each with thresholds of its own, or under one that they share."""

    layers: list[_Layer]
    shared: bool
    magnitude: bool

    def count(self, probes: Array, wanted: Array) -> Array:
        """How many scores reach probes (probe, number); anything high for numbers not wanted."""
        # Within a branch, for a loop would write out all ranks before it starts.
        each = [
            lax.cond(
                jnp.any(wanted[:, layer.columns]),
                functools.partial(layer.count, probes),
                functools.partial(jnp.full_like, probes[:, layer.columns], _LAST),
            )
            for layer in self.layers
        ]
        return functools.reduce(jnp.add, each) if self.shared else jnp.concatenate(each, 1)

    def cut(self, threshold: Array, missing: Array) -> list[_LayerCut]:
        """The cuts that keep, of the scores that equal the thresholds, so many by lowest index."""
        chosen = []
        for layer in self.layers:
            rows = layer.ties(threshold)
            taken = missing[:, layer.columns]
            if self.shared:
                taken = jnp.minimum(taken, jnp.sum(rows.ties, dtype=jnp.uint32))
                missing = missing - taken
            chosen.append(layer.cut(threshold, rows, taken))
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
        layers.append(_Layer(score.astype(jnp.float32), shape, columns, magnitude))
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


def _rank(score: Array, magnitude: bool) -> Array:
    """The rank of a float, or of its magnitude; that of −0. is that of 0."""
    bits = lax.bitcast_convert_type(score, jnp.uint32)
    if magnitude:
        return bits | _ZERO
    bits = jnp.where(bits == _ZERO, jnp.uint32(0), bits)
    return jnp.where(bits >= _ZERO, ~bits, bits | _ZERO)
