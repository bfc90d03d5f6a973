"""Values of which only a block is computed; all else of them is frozen numbers or not wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.compacting.facts import Fact, Kept, Shape, block, indices, within
from dpai_jax.compacting.program import Step


@dataclasses.dataclass(frozen=True)
class Cut:
    """A value cut to a block.

    Attributes:
      fact: what is known of the whole.
      dtype: its dtype.
      kept: the indices of the block along each axis; None if there is no block.
      array: the block.
      numbers: gives the frozen entries, zeros elsewhere; size one along axes on which all are
        equal. Called only where some entry is not zero.
      folded: what was computed from frozen entries alone, by operation; None before they are known.
    """

    fact: Fact
    dtype: Any
    kept: Kept | None
    array: Any
    numbers: Callable[[], Any]
    folded: dict[int, Any] | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the whole."""
        return self.fact.shape

    @property
    def own(self) -> Kept:
        """The indices of the block; none at all along each axis without a block."""
        return self.kept or tuple(np.zeros(0, int) for _ in self.shape)

    def at(self, target: Kept) -> Any:
        """The entries at these indices: from the block, or frozen, or zero if not wanted."""
        if self.kept is None:
            return self.frozen_at(target)
        array, inside = self.array, np.ones((1,) * len(self.shape), bool)
        for axis, (have, want) in enumerate(zip(self.kept, target, strict=True)):
            if have is None:
                array = array if want is None else take(array, axis, want)
                continue
            wanted = indices(want, self.shape[axis])
            places = np.full(self.shape[axis], -1)
            places[have] = np.arange(len(have))
            places = places[wanted]
            array = take(array, axis, places)
            inside = inside & (places >= 0).reshape(
                [-1 if i == axis else 1 for i in range(len(self.shape))]
            )
        if inside.all() or not np.any(within(self._frozen, target) & ~inside):
            return array
        return jnp.where(inside, array, self.frozen_at(target))

    def frozen_at(self, target: Kept) -> Array:
        """The frozen entries at these indices, zeros elsewhere."""
        sizes = [n if k is None else len(k) for n, k in zip(self.shape, target, strict=True)]
        if not np.any(within(self._frozen, target)):
            return jnp.zeros(sizes, self.dtype)
        return jnp.broadcast_to(within(self.numbers(), target), sizes)

    def frozen_outside(self, kept: Kept) -> np.ndarray:
        """Where there are frozen entries other than zero, outside of a block."""
        outside: np.ndarray = self._frozen & ~block(kept, self.shape)
        return outside

    def frozen_part(self, where: np.ndarray, target: Kept, *full: int) -> np.ndarray:
        """The frozen entries that are flagged, zeros elsewhere, with these axes written out."""
        x = np.where(
            within(where, target), within(self.numbers(), target), np.zeros((), self.dtype)
        )
        each = enumerate(zip(self.shape, target, strict=True))
        sizes = [n if k is None else len(k) for _, (n, k) in each]
        return np.broadcast_to(x, [n if i in full else x.shape[i] for i, n in enumerate(sizes)])

    @property
    def _frozen(self) -> np.ndarray:
        frozen: np.ndarray = self.fact.filled & ~self.fact.live
        return frozen


def fold(step: Step, operands: Sequence[Cut], compute: Callable[[], Any]) -> Any:
    """What an operation makes of frozen entries alone: a number, computed once and for all."""
    found = operands[0].folded
    if found is None:
        # Nothing is known yet; asking for the frozen entries says that they are needed.
        for x in operands:
            x.numbers()
        return np.zeros((), operands[0].dtype)
    if step.results[0] not in found:
        with jax.ensure_compile_time_eval():
            found[step.results[0]] = np.asarray(compute())
    return found[step.results[0]]


def take(array: Any, axis: int, places: np.ndarray) -> Any:
    """The entries at these places along an axis, zeros where a place is negative."""
    size = array.shape[axis]
    if len(places) == size and np.array_equal(places, np.arange(size)):
        return array
    if len(places) and places[0] >= 0 and np.all(np.diff(places) == 1):
        return lax.slice_in_dim(array, int(places[0]), int(places[-1]) + 1, axis=axis)
    if np.all(places >= 0):
        return jnp.take(array, places, axis, unique_indices=len(set(places)) == len(places))
    return jnp.take(array, np.where(places < 0, size, places), axis, mode="fill", fill_value=0)


def narrow(array: Any, have: Kept, want: Kept, shape: Shape) -> Any:
    """A block at fewer indices."""
    for axis, (old, new) in enumerate(zip(have, want, strict=True)):
        if old is None and new is None:
            continue
        old, new = indices(old, shape[axis]), indices(new, shape[axis])
        array = take(array, axis, np.searchsorted(old, new))
    return array
