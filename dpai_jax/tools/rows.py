"""Many small arrays in one row, so that an operation on all of them is compiled once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.tools.meshes import Program, layer_shardings
from dpai_jax.tools.powers import SMALL, scaling
from dpai_jax.tools.sums import digits_of, from_digits, sum_over, totals

T = TypeVar("T")

_MOST_MEMBERS = 2**22


class Row:
    """A row of blocks of equal length. Each is a part of one array; the last is padded.

    Args:
      sizes: the numbers of entries of the arrays.

    Attributes:
      sizes: the numbers of entries of the arrays.
      length: of a block.
      array: for each block the number of its array.
      first: for each block the index of its first entry in the array.
      is_padding: which entries of the blocks are no array's, (block, length).
    """

    def __init__(self, sizes: Sequence[int]):
        self.sizes = tuple(sizes)
        # Short, so that little of the row is padding.
        shortest = max(float(np.mean(sizes)) / 16, 1)
        self.length = int(2 ** np.clip(np.floor(np.log2(shortest)), 4, 10))
        n_blocks = [-(-size // self.length) for size in sizes]
        self.array = np.repeat(np.arange(len(sizes)), n_blocks)
        self.first = np.concatenate([np.arange(n) * self.length for n in n_blocks])
        ends = np.asarray(sizes)[self.array] - self.first
        self.is_padding = np.arange(self.length) >= ends[:, None]
        # Which blocks belong to which array. With very many arrays this table would be too large.
        self._members = None
        if len(self.array) * len(sizes) <= _MOST_MEMBERS:
            self._members = self.array == np.arange(len(sizes))[:, None]

    def blocks(self, arrays: Sequence[Array], padding: float | int) -> Array:
        """The arrays' entries, in C order, (block, length)."""
        flat = []
        for array in arrays:
            rest = -array.size % self.length
            flat.append(lax.pad(array.ravel(), jnp.asarray(padding, array.dtype), [(0, rest, 0)]))
        return jnp.concatenate(flat).reshape(-1, self.length)

    def arrays(self, blocks: Array) -> list[Array]:
        """The inverse of `blocks`, which may be flat: the arrays, flat."""
        row, ends = blocks.ravel(), np.cumsum(np.bincount(self.array, minlength=len(self.sizes)))
        pairs = zip([0, *(ends[:-1] * self.length)], self.sizes, strict=True)
        return [row[start : start + size] for start, size in pairs]

    def spread(self, numbers: Array) -> Array:
        """Numbers of the arrays, (..., array), repeated for their blocks, (..., block, 1)."""
        return numbers[..., self.array, None]

    def sums(self, terms: Sequence[Array]) -> list[Array]:
        """Sums of integers (block, length) over the entries of each array, (array,)."""
        terms = [x.astype(jnp.uint32) if x.dtype == bool else x for x in terms]
        of_blocks = jnp.stack([x.ravel() for x in totals(terms, (1,))])
        if self._members is None:
            sums = jax.ops.segment_sum(of_blocks.T, self.array, len(self.sizes), True).T
        else:
            own = jnp.where(self._members[None], of_blocks[:, None], 0)
            sums = jnp.sum(own, -1, dtype=of_blocks.dtype)
        return list(sums)

    def largest(self, blocks: Array) -> Array:
        """The largest entry of each array, (array,); no entry may be below zero."""
        of_blocks = lax.bitcast_convert_type(blocks, jnp.int32)
        most = jnp.max(of_blocks, 1)
        if self._members is None:
            found = jax.ops.segment_max(most, self.array, len(self.sizes), True)
        else:
            found = jnp.max(jnp.where(self._members, most[None], 0), 1)
        return lax.bitcast_convert_type(found, jnp.float32)


class Copies:
    """Arrays in one row, of which each copy is an array of its own.

    Args:
      shapes: the arrays' shapes.
      stacks: for each array the axes along which copies are stacked.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], stacks: Sequence[tuple[int, ...]]):
        self._shapes, self._orders, self._stacked = shapes, [], []
        for shape, stack in zip(shapes, stacks, strict=True):
            self._orders.append((*stack, *(i for i in range(len(shape)) if i not in stack)))
            self._stacked.append([n if i in stack else 1 for i, n in enumerate(shape)])
        self._numbers = [math.prod(sizes) for sizes in self._stacked]
        pairs = list(zip(shapes, self._numbers, strict=True))
        self.row = Row([math.prod(shape) // n for shape, n in pairs for _ in range(n)])

    def blocks(self, arrays: Sequence[Array]) -> Array:
        """The arrays' entries, (block, length); zeros where there is none."""
        copies: list[Array] = []
        for array, order, n in zip(arrays, self._orders, self._numbers, strict=True):
            copies += list(array.transpose(order).reshape(n, -1)) if n > 1 else [array]
        return self.row.blocks(copies, 0)

    def arrays(self, blocks: Array) -> list[Array]:
        """The inverse of `blocks`."""
        copies, found = iter(self.row.arrays(blocks)), []
        for shape, order, n in zip(self._shapes, self._orders, self._numbers, strict=True):
            own = [next(copies) for _ in range(n)]
            array = (jnp.stack(own) if n > 1 else own[0]).reshape([shape[i] for i in order])
            found.append(array.transpose(np.argsort(order)))
        return found

    def numbers(self, row: Array) -> list[Array]:
        """Numbers of the copies, (copy,), for each array, to broadcast to it."""
        ends = np.cumsum(self._numbers)
        pairs = zip([0, *ends], ends, self._stacked, self._orders, strict=False)
        return [
            row[start:end].reshape([sizes[i] for i in order]).transpose(np.argsort(order))
            for start, end, sizes, order in pairs
        ]


def are_small(layers: Sequence[Array]) -> list[bool]:
    """Which layers can go into a row: small ones on one device."""
    pairs = zip(layers, layer_shardings(layers), strict=True)
    return [x.size <= SMALL and sharding is None for x, sharding in pairs]


class Group(NamedTuple):
    """Layers that share one program.

    Attributes:
      owner: who keeps the program; None if all layers of one shape share it, whoever owns them.
      places: the layers' indices among all layers.
    """

    owner: Any
    places: list[int]

    def of(self, values: Sequence[T]) -> list[T]:
        """Picks the values of its layers from those of all layers."""
        return [values[i] for i in self.places]


def groups_of(owner: Any, layers: Sequence[Array]) -> list[Group]:
    """Groups layers that share one program, for work without exchange between layers.

    Small layers form one group, as they fit into a row. Each other layer is alone, and shares its
    program with all layers of its shape. On a mesh all layers form one group.

    Args:
      owner: who keeps the program of a group of several layers.
      layers: an array for each layer, or its shape.

    Returns:
      The groups.
    """
    if any(layer_shardings(layers)):
        return [Group(owner, list(range(len(layers))))]
    flags = are_small(layers)
    small = [i for i, is_in in enumerate(flags) if is_in]
    others = [Group(None, [i]) for i, is_in in enumerate(flags) if not is_in]
    return [Group(owner, small), *others] if small else others


def in_order(groups: Sequence[Group], found: Sequence[Sequence[T]]) -> list[T]:
    """Results for the layers of each group, put in the order of the layers."""
    pairs = zip(groups, found, strict=True)
    by_place = {i: x for group, own in pairs for i, x in zip(group.places, own, strict=True)}
    return [by_place[i] for i in range(len(by_place))]


def by_groups(program: Program, owner: Any, *values: Sequence[Any], **settings: Any) -> list[Any]:
    """Runs a program on each group of layers.

    Args:
      program: takes the values of a group's layers, and returns one result for each layer.
      owner: see `groups_of`.
      values: lists with one array for each layer.
      settings: the program's settings.

    Returns:
      The results, in the order of the layers.
    """
    groups = groups_of(owner, values[0])
    found = [program(group.owner, *map(group.of, values), **settings) for group in groups]
    return in_order(groups, found)


def ahead_by_groups(
    program: Program, owner: Any, *values: Sequence[Any], calls: int = 1, **settings: Any
) -> None:
    """Starts to compile what `by_groups` runs for arrays of these shapes, so often."""
    for group in groups_of(owner, values[0]):
        program.ahead(group.owner, *map(group.of, values), calls=calls, **settings)


def sums_of(
    arrays: Sequence[Array], in_row: Sequence[bool], largest: int | None = None
) -> list[Array]:
    """The sum of each of several float32 arrays, none of whose entries is below zero.

    Args:
      arrays: the arrays.
      in_row: which of them may lie in one row.
      largest: the size of the largest array in the row, if the row is a part of one: the sums are
        those of the whole row.

    Returns:
      Scalars, which do not depend on the order of the terms.
    """
    small = [x for x, is_in in zip(arrays, in_row, strict=True) if is_in]
    sums = iter(_sums_in_row(small, largest) if small else [])
    return [
        next(sums) if is_in else sum_over(x, tuple(range(x.ndim))).reshape(())
        for x, is_in in zip(arrays, in_row, strict=True)
    ]


def counts_of(
    arrays: Sequence[Array],
    in_row: Sequence[bool],
    test: Callable[[Array], Array] = lambda flags: flags,
) -> Array:
    """The number of entries that pass a test in each of several arrays, uint32 (array,).

    Args:
      arrays: the arrays.
      in_row: which of them may lie in one row.
      test: from arrays to flags, entry by entry; zero does not pass. Then the arrays are floats.

    Returns:
      The numbers.
    """
    pairs = list(zip(arrays, in_row, strict=True))
    small = [x for x, is_in in pairs if is_in]
    counts = [_count(test(x))[None] for x, is_in in pairs if not is_in]
    if small:
        row = Row([x.size for x in small])
        # Tested in the row: before, each shape would have a kernel of its own.
        counts += row.sums([test(row.blocks(small, 0))])
    order = np.argsort(np.argsort(in_row, kind="stable"), kind="stable")
    row_of_counts = jnp.concatenate(counts)
    return row_of_counts[order] if np.any(np.diff(order) != 1) else row_of_counts


def _count(flags: Array) -> Array:
    # The false entries are counted only to make a reduction of two operands (see `totals`).
    found, others = totals([flags, ~flags], (flags.ndim - 1,))
    return jnp.sum(jnp.where(others < flags.shape[-1], found, 0), dtype=jnp.uint32)


def _sums_in_row(arrays: Sequence[Array], largest: int | None) -> list[Array]:
    row = Row([x.size for x in arrays])
    blocks = row.blocks(arrays, 0.0)
    scale, inverse, _ = scaling(row.largest(blocks))
    n_terms = max(x.size for x in arrays) if largest is None else largest
    digits, digit = digits_of(blocks * row.spread(inverse), n_terms)
    return list(from_digits(row.sums(digits), digit) * scale)
