"""Selection of groups of weights, within a compiled program.

A layer's *part* says which of its weights stand or fall together. Parts are hashable, so that a
program is compiled for them; without parts each weight stands alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import selection
from dpai_jax.tools.sums import sum_over


@dataclasses.dataclass(frozen=True)
class Span:
    """The groups of a layer that are kept or removed whole: all weights along some axes.

    Attributes:
      axes: the axes that a group spans.
      size: the number of weights in a group.
      copies: of each axis the size if layers are stacked along it, else one.
      is_whole: whether the layer keeps all of its groups.
    """

    axes: tuple[int, ...]
    size: int
    copies: tuple[int, ...]
    is_whole: bool = False

    def scores(self, scores: Array) -> Array:
        """The mean score of each group; −∞ if no weight of it has more."""
        if self.size == 1:
            return scores
        # A weight that was removed, or that no mask can make effective, has −∞.
        is_out = scores == -jnp.inf
        most = float(np.finfo(np.float32).max) / (4 * self.size)
        mean = self._mean(jnp.clip(jnp.where(is_out, 0.0, scores), -most, most))
        return jnp.where(jnp.all(is_out, self.axes, keepdims=True), -jnp.inf, mean)

    def together(self, array: Array) -> Array:
        """An array of the layer's shape with the mean of its group at each weight."""
        return array if self.size == 1 else jnp.broadcast_to(self._mean(array), array.shape)

    def _mean(self, array: Array) -> Array:
        # The same on any number of devices.
        return sum_over(array, self.axes) * (1 / self.size)

    def holds(self, mask: Array) -> Array:
        """Whether a mask keeps or removes each group whole."""
        of_group = jnp.any(mask, self.axes, keepdims=True)
        return jnp.all(mask == jnp.broadcast_to(of_group, mask.shape))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a layer: each M consecutive weights along its inputs, of which some are kept.

    Attributes:
      axes: the axes over input features, seen as one in C order.
      length: M.
    """

    axes: tuple[int, ...]
    length: int

    def select(self, scores: Array, number: Array) -> Array:
        """The mask that keeps the highest scores of each block, of equal ones the first.

        Args:
          scores: the layer's scores.
          number: how many of M weights to keep.

        Returns:
          The mask.
        """
        blocks = self._split(scores, -jnp.inf)
        mine, other = blocks[..., :, None], blocks[..., None, :]
        order = np.arange(self.length)
        earlier = jnp.asarray(order[None, :] < order[:, None])[None, None]
        ahead = (other > mine) | ((other == mine) & earlier)
        kept = jnp.sum(ahead, -1, dtype=jnp.int32) < self._numbers(scores.shape, number)
        rows = kept.reshape(len(kept), -1)[:, : self._inputs(scores.shape)]
        order_of_axes = self._inputs_last(scores.ndim)
        mask = rows.reshape([scores.shape[i] for i in order_of_axes])
        return mask.transpose(np.argsort(order_of_axes))

    def holds(self, mask: Array, number: Array) -> Array:
        """Whether a mask keeps as many of each block as `select`."""
        found = jnp.sum(self._split(mask, False), -1, dtype=jnp.int32, keepdims=True)
        return jnp.all(found == self._numbers(mask.shape, number))

    def kept(self, shape: tuple[int, ...], number: int) -> int:
        """How many weights of a layer of this shape `select` keeps."""
        per_row = sum(-(-number * size // self.length) for size in self._sizes(shape))
        return math.prod(shape) // self._inputs(shape) * per_row

    def _numbers(self, shape: tuple[int, ...], number: Array) -> Array:
        """How many to keep of each block, (1, block, 1): of the last one its part, rounded up."""
        sizes = jnp.asarray(self._sizes(shape), jnp.int32)[None, :, None]
        return (number.astype(jnp.int32) * sizes + (self.length - 1)) // self.length

    def _sizes(self, shape: tuple[int, ...]) -> list[int]:
        """The number of weights in each block of a row; the last may have fewer."""
        inputs = self._inputs(shape)
        return [min(self.length, inputs - i) for i in range(0, inputs, self.length)]

    def _split(self, array: Array, padding: Any) -> Array:
        """An array as (row, block, M), padded at the end of a row."""
        inputs = self._inputs(array.shape)
        rows = array.transpose(self._inputs_last(array.ndim)).reshape(-1, inputs)
        rows = jnp.pad(rows, ((0, 0), (0, -inputs % self.length)), constant_values=padding)
        return rows.reshape(len(rows), -1, self.length)

    def _inputs_last(self, ndim: int) -> tuple[int, ...]:
        return (*(i for i in range(ndim) if i not in self.axes), *self.axes)

    def _inputs(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[i] for i in self.axes)


# One part for each layer; none at all where each weight stands alone.
Parts = tuple[Span, ...] | tuple[Blocks, ...]


def select(
    scores: Sequence[Array],
    keep: list[Any] | Any,
    last: Array | None = None,
    *,
    magnitude: bool = False,
    parts: Parts = (),
) -> tuple[list[Array], Array]:
    """`selection.select` of the layers' parts.

    Args:
      scores: a float32 array for each layer, free of NaN.
      keep: a list over the layers: of spans the number of groups, of blocks that of weights in
        each. Or one number of weights for all spans together, of which each layer keeps at least
        one: then as many of the highest mean scores are kept as come nearest to it.
      last: as there.
      magnitude: as there.
      parts: the layers' parts.

    Returns:
      A boolean mask for each layer, and the thresholds.
    """
    if not parts:
        return selection.select(scores, keep, last, magnitude=magnitude)
    if magnitude:
        scores = [jnp.abs(s) for s in scores]
    if isinstance(parts[0], Blocks):
        masks = [p.select(s, n) for p, s, n in zip(parts, scores, keep, strict=True)]
        return masks, jnp.zeros((1, len(masks)), jnp.uint32)
    groups = [part.scores(s) for part, s in zip(parts, scores, strict=True)]
    if isinstance(keep, list):
        masks, found = selection.select(groups, keep, last, magnitude=magnitude)
    else:
        ones = [jnp.ones(part.copies, jnp.uint32) for part in parts]
        firsts, _ = selection.select(groups, ones, magnitude=magnitude)
        triples = zip(parts, groups, firsts, strict=True)
        groups = [jnp.where(first | part.is_whole, jnp.inf, g) for part, g, first in triples]
        sizes = [part.size for part in parts]
        masks, found = selection.select(groups, keep, last, magnitude=magnitude, sizes=sizes)
    pairs = zip(masks, scores, strict=True)
    return [jnp.broadcast_to(mask, s.shape) for mask, s in pairs], found


def together(arrays: Sequence[Array], parts: Parts) -> list[Array]:
    """The layers' arrays with the mean of its group at each weight."""
    if not parts:
        return list(arrays)
    pairs = zip(parts, arrays, strict=True)
    return [part.together(x) if isinstance(part, Span) else x for part, x in pairs]


def drawn_together(arrays: Sequence[Array], parts: Parts) -> list[Array]:
    """As `together`, of independent numbers, whose deviation the means keep."""
    pairs = zip(parts, together(arrays, parts), strict=True)
    return [x * math.sqrt(part.size) if isinstance(part, Span) else x for part, x in pairs]
