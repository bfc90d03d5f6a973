"""Exact selection of the highest scores: by counting, without a sort.

The threshold is found by a search with several probes at a time: each pass counts how many scores
reach each probe, and the search goes on between two of them. It takes a few passes, and fewer if it
starts at the threshold of the step before. It runs over the *ranks* of the floats, integers in the
same order: the bits of a float, inverted if it is negative. Of equal scores those of lower index
are kept; the last of them is found by the same search. If the scores are sharded, only counts leave
a device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.tools.sums import totals

# The probes of one pass over the scores: some divide the interval evenly, others lie around the
# expected rank, in standard deviations from it.
_PARTS = 4
_DEVIATIONS = (-1.5, -0.4, 0.4, 1.5)

# How far from the threshold before the first probes lie, on both sides, in units of the last place.
_FAN = (2**9, 2**11, 2**15)

# The ranks of −∞, of zero, and one above all numbers, which nothing reaches.
_LEAST = np.uint32(0x007F_FFFF)
_ZERO = np.uint32(0x8000_0000)
_BEYOND = np.uint32(0xFF80_0001)

_LAST = np.uint32(0xFFFF_FFFF)

# All bits of a float but its sign.
_MAGNITUDE = np.int32(0x7FFF_FFFF)


class Cut(NamedTuple):
    """Which scores are kept: those above a threshold, and of those that equal it the first.

    Attributes:
      thresholds: ranks, uint32 (1, number to keep).
      layers: for each layer its thresholds, and its ends: of scores that equal a threshold those
        are kept whose index, in C order, is below. Both uint32, to broadcast to its scores.
    """

    thresholds: Array
    layers: list[tuple[Array, Array]]


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
    return apply_cut(scores, cut, magnitude=magnitude), cut.thresholds


def find_cut(
    scores: Sequence[Array],
    keep: list[Any] | Any,
    near: Array | None = None,
    *,
    magnitude: bool = False,
) -> Cut:
    """Where to cut, for the masks of `select`."""
    if not scores:
        return Cut(jnp.zeros((1, 0), jnp.uint32), [])
    layers, numbers, sizes = _layers(scores, keep, magnitude)
    bottom = jnp.full_like(numbers, _ZERO if magnitude else _LEAST)
    top = jnp.where(sizes == numbers, bottom, jnp.full_like(numbers, _BEYOND))
    threshold, above, reached = _search(
        functools.partial(_counts, layers, _Layer.reaching), numbers, bottom, top, sizes, near
    )
    # Where a threshold is reached by more scores than asked, among those that equal it by index:
    # the lower, the higher they rank.
    tied = reached > numbers
    first = jnp.full_like(numbers, _LAST)
    last = jnp.where(tied, first - (sizes - 1), first)
    at = {layer: layer.own(threshold)[0] for layer in layers}

    def ties(layer: _Layer, probes: Array) -> list[Array]:
        return layer.tied(at[layer], probes)

    found, _, _ = _search(
        functools.partial(_counts, layers, ties), numbers - above, last, first, reached - above
    )
    end = jnp.where(tied, first - found + 1, first)
    ends = {
        layer: layer.own(end - jnp.minimum(end, np.uint32(layer.before)))[0] for layer in layers
    }
    return Cut(threshold, [(at[layer], ends[layer]) for layer in layers])


def apply_cut(scores: Sequence[Array], cut: Cut, *, magnitude: bool = False) -> list[Array]:
    """The masks of scores by where they are cut, an elementwise function of them."""
    masks = []
    for score, (threshold, end) in zip(scores, cut.layers, strict=True):
        each = score.reshape(*score.shape, *threshold.shape[score.ndim :])
        is_behind = _index(each.shape, threshold.shape) >= end
        mask = _rank(each, magnitude) >= _signed(threshold) + is_behind.astype(jnp.int32)
        masks.append(mask.reshape(score.shape))
    return masks


def _search(
    count: Callable[[Array, Array], Array],
    numbers: Array,
    bottom: Array,
    top: Array,
    sizes: Array,
    near: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The highest ranks that are reached by at least `numbers` scores.

    Stops early at any rank that is reached by exactly `numbers` scores.

    Args:
      count: how many reach probes, `count(probes, wanted)`, both (probe, search); `wanted`,
        (1, search), tells which searches still run: the others take any number not below `numbers`.
      numbers: how many are asked for, uint32 (1, search).
      bottom: ranks that all reach.
      top: ranks, the highest that may be found.
      sizes: how many there are.
      near: where to look first.

    Returns:
      The ranks, how many are above, and how many reach them; uint32 (1, search).
    """
    State = tuple[Array, Array, Array, Array, Array]

    def probes(low: Array, high: Array, above: Array, reached: Array) -> Array:
        """Ranks above the low one, up to the high one."""
        span = high - low
        stride = span // _PARTS + jnp.minimum(span % _PARTS, 1)
        even = jnp.minimum(_column(range(1, _PARTS)) * stride, span)
        # Where the threshold would be if all in between lay evenly, and how far from there chance
        # would have it.
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
        counts = count(tried, low < high)
        holds = counts >= numbers
        low = jnp.max(jnp.where(holds, tried, low), 0, keepdims=True)
        least = jnp.min(jnp.where(holds, counts, reached), 0, keepdims=True)
        reached = jnp.minimum(reached, least)
        high = jnp.min(jnp.where(holds, high, tried - 1), 0, keepdims=True)
        above = jnp.max(jnp.where(holds, above, counts), 0, keepdims=True)
        return low, jnp.where(reached == numbers, low, high), above, reached, jnp.zeros((), bool)

    start = (bottom, top, jnp.zeros_like(sizes), sizes, jnp.ones((), bool))
    low, _, above, reached, _ = lax.while_loop(lambda s: jnp.any(s[0] < s[1]), narrow, start)
    return low, above, reached


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's scores, and which of all numbers to keep are about it.

    Attributes:
      scores: float32.
      shape: that of its numbers, broadcastable to the scores'.
      place: that of its numbers among all.
      before: how many scores come before its own under the same number.
      magnitude: whether the scores go by their magnitude.
    """

    scores: Array
    shape: tuple[int, ...]
    place: slice
    before: int
    magnitude: bool

    @property
    def size(self) -> int:
        """The number of scores of a single copy."""
        return self.scores.size // math.prod(self.shape)

    @property
    def axes(self) -> list[int]:
        """The axes of a single copy."""
        return [i for i, copies in enumerate(self.shape) if copies == 1]

    @property
    def ranks(self) -> Array:
        """The ranks of its scores, signed."""
        return _rank(self.scores, self.magnitude)

    def own(self, numbers: Array) -> Array:
        """Of numbers (row, number) its own, to broadcast to its scores row by row."""
        return numbers[:, self.place].reshape(-1, *self.shape)

    def reaching(self, probes: Array) -> list[Array]:
        """Which scores reach each probe, of its own."""
        return [self.ranks >= probe for probe in _signed(probes)]

    def tied(self, threshold: Array, probes: Array) -> list[Array]:
        """Which scores equal the threshold, and have an index that reaches each probe."""
        tie, index = self.ranks == _signed(threshold), _index(self.scores.shape, self.shape)
        return [tie & (_LAST - np.uint32(self.before) - index >= probe) for probe in probes]


def _counts(
    layers: Sequence[_Layer],
    flags: Callable[[_Layer, Array], list[Array]],
    probes: Array,
    wanted: Array,
) -> Array:
    """How many flags are up at probes (probe, number); 2^32 - 1 where that is not wanted."""

    def count(layer: _Layer, own: Array) -> Array:
        # Along the last axis a sum runs through memory; the others are shared out among cores.
        rows = totals(flags(layer, own), layer.axes[-1:])
        return jnp.stack([count.ravel() for count in totals(rows, layer.axes[:-1])])

    # Within a branch, for a loop would write out all ranks before it starts.
    counts = [
        lax.cond(
            jnp.any(wanted[:, layer.place]),
            functools.partial(count, layer),
            lambda own: jnp.full((len(own), own[0].size), _LAST),
            layer.own(probes),
        )
        for layer in layers
    ]
    shared = len(layers) > 1 and layers[0].place == layers[1].place
    return functools.reduce(jnp.add, counts) if shared else jnp.concatenate(counts, 1)


def _layers(
    scores: Sequence[Array], keep: list[Any] | Any, magnitude: bool
) -> tuple[list[_Layer], Array, Array]:
    """The layers, the numbers to keep, and of how many scores each is; both uint32 (1, number)."""
    shared = not isinstance(keep, list)
    numbers = [as_count(keep)] if shared else [as_count(number) for number in keep]
    shapes = [()] * len(scores) if shared else [number.shape for number in numbers]
    layers: list[_Layer] = []
    for x, shape in zip(scores, shapes, strict=True):
        # Each copy has an axis, if only one of size one.
        shape = shape or (1,) * x.ndim
        x, shape = (x, shape) if 1 in shape else (x[..., None], (*shape, 1))
        last = layers[-1] if layers else None
        start = 0 if shared or last is None else last.place.stop
        before = last.before + last.size if shared and last is not None else 0
        place = slice(start, start + math.prod(shape))
        layers.append(_Layer(x, shape, place, before, magnitude))
    # Of a number for several copies, that of one.
    sizes = [layer.size for layer in layers for _ in range(math.prod(layer.shape))]
    sizes = [sum(sizes)] if shared else sizes
    if max(sizes) >= 2**32:
        raise ValueError(f"one threshold can be for less than 2^32 weights, got {max(sizes)}")
    row = jnp.concatenate([number.reshape(1, -1) for number in numbers], 1)
    return layers, row, jnp.asarray([sizes], jnp.uint32)


def as_count(number: Any) -> Array:
    """Numbers of weights as an array that holds up to 2^32 of them."""
    if isinstance(number, jax.Array):
        return number.astype(jnp.uint32)
    return jnp.asarray(np.asarray(number).astype(np.uint32))


def _column(numbers: Iterable[int]) -> Array:
    return jnp.asarray(tuple(numbers), jnp.uint32)[:, None]


def _index(sizes: tuple[int, ...], copies: tuple[int, ...]) -> Array:
    """The index of each score within its copy, in C order."""
    axes = [i for i, n in enumerate(copies) if n == 1]
    index, stride = jnp.zeros((1,) * len(sizes), jnp.uint32), math.prod(sizes[i] for i in axes)
    for axis in axes:
        stride //= max(sizes[axis], 1)
        places = np.arange(sizes[axis], dtype=np.uint32) * np.uint32(stride)
        index = index + jnp.expand_dims(places, [i for i in range(len(sizes)) if i != axis])
    return index


def _signed(rank: Array) -> Array:
    """Ranks as signed integers, which CPUs compare faster."""
    return lax.bitcast_convert_type(rank ^ _ZERO, jnp.int32)


def _rank(score: Array, magnitude: bool) -> Array:
    """The rank of a float, or of its magnitude, signed; that of −0. is that of 0."""
    bits = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    if magnitude:
        return bits & _MAGNITUDE
    bits = jnp.where(bits == ~_MAGNITUDE, 0, bits)
    return bits ^ (lax.shift_right_arithmetic(bits, jnp.int32(31)) & _MAGNITUDE)
