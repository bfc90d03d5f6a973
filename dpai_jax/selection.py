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
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Probes counted in one pass over the scores: those that part the room evenly, and those around the
# rank to expect, in standard deviations of it.
_PARTS = 4
_DEVIATIONS = (-1.5, -0.4, 0.4, 1.5)

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
    groups = _groups(scores, keep, magnitude)
    ends = list(itertools.accumulate((group.numbers.size for group in groups), initial=0))
    cuts = [
        _cut(group, None if near is None else near[:, start:end])
        for group, (start, end) in zip(groups, itertools.pairwise(ends), strict=True)
    ]
    thresholds = jnp.concatenate([threshold for threshold, _ in cuts], 1)
    return Cut(thresholds, [layer for _, layers in cuts for layer in layers])


def kept(
    scores: Sequence[Array], keep: list[Any] | Any, cut: Cut, *, magnitude: bool = False
) -> list[Array]:
    """The masks of scores by where they are cut, an elementwise function of them."""
    if not scores:
        return []
    layers = [layer for group in _groups(scores, keep, magnitude) for layer in group.layers]
    masks = [layer.kept(cut) for layer, cut in zip(layers, cut.layers, strict=True)]
    return [m.reshape(score.shape) for m, score in zip(masks, scores, strict=True)]


def _cut(group: _Group, near: Array | None) -> tuple[Array, list[_LayerCut]]:
    """The thresholds of a group, and how its layers are cut."""
    threshold, above, reached = _threshold(group, near)
    layers = lax.cond(
        jnp.any(reached > group.numbers),
        lambda: group.cut(threshold, group.numbers - above),
        lambda: [layer.whole_cut(threshold) for layer in group.layers],
    )
    return threshold, layers


def _threshold(group: _Group, near: Array | None) -> tuple[Array, Array, Array]:
    """The highest ranks that enough scores reach, how many are above, and how many reach them.

    A search ends before at a lower rank, where just as many scores as asked reach that.
    """
    State = tuple[Array, Array, Array, Array, Array]
    numbers = group.numbers

    def probes(low: Array, high: Array, above: Array, reached: Array) -> Array:
        """Ranks above the low one, up to the high one."""
        span = high - low
        stride = span // _PARTS + jnp.minimum(span % _PARTS, 1)
        even = jnp.minimum(_column(range(1, _PARTS)) * stride, span)
        # Where the threshold would be if the scores in between lay evenly, and how far from there
        # chance would have it.
        width = span.astype(jnp.float32)
        between = jnp.maximum(reached - above, 1).astype(jnp.float32)
        place = width * ((reached - numbers).astype(jnp.float32) + 0.5) / between
        deviation = width / (2 * jnp.sqrt(between))
        expected = place + jnp.asarray(_DEVIATIONS, jnp.float32)[:, None] * deviation
        expected = jnp.clip(expected, 1.0, jnp.maximum(width, 1.0)).astype(jnp.uint32)
        return low + jnp.concatenate([even, jnp.minimum(expected, span)])

    def narrow(state: State) -> State:
        low, high, above, reached, begins = state
        tried = probes(low, high, above, reached)
        if near is not None:
            below = near - jnp.minimum(near, _column(reversed(_FAN)))
            after = near + jnp.minimum(_BEYOND - near, _column((0, *_FAN)))
            tried = jnp.where(begins, jnp.concatenate([below, after]), tried)
        # Both ends stay within what was known before; a search that is over has no room.
        tried = jnp.clip(tried, low, high)
        counts = group.count(tried, low < high)
        holds = counts >= numbers
        low = jnp.max(jnp.where(holds, tried, low), 0, keepdims=True)
        least = jnp.min(jnp.where(holds, counts, reached), 0, keepdims=True)
        reached = jnp.minimum(reached, least)
        high = jnp.min(jnp.where(holds, high, tried - 1), 0, keepdims=True)
        above = jnp.max(jnp.where(holds, above, counts), 0, keepdims=True)
        return low, jnp.where(reached == numbers, low, high), above, reached, jnp.zeros((), bool)

    sizes = jnp.full_like(numbers, np.uint32(group.size))
    bottom = jnp.full_like(sizes, _ZERO if group.layers[0].magnitude else _LEAST)
    top = jnp.where(sizes == numbers, bottom, jnp.full_like(sizes, _BEYOND))
    start = (bottom, top, jnp.zeros_like(sizes), sizes, jnp.ones((), bool))
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
      magnitude: whether the scores go by their magnitude.
    """

    scores: Array
    shape: tuple[int, ...]
    magnitude: bool

    @property
    def size(self) -> int:
        """The number of scores of a single copy."""
        return self.scores.size // math.prod(self.shape)

    @property
    def axes(self) -> list[int]:
        """The axes of a single copy."""
        return [i for i, copies in enumerate(self.shape) if copies == 1]

    def own(self, numbers: Array) -> Array:
        """Numbers (row, number), to broadcast to its scores row by row."""
        return numbers.reshape(-1, *self.shape)

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
class _Group:
    """Layers whose thresholds are searched for together: one layer, or all under one threshold.

    Attributes:
      layers: the layers.
      numbers: how many scores to keep, uint32 (1, number).
    """

    layers: list[_Layer]
    numbers: Array

    @property
    def size(self) -> int:
        """Of how many scores a number is to be kept."""
        return sum(layer.size for layer in self.layers)

    def count(self, probes: Array, wanted: Array) -> Array:
        """How many scores reach probes (probe, number); anything high where no number is wanted."""
        # Within a branch, for a loop would write out all ranks before it starts.
        counts = [
            lax.cond(
                jnp.any(wanted),
                functools.partial(layer.count, probes),
                functools.partial(jnp.full_like, probes, _LAST),
            )
            for layer in self.layers
        ]
        return functools.reduce(jnp.add, counts)

    def cut(self, threshold: Array, missing: Array) -> list[_LayerCut]:
        """The cuts that keep, of the scores that equal the thresholds, so many by lowest index."""
        chosen, shared = [], len(self.layers) > 1
        for layer in self.layers:
            rows = layer.ties(threshold)
            taken = missing
            if shared:
                taken = jnp.minimum(missing, jnp.sum(rows.ties, dtype=jnp.uint32))
                missing = missing - taken
            chosen.append(layer.cut(threshold, rows, taken))
        return chosen


def _groups(scores: Sequence[Array], keep: Any, magnitude: bool) -> list[_Group]:
    """The layers, each with numbers of its own, or all under one."""
    shared = not isinstance(keep, list)
    numbers = [as_count(number) for number in ([keep] if shared else keep)]
    shapes = [()] * len(scores) if shared else [number.shape for number in numbers]
    layers = [_layer(s, shape, magnitude) for s, shape in zip(scores, shapes, strict=True)]
    members = [layers] if shared else [[layer] for layer in layers]
    pairs = zip(members, numbers, strict=True)
    groups = [_Group(together, number.reshape(1, -1)) for together, number in pairs]
    most = max(group.size for group in groups)
    if most >= 2**32:
        raise ValueError(f"one threshold can be for less than 2^32 weights, got {most}")
    return groups


def _layer(scores: Array, shape: tuple[int, ...], magnitude: bool) -> _Layer:
    shape = shape or (1,) * scores.ndim
    # Each copy has an axis, if only one of size one.
    scores, shape = (scores, shape) if 1 in shape else (scores[..., None], (*shape, 1))
    return _Layer(scores.astype(jnp.float32), shape, magnitude)


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
