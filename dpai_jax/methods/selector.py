"""Selection of the highest scores again and again, as they change from step to step."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import grouping
from dpai_jax.paths import Network
from dpai_jax.selection import select_by_numpy
from dpai_jax.tools import meshes
from dpai_jax.tools.rows import Group, by_groups, groups_of, in_order


class Selector:
    """Line 5 of Algorithm 1: selects the weights of the highest magnitudes, again and again.

    Args:
      net: the traced network.
      scores: the layers' scores, or their shapes.
      keep: numbers to keep, of the structure of all that come.
      parts: which weights stand or fall together.
      many: the number of problems side by side, if there are several.
    """

    def __init__(
        self,
        net: Network,
        scores: list[Any],
        keep: list[Array] | Array,
        parts: grouping.Parts = (),
        many: tuple[int, ...] = (),
    ):
        self.many = many
        # One threshold for all layers is found in all of them.
        together = many or not isinstance(keep, list)
        everything = [Group(net, list(range(len(scores))))]
        self._groups = everything if together else groups_of(net, scores)
        self._parts = [tuple(g.of(parts)) if parts else () for g in self._groups]
        numbers = self._numbers(keep)
        sizes = [sum(map(np.size, jax.tree.leaves(each))) for each in numbers]
        self._thresholds = [
            jnp.zeros((*many, 2, size // math.prod(many)), jnp.uint32) for size in sizes
        ]

    def compile_ahead(self, scores: list[Any], keep: Any, calls: int) -> None:
        """Starts to compile the selection, which is called so often, of a single problem."""
        each = zip(self._groups, self._numbers(keep), self._thresholds, self._parts, strict=True)
        for group, *args, own in each:
            _select.ahead(group.owner, group.of(scores), *args, calls=calls, parts=own)

    def _numbers(self, keep: Any) -> list[Any]:
        return [g.of(keep) if isinstance(keep, list) else keep for g in self._groups]

    def masks(self, scores: list[Array], keep: Any) -> list[Array]:
        """The masks of the scores."""
        select, found = _select_many if self.many else _select, []
        for i, (group, numbers) in enumerate(zip(self._groups, self._numbers(keep), strict=True)):
            masks, self._thresholds[i] = select(
                group.owner,
                group.of(scores),
                numbers,
                self._thresholds[i],
                parts=self._parts[i],
            )
            found.append(masks)
        return in_order(self._groups, found)


class Weigher:
    """The strengths of the weights that masks keep, zero for the others, again and again.

    They are written where those of the masks before were, as new memory takes a CPU about as long
    as all that is done with it.

    Args:
      net: the traced network.
      strengths: a float32 array for each layer.
    """

    def __init__(self, net: Network, strengths: list[Array]):
        self.net, self.strengths = net, strengths
        self._found = list(map(jnp.copy, strengths))

    def __call__(self, masks: list[Array]) -> list[Array]:
        """The strengths under masks; they are there until the next call."""
        self._found = by_groups(_weighed, self.net, self._found, self.strengths, masks)
        return self._found

    @staticmethod
    def compile_ahead(net: Network, shapes: list[Any], masks: list[Any], calls: int) -> None:
        """Starts to compile what is called so often, for strengths and masks of these shapes."""
        for group in groups_of(net, shapes):
            own = group.of(shapes)
            _weighed.ahead(group.owner, own, own, group.of(masks), calls=calls)


@meshes.program(
    like=lambda before, *_: before,
    layers=lambda before, *_: before,
    donate=(0,),
    by_numpy="exactly",
)
def _weighed(
    _: Network | None, before: list[Array], strengths: list[Array], masks: list[Array]
) -> list[Array]:
    del before  # lends its memory
    return [jnp.where(m, s, 0.0) for m, s in zip(masks, strengths, strict=True)]


@meshes.program(
    like=lambda scores, *_: (scores, None),
    layers=lambda scores, *_: scores,
    by_numpy=lambda parts=(): "exactly" if parts else _select_by_numpy,
)
def _select(
    _: Network | None,
    scores: list[Array],
    keep: list[Array] | Array,
    thresholds: Array,
    *,
    parts: grouping.Parts = (),
) -> tuple[list[Array], Array]:
    """The masks of the scores, and the last two thresholds."""
    masks, found = grouping.select(scores, keep, thresholds, magnitude=True, parts=parts)
    return masks, jnp.concatenate([thresholds[1:], found])


def _select_by_numpy(
    scores: list[np.ndarray], keep: Any, thresholds: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    masks, found = select_by_numpy(scores, keep, magnitude=True)
    return masks, np.concatenate([thresholds[1:], found])


@meshes.program()
def _select_many(
    net: Network | None,
    scores: list[Array],
    keep: list[Array] | Array,
    thresholds: Array,
    *,
    parts: grouping.Parts = (),
) -> Any:
    select = functools.partial(_select.fn, net, parts=parts)
    return meshes.in_turn(select, scores, keep, thresholds)
