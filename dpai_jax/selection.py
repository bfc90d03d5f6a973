"""Exact selection of the highest scores: by counting, without a sort.

The threshold is found by a search with several probes at a time: each pass counts how many scores
reach each probe, and the search goes on between two of them. It takes a few passes, and fewer if it
starts where the thresholds of the last two steps point to. It runs over the *ranks* of the floats,
integers in the same order: the bits of a float, inverted if it is negative. Of equal scores those
of lower index are kept; where more equal the threshold than are wanted, the search goes on among
these, by index. All layers are searched at once: the small ones lie in one row, and need no code of
their own. If the scores are sharded, only counts leave a device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.tools.rows import Copies, Row, are_small
from dpai_jax.tools.sums import totals, written_out, written_together


class _Probing(NamedTuple):
    """Which ranks one pass over the scores tries.

    Attributes:
      parts: some divide the interval evenly, into so many parts.
      deviations: others lie around the expected rank, in standard deviations from it.
      fan: how far from where the threshold is expected those of a first pass lie, on both sides: as
        fractions of how far it moved the last time, two to the power of minus these.
      least_fan: at least so far, in units of the last place.
    """

    parts: int
    deviations: tuple[float, ...]
    fan: tuple[int, ...]
    least_fan: tuple[int, ...]


# To read the scores takes longer than to compare them, so that there are few passes.
_BY_SEVEN = _Probing(4, (-1.5, -0.4, 0.4, 1.5), (3, 2, 1), (2**9, 2**11, 2**15))

# Up to so many scores are in a CPU's cache, where it takes longer to compare them.
_BY_THREE = _Probing(2, (-0.3, 0.3), (1,), (2**11,))
_IN_CACHE = 2**20

# The length of the lines in which many small layers are counted together.
_LINE = 1024

# Thresholds farther apart are not of similar scores.
_FAR = np.uint32(2**26)

# The ranks of −∞, of zero, and one above all numbers, which nothing reaches.
_LEAST = np.uint32(0x007F_FFFF)
_ZERO = np.uint32(0x8000_0000)
_BEYOND = np.uint32(0xFF80_0001)

_LAST = np.uint32(0xFFFF_FFFF)

# All bits of a float but its sign.
_MAGNITUDE = np.int32(0x7FFF_FFFF)


def select(
    scores: Sequence[Array],
    keep: list[Any] | Any,
    last: Array | None = None,
    *,
    magnitude: bool = False,
    sizes: Sequence[int] | None = None,
) -> tuple[list[Array], Array]:
    """The masks of the highest scores; of equal ones those of lower index come first.

    Args:
      scores: a float32 array for each layer, free of NaN.
      keep: a list of the numbers to keep in each layer, arrays of the layer's rank for as many
        layers stacked along its axes; or one number for all layers together.
      last: the thresholds of the last two selections among similar scores, (2, number to keep).
        They shorten the search.
      magnitude: whether to go by the scores' magnitude.
      sizes: for each layer, what one of its scores counts under one number for all layers, one if
        not given. Then as many scores are kept as come nearest to the number.

    Returns:
      A boolean mask for each layer, and the thresholds: ranks, uint32 (1, number to keep).

    Raises:
      ValueError: if one threshold is to be for 2^32 weights or more.
    """
    if not scores:
        return [], jnp.zeros((1, 0), jnp.uint32)
    layers, parts, cut = _found(scores, keep, last, magnitude, sizes)
    masks = {layer: mask for part in parts for layer, mask in part.masks(cut)}
    pairs = zip(layers, scores, strict=True)
    return [masks[layer].reshape(score.shape) for layer, score in pairs], cut.thresholds


def cut_of(scores: Sequence[Array], number: Array, last: Array) -> Cut:
    """Where the scores that `select` keeps end, by magnitude and one number for all layers."""
    _, _, cut = _found(scores, number, last, magnitude=True)
    return cut


def _found(
    scores: Sequence[Array],
    keep: list[Any] | Any,
    last: Array | None,
    magnitude: bool,
    sizes: Sequence[int] | None = None,
) -> tuple[list[_Layer], list[_Part], Cut]:
    """The layers, as they are counted, and the cut (see `select`)."""
    layers = _layers(scores, keep, magnitude, sizes)
    numbers = _in_row(keep)
    # Of a number for several copies, the size of one.
    most = np.zeros(numbers.shape, np.uint64)
    for layer in layers:
        most[0, layer.place] += layer.size * layer.worth
    if most.max() >= 2**32:
        raise ValueError(f"one threshold can be for less than 2^32 weights, got {most.max()}")
    bottom = jnp.full_like(numbers, _ZERO if magnitude else _LEAST)
    parts = _parts(layers)
    cut = _search(parts, numbers, bottom, jnp.asarray(most.astype(np.uint32)), last)
    return layers, parts, cut if sizes is None else _nearest(parts, numbers, cut)


def no_thresholds(number: int) -> np.ndarray:
    """Takes the place of the last two thresholds before a first selection: (2, number to keep)."""
    return np.repeat(np.asarray([[0], [_FAR]], np.uint32), number, 1)


def select_by_numpy(
    scores: Sequence[np.ndarray], keep: list[Any] | Any, *, magnitude: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """`select` of NumPy's arrays: the same masks by a partition, without a search."""
    ranks = [_ordered(np.ascontiguousarray(s).view(np.int32), magnitude) for s in scores]
    if not isinstance(keep, list):
        whole, threshold = _highest(np.concatenate([r.ravel() for r in ranks]), int(keep))
        ends = np.cumsum([r.size for r in ranks])[:-1]
        parts = zip(np.split(whole, ends), ranks, strict=True)
        return [mask.reshape(r.shape) for mask, r in parts], np.asarray([[threshold]])
    masks, thresholds = [np.empty(r.shape, bool) for r in ranks], []
    for mask, rank, numbers in zip(masks, ranks, keep, strict=True):
        shape = np.shape(numbers) or (1,) * rank.ndim
        for copy in np.ndindex(shape):
            own = tuple(i if n > 1 else slice(None) for i, n in zip(copy, shape, strict=True))
            found, threshold = _highest(rank[own].ravel(), int(np.reshape(numbers, shape)[copy]))
            mask[own] = found.reshape(mask[own].shape)
            thresholds.append(threshold)
    return masks, np.asarray([thresholds], np.uint32)


def _highest(ranks: np.ndarray, number: int) -> tuple[np.ndarray, np.uint32]:
    """The mask of the highest signed ranks, the first of equal ones, and their threshold."""
    if number == 0:
        return np.zeros(ranks.shape, bool), _BEYOND
    # Those of rank zero, which have been removed, can mostly be left out.
    able = ranks[ranks > 0]
    able = able if len(able) >= number else ranks
    least = np.partition(able, len(able) - number)[len(able) - number]
    mask = ranks > least
    equal = np.flatnonzero(ranks == least)
    mask[equal[: number - np.count_nonzero(mask)]] = True
    return mask, least.view(np.uint32) ^ _ZERO


class Cut(NamedTuple):
    """Which scores are kept: those above a threshold, and of those that equal it the first.

    Attributes:
      thresholds: ranks, uint32 (1, number to keep).
      ends: of scores that equal a threshold those are kept whose index among the scores of this
        number, in C order, is below; uint32 (1, number to keep).
    """

    thresholds: Array
    ends: Array


def cut_at(rank: int, end: int = int(_LAST)) -> Cut:
    """The cut at a signed rank, of whose scores those of indices below the end are kept."""
    pair: Any = np.asarray([min(rank + int(_ZERO), int(_LAST)), end], np.uint32)
    return Cut(*pair.reshape(2, 1, 1))


class State(NamedTuple):
    """A search of each number to keep, (1, number) each.

    It goes on between two ranks, `low` and `high`; `reached` scores reach the low one, and `above`
    what is above the high one. Where ranks are tied it goes on among the scores of rank
    `threshold`, and what it counts is by place: the lower a score's index, the higher its place. It
    `begins` by ranks around where the threshold is expected.
    """

    low: Array
    high: Array
    above: Array
    reached: Array
    numbers: Array
    threshold: Array
    tied: Array
    begins: Array


def _search(
    parts: Sequence[_Part], numbers: Array, bottom: Array, sizes: Array, last: Array | None
) -> Cut:
    """Where the `numbers` highest scores end.

    Args:
      parts: the scores.
      numbers: how many are asked for, uint32 (1, number).
      bottom: ranks that all reach.
      sizes: how many there are.
      last: see `select`.

    Returns:
      The cut.
    """
    how = _probing(parts)
    first = None if last is None else _expected(last, how)

    def narrow(state: State) -> State:
        probes = _probes(state, first, how)
        return _narrowed(state, probes, _counts(parts, probes, state), sizes)

    start = _start(numbers, bottom, sizes, last)
    state = lax.while_loop(lambda state: jnp.any(_goes_on(state)), narrow, start)
    return Cut(state.threshold, jnp.where(state.tied, _LAST - state.low + 1, _LAST))


def _start(numbers: Array, bottom: Array, sizes: Array, last: Array | None) -> State:
    """The start of a search (see `_search`)."""
    # Where all are kept, the lowest rank will do.
    top = jnp.where(sizes == numbers, bottom, jnp.full_like(bottom, _BEYOND))
    none = jnp.zeros_like(sizes)
    no = none.astype(bool)
    begins = no if last is None else _moved(last) < _FAR
    return State(bottom, top, none, sizes, numbers, bottom, no, begins)


def _goes_on(state: State) -> Array:
    return state.low < state.high


def _probing(parts: Sequence[_Part]) -> _Probing:
    """What suits the scores."""
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and all(isinstance(part, _Lines) and part.size <= _IN_CACHE for part in parts):
        return _BY_THREE
    return _BY_SEVEN


def _probes(state: State, first: Array | None, how: _Probing) -> Array:
    """The ranks that are tried next, within what is known, (probe, number).

    Args:
      state: where the search is.
      first: those to begin with, if there are any.
      how: which are tried.

    Returns:
      The ranks, of a search that is over `low`.
    """
    low, high = state.low, state.high
    span = high - low
    stride = span // how.parts + jnp.minimum(span % how.parts, 1)
    even = jnp.minimum(_column(range(1, how.parts)) * stride, span)
    # Where the threshold would be if all in between lay evenly, and how far from there chance would
    # have it.
    width = span.astype(jnp.float32)
    between = jnp.maximum(state.reached - state.above, 1).astype(jnp.float32)
    place = width * ((state.reached - state.numbers).astype(jnp.float32) + 0.5) / between
    deviation = width / (2 * jnp.sqrt(between))
    expected = place + jnp.asarray(how.deviations, jnp.float32)[:, None] * deviation
    expected = jnp.clip(expected, 1.0, jnp.maximum(width, 1.0)).astype(jnp.uint32)
    probes = low + jnp.concatenate([even, jnp.minimum(expected, span)])
    if first is not None:
        probes = jnp.where(state.begins, first, probes)
    # Both ends stay within what was known before; a search that is over has no room.
    return jnp.clip(probes, low, high)


def _narrowed(state: State, probes: Array, counts: Array, sizes: Array) -> State:
    """The search after it is known how many scores reach each probe, (probe, number)."""
    low, high, above, reached, numbers, threshold, tied, begins = state
    holds = counts >= numbers
    low = jnp.max(jnp.where(holds, probes, low), 0, keepdims=True)
    least = jnp.min(jnp.where(holds, counts, reached), 0, keepdims=True)
    reached = jnp.minimum(reached, least)
    high = jnp.min(jnp.where(holds, high, probes - 1), 0, keepdims=True)
    above = jnp.max(jnp.where(holds, above, counts), 0, keepdims=True)
    # Any rank that is reached by just as many as asked will do.
    high = jnp.where(reached == numbers, low, high)
    ties = (low == high) & ~tied & (reached > numbers)
    return State(
        low=jnp.where(ties, _LAST - (sizes - 1), low),
        high=jnp.where(ties, _LAST, high),
        above=jnp.where(ties, 0, above),
        reached=jnp.where(ties, reached - above, reached),
        numbers=jnp.where(ties, numbers - above, numbers),
        threshold=jnp.where(tied, threshold, low),
        tied=tied | ties,
        begins=jnp.zeros_like(begins),
    )


def kept(scores: Sequence[Array], before: Sequence[Any], cut: Cut) -> list[Array]:
    """Which of some layers' scores are kept under a threshold of magnitudes for all.

    Args:
      scores: the layers' scores.
      before: for each layer, how many scores come before its own, uint32 if not an integer.
      cut: where the scores that are kept end.

    Returns:
      The layers' masks.
    """
    layers = [
        _Layer(x, (1,) * x.ndim, slice(0, 1), n, magnitude=True)
        for x, n in zip(scores, before, strict=True)
    ]
    return [mask for _, mask in _Large(layers).masks(cut)]


def kept_by_numpy(
    scores: Sequence[np.ndarray], before: Sequence[int], cut: Cut
) -> list[np.ndarray]:
    """`kept` of NumPy's arrays."""
    threshold, end = int(cut.thresholds[0, 0]) - int(_ZERO), int(cut.ends[0, 0])
    masks = []
    for x, first in zip(scores, before, strict=True):
        ranks = ranks_of_magnitudes(x).ravel()
        mask, n_before = np.empty(ranks.shape, bool), np.clip(end - first, 0, ranks.size)
        np.greater_equal(ranks[:n_before], threshold, out=mask[:n_before])
        np.greater(ranks[n_before:], threshold, out=mask[n_before:])
        masks.append(mask.reshape(x.shape))
    return masks


def _expected(last: Array, how: _Probing) -> Array:
    """Ranks around where a threshold is if it goes on as between the last two."""
    near = last[1:] + (last[1:] - last[:1])
    fan = jnp.maximum(_moved(last) >> _column(how.fan), _column(how.least_fan))
    return jnp.concatenate([near - fan, near, near + fan])


def _moved(last: Array) -> Array:
    """How far apart the last two thresholds are."""
    return jnp.max(last, 0, keepdims=True) - jnp.min(last, 0, keepdims=True)


def _nearest(parts: Sequence[_Part], number: Array, cut: Cut) -> Cut:
    """The cut, or that without the last score, whichever keeps nearer to the number."""

    def total(cut: Cut) -> Array:
        masks = [pair for part in parts for pair in part.masks(cut)]
        counts = [jnp.sum(m, dtype=jnp.uint32) * np.uint32(layer.worth) for layer, m in masks]
        return functools.reduce(jnp.add, counts)

    # Where more is kept than the number, the search has ended at a single score (see `State`).
    shorter = cut._replace(ends=cut.ends - 1)
    is_nearer = total(cut) - number > number - total(shorter)
    return cut._replace(ends=jnp.where(is_nearer, shorter.ends, cut.ends))


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's scores, and which of all numbers to keep are about it.

    Attributes:
      scores: float32.
      shape: that of its numbers, broadcastable to the scores'.
      place: that of its numbers among all.
      before: how many scores come before its own under the same number, uint32 if not an integer.
      magnitude: whether the scores go by their magnitude.
      worth: what one of its scores counts.
    """

    scores: Array
    shape: tuple[int, ...]
    place: slice
    before: int | Array
    magnitude: bool
    worth: int = 1

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

    @property
    def index(self) -> Array:
        """The index of each score among those of the same number."""
        return _index(self.scores.shape, self.shape) + as_count(self.before)

    def own(self, numbers: Array) -> Array:
        """Of numbers (row, number) its own, to broadcast to its scores row by row."""
        return numbers[:, self.place].reshape(-1, *self.shape)


class _Part(Protocol):
    """Scores that are counted together.

    Attributes:
      places: for each column of its counts, which number to keep it is about.
      worths: for each column, what one score counts.
    """

    @property
    def places(self) -> np.ndarray: ...

    @property
    def worths(self) -> np.ndarray: ...

    def count(self, probes: Array, state: State) -> Array:
        """How many scores reach each probe, (probe, column).

        Args:
          probes: ranks, or places where ranks are tied; (probe, number).
          state: where the searches are, of which any goes on.

        Returns:
          uint32 counts.
        """
        ...

    def masks(self, cut: Cut) -> list[tuple[_Layer, Array]]:
        """Which scores are kept: its layers, each with a mask of its scores' shape."""
        ...


class _Large:
    """Large layers: each is read by itself, and what is counted along its last axis is added up.

    Sums along the last axis run through memory; they are added up in a row of those of all layers,
    as each reduction that XLA writes takes long to compile.
    """

    def __init__(self, layers: Sequence[_Layer]):
        self.layers = layers
        self.places = np.concatenate(
            [np.arange(layer.place.start, layer.place.stop) for layer in layers]
        )
        self.worths = np.concatenate(
            [np.full(math.prod(layer.shape), layer.worth, np.uint32) for layer in layers]
        )

    def count(self, probes: Array, state: State) -> Array:
        """See `_Part`."""

        def run(probes: Array) -> Array:
            lines = []
            for layer in self.layers:
                own = (layer.own(x) for x in (state.threshold, state.tied, probes))
                lines.append(totals(_reaching(layer.ranks, layer.index, *own), layer.axes[-1:]))
            stacks = [tuple(i for i, n in enumerate(x.shape) if n > 1) for x in self.layers]
            copies = Copies([own[0].shape for own in lines], stacks)
            return jnp.stack(copies.row.sums([copies.blocks(x) for x in zip(*lines, strict=True)]))

        def unwanted(probes: Array) -> Array:
            return jnp.full((len(probes), len(self.places)), _LAST)

        # Within a branch, for a loop would write out all ranks before it starts.
        return lax.cond(jnp.any(_goes_on(state)), run, unwanted, probes)

    def masks(self, cut: Cut) -> list[tuple[_Layer, Array]]:
        """See `_Part`."""
        pairs = [(layer, [layer.own(x)[0] for x in cut]) for layer in self.layers]
        return [(x, _is_kept(x.ranks, x.index, *own)) for x, own in pairs]


class _Row:
    """Small layers in one row, each copy of a layer an array of its own."""

    def __init__(self, layers: Sequence[_Layer]):
        self.layers = layers
        copies = [(layer, copy) for layer in layers for copy in range(math.prod(layer.shape))]
        self.places = np.asarray([layer.place.start + copy for layer, copy in copies])
        self.worths = np.asarray([layer.worth for layer, _ in copies], np.uint32)
        self.row = Row([layer.size for layer, _ in copies])
        before = np.asarray([layer.before for layer, _ in copies], np.uint32)
        first = (before[self.row.array] + self.row.first.astype(np.uint32))[:, None]
        self.index = jnp.asarray(first) + np.arange(self.row.length, dtype=np.uint32)[None]
        # Ranked in the row: before, each shape would have a kernel of its own.
        scores = self.row.blocks([s for layer in layers for s in _copies(layer)], 0.0)
        # What pads a row ranks below all numbers.
        self.ranks = jnp.where(self.row.is_padding, _LOWEST, _rank(scores, layers[0].magnitude))

    def count(self, probes: Array, state: State) -> Array:
        """See `_Part`."""
        numbers = (state.threshold, state.tied, probes)
        own = (self.row.spread(x[:, self.places]) for x in numbers)
        return jnp.stack(self.row.sums(_reaching(self.ranks, self.index, *own)))

    def masks(self, cut: Cut) -> list[tuple[_Layer, Array]]:
        """See `_Part`."""
        threshold, end = (self.row.spread(x[0, self.places]) for x in (cut.thresholds, cut.ends))
        # Written out, so that not each layer compares ranks itself.
        kept = written_out(_is_kept(self.ranks, self.index, threshold, end))
        copies = iter(self.row.arrays(kept))
        masks = []
        for layer in self.layers:
            order = _copies_first(layer)
            own = jnp.stack([next(copies) for _ in range(math.prod(layer.shape))])
            mask = own.reshape([layer.scores.shape[i] for i in order])
            masks.append(mask.transpose(np.argsort(order)))
        return list(zip(self.layers, written_together(masks), strict=True))


class _Lines:
    """Small layers that share one number to keep, end to end in one array.

    Of which layer a score is makes no difference to a search.
    """

    def __init__(self, layers: Sequence[_Layer]):
        self.layers, self._ends = layers, np.cumsum([layer.size for layer in layers])
        first = layers[0]
        # What is added comes last among the lowest, and is not kept.
        lowest = 0.0 if first.magnitude else -np.inf
        added = jnp.full(-self._ends[-1] % _LINE, lowest, first.scores.dtype)
        whole = jnp.concatenate([*(layer.scores.ravel() for layer in layers), added])
        self._whole = _Large(
            [dataclasses.replace(first, scores=whole.reshape(-1, _LINE), shape=(1, 1))]
        )
        self.places, self.worths = self._whole.places, self._whole.worths
        self.size = int(self._ends[-1])

    @staticmethod
    def serves(layers: Sequence[_Layer]) -> bool:
        """Whether layers come one after the other under one number."""
        firsts = [0, *itertools.accumulate(layer.size for layer in layers)]
        return all(
            (layer.before, layer.place, layer.worth) == (first, slice(0, 1), 1)
            for layer, first in zip(layers, firsts, strict=False)
        )

    def count(self, probes: Array, state: State) -> Array:
        """See `_Part`."""
        return self._whole.count(probes, state)

    def masks(self, cut: Cut) -> list[tuple[_Layer, Array]]:
        """See `_Part`."""
        ((_, mask),) = self._whole.masks(cut)
        # Written out, so that not each layer compares ranks itself (see `_Row.masks`).
        kept = written_out(mask.ravel())
        rows = jnp.split(kept[: self._ends[-1]], self._ends[:-1])
        masks = [row.reshape(x.scores.shape) for x, row in zip(self.layers, rows, strict=True)]
        return list(zip(self.layers, written_together(masks), strict=True))


def _copies(layer: _Layer) -> list[Array]:
    """The scores of each copy of a layer."""
    return list(layer.scores.transpose(_copies_first(layer)).reshape(-1, layer.size))


def _copies_first(layer: _Layer) -> list[int]:
    return sorted(range(layer.scores.ndim), key=lambda i: layer.shape[i] == 1)


def _is_kept(ranks: Array, index: Array, threshold: Array, end: Array) -> Array:
    """Which scores rank above the threshold, or equal it and come before the end."""
    return ranks >= _signed(threshold) + (index >= end).astype(jnp.int32)


def _reaching(
    ranks: Array, index: Array, threshold: Array, tied: Array, probes: Array
) -> list[Array]:
    """Which scores reach each probe: by rank, or where ranks are tied by place."""
    places = jnp.where(ranks == _signed(threshold[0]), _signed(_LAST - index), _LOWEST)
    standing = jnp.where(tied[0], places, ranks)
    return [standing >= probe for probe in _signed(probes)]


def _counts(parts: Sequence[_Part], probes: Array, state: State) -> Array:
    """How many scores reach probes (probe, number)."""
    columns = [part.count(probes, state) for part in parts]
    if any(np.any(part.worths != 1) for part in parts):
        columns = [c * part.worths[None] for c, part in zip(columns, parts, strict=True)]
    if probes.shape[1] == 1:
        sums = [jnp.sum(c, 1, jnp.uint32, keepdims=True) for c in columns]
        return functools.reduce(jnp.add, sums)
    order = np.argsort(np.concatenate([part.places for part in parts]))
    counts = jnp.concatenate(columns, 1)
    return counts if np.all(np.diff(order) == 1) else counts[:, order]


def _parts(layers: Sequence[_Layer]) -> list[_Part]:
    """The layers as they are counted: small ones that are on one device in one row."""
    flags = are_small([layer.scores for layer in layers])
    if all(flags) and _Lines.serves(layers):
        return [_Lines(layers)]
    pairs = list(zip(layers, flags, strict=True))
    small, others = ([layer for layer, flag in pairs if flag == which] for which in (True, False))
    return [*([_Row(small)] if small else []), *([_Large(others)] if others else [])]


def _layers(
    scores: Sequence[Array],
    keep: list[Any] | Any,
    magnitude: bool,
    sizes: Sequence[int] | None,
) -> list[_Layer]:
    """The layers, and which numbers to keep are about each."""
    shared = not isinstance(keep, list)
    layers: list[_Layer] = []
    for i, x in enumerate(scores):
        # Each copy has an axis, if only one of size one.
        shape = () if shared else np.shape(keep[i])
        shape = shape or (1,) * x.ndim
        x, shape = (x, shape) if 1 in shape else (x[..., None], (*shape, 1))
        last = layers[-1] if layers else None
        start = 0 if shared or last is None else last.place.stop
        before = last.before + last.size if shared and last is not None else 0
        place = slice(start, start + math.prod(shape))
        worth = 1 if sizes is None else sizes[i]
        layers.append(_Layer(x, shape, place, before, magnitude, worth))
    return layers


def _in_row(keep: list[Any] | Any) -> Array:
    """The numbers to keep, uint32 (1, number)."""
    numbers = keep if isinstance(keep, list) else [keep]
    return jnp.concatenate([as_count(number).reshape(1, -1) for number in numbers], 1)


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


# Signed, below the rank of any number.
_LOWEST = np.int32(-(2**31))


def _signed(rank: Array) -> Array:
    """Ranks as signed integers, which CPUs compare faster."""
    return lax.bitcast_convert_type(rank ^ _ZERO, jnp.int32)


def _rank(score: Array, magnitude: bool) -> Array:
    """The rank of a float, or of its magnitude, signed; that of −0. is that of 0."""
    return _ordered(lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32), magnitude)


def ranks_of_magnitudes(scores: Any) -> Any:
    """The signed ranks of the magnitudes of float32 numbers, in an array of JAX or of NumPy."""
    return _ordered(scores.view(np.int32), magnitude=True)


def _ordered(bits: Any, magnitude: bool) -> Any:
    """The ranks of floats from their bits, arrays of JAX or of NumPy."""
    if magnitude:
        return bits & _MAGNITUDE
    bits = bits.__array_namespace__().where(bits == ~_MAGNITUDE, np.int32(0), bits)
    return bits ^ ((bits >> np.int32(31)) & _MAGNITUDE)
