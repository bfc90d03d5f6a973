"""Exact search for one threshold of magnitudes in a large network on a CPU, led by the host.

A compiled program counts along lines of the scores how many reach a few ranks. A sample tells where
to begin, and each pass narrows two ranks between which the threshold lies. As soon as few lines
hold scores in between, the host reads these lines, and is done. As in `selection` the search runs
over ranks: here the bits of magnitudes, integers in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpai_jax.selection import Cut, cut_at, ranks_of_magnitudes

# Where a threshold may be, in standard deviations from where a sample, or the number of scores
# between two ranks, has it.
_BY_SAMPLE = np.asarray([-4, -1.6, -0.8, 0, 0.8, 1.6, 4])
_BY_NUMBER = np.asarray([-4, -1.5, -0.5, 0, 0.5, 1.5, 4])

# How many ranks a pass counts.
PROBES = len(_BY_SAMPLE)

# How many scores are sampled, about.
_SAMPLE = 2**18

# The length of a line, at least, if its layer has so many scores.
_LINE = 256

# How many scores the host may read in the end.
_FEW = 2**21

# Above the ranks of all scores, even of NaN.
_ABOVE = 2**31

# From ranks, int32 (probe,), to how many scores of each line reach each, (probe, line).
Count = Callable[[np.ndarray], np.ndarray]


def line_length(shape: Sequence[int]) -> int:
    """The length of a layer's lines, which go along some of its last axes."""
    lengths = np.cumprod(shape[::-1])
    return int(next((n for n in lengths if n >= _LINE), lengths[-1]))


def search(scores: Sequence[np.ndarray], number: int, count: Count) -> Cut:
    """Where the highest magnitudes end (see `selection.cut_of`).

    Args:
      scores: the layers' scores, float32; few of them are read.
      number: how many to keep.
      count: counts along the lines of all layers, one layer after the other.

    Returns:
      The cut.
    """
    layers = [x.reshape(-1, line_length(x.shape)) for x in scores]
    lengths = np.repeat([x.shape[1] for x in layers], [len(x) for x in layers])
    between = _Between(0, _ABOVE, lengths, np.zeros_like(lengths))
    n_passes = 0
    while between.above < number < between.reached:
        lines, wanted = np.flatnonzero(between.inside), number - between.above
        is_one_rank = between.high == between.low + 1
        if is_one_rank:
            # The first of equal scores are kept, the last of these in one line.
            totals = np.cumsum(between.inside[lines])
            place = np.searchsorted(totals, wanted)
            wanted -= int(totals[place] - between.inside[lines[place]])
            lines = lines[[place]]
        if is_one_rank or lengths[lines].sum() <= _FEW:
            return _cut_in(lines, layers, between, wanted)
        if n_passes == 0:
            probes = _by_sample(layers, number / lengths.sum())
        else:
            probes = between.by_number(number) if n_passes % 2 else between.evenly()
        between = between.narrowed(probes, count(probes), number)
        n_passes += 1
    return cut_at(between.low if number == between.reached else between.high)


class _Between(NamedTuple):
    """The ranks that may be the threshold: from `low` on, and below `high`.

    Attributes:
      low: a rank that as many scores reach as are to be kept, or more.
      high: a rank that as many reach, or fewer.
      at_low: how many scores of each line reach the low rank, (line,).
      at_high: how many reach the high one.
    """

    low: int
    high: int
    at_low: np.ndarray
    at_high: np.ndarray

    @property
    def reached(self) -> int:
        """How many scores reach the low rank."""
        return int(self.at_low.sum())

    @property
    def above(self) -> int:
        """How many scores reach the high rank."""
        return int(self.at_high.sum())

    @property
    def inside(self) -> np.ndarray:
        """How many scores of each line lie between."""
        return self.at_low - self.at_high

    def narrowed(self, probes: np.ndarray, counts: np.ndarray, number: int) -> _Between:
        """What is left when it is known how many scores of each line reach each probe."""
        low, high, at_low, at_high = self
        for probe, own in zip(probes.tolist(), counts, strict=True):
            total = int(own.sum())
            if total >= number and probe > low:
                low, at_low = probe, own
            if total <= number and probe < high:
                high, at_high = probe, own
        return _Between(low, high, at_low, at_high)

    def by_number(self, number: int) -> np.ndarray:
        """Ranks around where the threshold would be if scores lay evenly, as far as chance has it.

        Args:
          number: how many scores to keep.

        Returns:
          Ranks, int32 (probe,).
        """
        width, n_inside = self.high - self.low, self.reached - self.above
        place = self.low + width * (self.reached - number + 0.5) / n_inside
        return self._within(place + _BY_NUMBER * width / (2 * math.sqrt(n_inside)))

    def evenly(self) -> np.ndarray:
        """Ranks that divide what is left evenly, int32 (probe,)."""
        return self._within(np.linspace(self.low, self.high, PROBES + 2)[1:-1])

    def _within(self, ranks: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(ranks), self.low + 1, self.high - 1).astype(np.int32)


def _by_sample(layers: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Ranks around the one that a share of a sample of the scores reaches, int32 (probe,)."""
    step = max(sum(x.size for x in layers) // _SAMPLE, 1)
    while math.gcd(step, 2 * 3 * 5 * 7) > 1:  # most sizes of layers have such factors
        step += 1
    sample = ranks_of_magnitudes(np.concatenate([x.ravel()[step // 2 :: step] for x in layers]))
    sample.sort()
    places = len(sample) * (1 - share) + _BY_SAMPLE * math.sqrt(len(sample) * share * (1 - share))
    return sample[np.clip(np.rint(places), 0, len(sample) - 1).astype(int)]


def _cut_in(lines: np.ndarray, layers: Sequence[np.ndarray], between: _Between, wanted: int) -> Cut:
    """The cut that keeps so many of the scores that lie between two ranks in some lines."""
    ranks, places = [], []
    line = place = 0
    for layer in layers:
        own = lines[(line <= lines) & (lines < line + len(layer))] - line
        if len(own):
            found = ranks_of_magnitudes(layer[own])
            row, column = np.nonzero((between.low <= found) & (found < between.high))
            ranks.append(found[row, column])
            places.append(place + own[row] * layer.shape[1] + column)
        line, place = line + len(layer), place + layer.size
    found, at = np.concatenate(ranks), np.concatenate(places)
    last = np.lexsort((at, -found))[wanted - 1]
    return cut_at(int(found[last]), int(at[last]) + 1)
