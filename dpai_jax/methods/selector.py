"""Selection of the highest scores again and again, as they change from step to step."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import grouping
from dpai_jax.paths import Network
from dpai_jax.searching import PROBES, line_length, search
from dpai_jax.selection import (
    Cut,
    cut_at,
    cut_of,
    kept,
    kept_by_numpy,
    no_thresholds,
    ranks_of_magnitudes,
    select_by_numpy,
)
from dpai_jax.tools import meshes
from dpai_jax.tools.rows import Group, ahead_by_groups, by_groups, groups_of, in_order
from dpai_jax.tools.sums import totals

# Networks of so many weights are searched by the host. Smaller ones NumPy searches at first, and a
# single program afterwards.
_LARGE = 2**23

# The passes of a search, as far as what compiles ahead needs to know.
_PASSES = 2


class Selector:
    """Line 5 of Algorithm 1: selects the weights of the highest magnitudes, again and again.

    Args:
      net: the traced network.
      scores: the layers' scores, or their shapes.
      keep: numbers to keep, of the structure of all that come.
      parts: which weights stand or fall together.
    """

    def __init__(
        self,
        net: Network,
        scores: list[Any],
        keep: list[Array] | Array,
        parts: grouping.Parts = (),
    ):
        self.net = net
        # One threshold for all layers is found in all of them.
        everything = [Group(net, list(range(len(scores))))]
        self._groups = groups_of(net, scores) if isinstance(keep, list) else everything
        self._parts = [tuple(g.of(parts)) if parts else () for g in self._groups]
        self._thresholds = [jnp.asarray(no_thresholds(_size(each))) for each in self._numbers(keep)]

    def compile_ahead(self, scores: list[Any], keep: Any, calls: int) -> None:
        """Starts to compile the selection, which is called so often."""
        each = zip(self._groups, self._numbers(keep), self._thresholds, self._parts, strict=True)
        for group, *args, own in each:
            _select.ahead(group.owner, group.of(scores), *args, calls=calls, parts=own)

    def _numbers(self, keep: Any) -> list[Any]:
        return [g.of(keep) if isinstance(keep, list) else keep for g in self._groups]

    def masks(self, scores: list[Array], keep: Any) -> list[Array]:
        """The masks of the scores."""
        found = []
        for i, (group, numbers) in enumerate(zip(self._groups, self._numbers(keep), strict=True)):
            masks, self._thresholds[i] = _select(
                group.owner,
                group.of(scores),
                numbers,
                self._thresholds[i],
                parts=self._parts[i],
            )
            found.append(masks)
        return in_order(self._groups, found)

    def weighed(
        self, before: list[Array], strengths: list[Array], scores: list[Array], keep: Any
    ) -> list[Array]:
        """The strengths of the weights that are kept, zero for the others.

        New memory takes a CPU about as long as all that is done with it, so they are written where
        others were.

        Args:
          before: float32 arrays like the strengths, whose memory is lent to the results.
          strengths: float32 arrays like the scores.
          scores: the layers' scores.
          keep: the numbers to keep.

        Returns:
          The strengths.
        """
        return by_groups(_weighed, self.net, before, strengths, self.masks(scores, keep))

    def weigh_ahead(self, scores: list[Any], calls: int) -> None:
        """Starts to compile what `weighed` needs besides masks."""
        masks = meshes.shapes_like(scores, bool)
        ahead_by_groups(_weighed, self.net, scores, scores, masks, calls=calls)


class LargeSelector:
    """A `Selector` by one threshold in a large network on one CPU.

    XLA takes long to compile a search that reads so many layers. Here the host searches, and a
    program counts for each few layers, such as those of a block. No masks are written but the last.

    Args:
      net: the traced network.
    """

    def __init__(self, net: Network):
        self.net, self._chunks = net, _chunks(net)
        firsts = _firsts(net)
        # Numbers by themselves, so that XLA compiles one kernel for layers of one shape.
        self._firsts = [list(map(np.uint32, chunk.of(firsts))) for chunk in self._chunks]

    @staticmethod
    def serves(net: Network, scores: list[Any], keep: Any, parts: grouping.Parts) -> bool:
        """Whether it is for such scores and numbers to keep."""
        on_cpu = jax.default_backend() == "cpu" and not any(meshes.layer_shardings(scores))
        return _is_one_number(keep, parts) and on_cpu and _LARGE <= net.size < 2**32

    def compile_ahead(self, scores: list[Any], keep: Any, calls: int) -> None:
        """See `Selector.compile_ahead`."""
        del keep
        probes = np.zeros(PROBES, np.int32)
        for chunk in self._chunks:
            _count.ahead(chunk.owner, chunk.of(scores), probes, calls=calls * _PASSES)

    def weigh_ahead(self, scores: list[Any], calls: int) -> None:
        """See `Selector.weigh_ahead`."""
        cut = cut_at(0)
        for chunk, firsts in zip(self._chunks, self._firsts, strict=True):
            own = chunk.of(scores)
            _weighed_by_cut.ahead(chunk.owner, own, own, own, firsts, cut, calls=calls)

    def masks(self, scores: list[Array], keep: Any) -> list[Array]:
        """See `Selector.masks`."""
        cut, arrays = self._searched(scores, keep), list(map(np.asarray, scores))
        masks: list[Array] = jax.device_put(kept_by_numpy(arrays, _firsts(self.net), cut))
        return masks

    def weighed(
        self, before: list[Array], strengths: list[Array], scores: list[Array], keep: Any
    ) -> list[Array]:
        """See `Selector.weighed`."""
        cut, found = self._searched(scores, keep), []
        for chunk, firsts in zip(self._chunks, self._firsts, strict=True):
            arrays = (chunk.of(x) for x in (before, strengths, scores))
            found.append(_weighed_by_cut(chunk.owner, *arrays, firsts, cut))
        return in_order(self._chunks, found)

    def _searched(self, scores: list[Array], keep: Any) -> Cut:
        def count(probes: np.ndarray) -> np.ndarray:
            found = [_count(chunk.owner, chunk.of(scores), probes) for chunk in self._chunks]
            return np.concatenate(in_order(self._chunks, jax.device_get(found)), 1)

        return search(list(map(np.asarray, scores)), int(keep), count)


class Selected(NamedTuple):
    """What is kept of several problems side by side, on one device or shared out.

    Attributes:
      found: the masks, or where each problem's scores are cut (see `masks_of`).
      thresholds: the last two, (problem, 2, number to keep).
    """

    found: list[Array] | Cut
    thresholds: Array


def nothing_selected(number: int, keep: Any, parts: grouping.Parts) -> Selected:
    """What comes before a first selection.

    Args:
      number: how many problems there are.
      keep: numbers to keep, stacked, of the structure of all that come.
      parts: which weights stand or fall together.

    Returns:
      All scores, if one number is to be kept of each problem; otherwise no masks.
    """
    one = _is_one_number(keep, parts)
    found: Any = cut_at(0) if one else [], no_thresholds(_size(keep) // number)
    return Selected(*jax.tree.map(lambda x: np.tile(x, (number, 1, 1)), found))


@meshes.program()
def select_many(
    net: Network, scores: list[Array], keep: Any, last: Selected, *, parts: grouping.Parts
) -> Selected:
    """Selects the weights of the highest magnitudes of each problem.

    Args:
      net: the traced network.
      scores: the layers' scores, stacked.
      keep: numbers to keep, stacked.
      last: what was selected before.
      parts: which weights stand or fall together.

    Returns:
      What is kept.
    """
    if _is_one_number(keep, parts):
        cut: Cut = meshes.in_turn(cut_of, scores, keep, last.thresholds)
        thresholds = jnp.concatenate([last.thresholds[:, 1:], cut.thresholds], 1)
        return Selected(cut, thresholds)
    select = functools.partial(_select.fn, net, parts=parts)
    return Selected(*meshes.in_turn(select, scores, keep, last.thresholds))


@meshes.program()
def masks_of_many(net: Network, scores: list[Array], found: Cut) -> list[Array]:
    """The masks of several problems, stacked."""
    masks: list[Array] = jax.vmap(functools.partial(masks_of, net))(scores, found)
    return masks


def masks_of(net: Network, scores: list[Array], found: list[Array] | Cut) -> list[Array]:
    """The masks of one problem, of what `select_many` has found."""
    if not isinstance(found, Cut):
        return found
    return kept(scores, _firsts(net), found)


def _firsts(net: Network) -> list[int]:
    """For each layer, how many weights come before its own."""
    return [0, *itertools.accumulate(layer.size for layer in net.layers)][:-1]


def _is_one_number(keep: Any, parts: grouping.Parts) -> bool:
    """Whether one number of single weights is to be kept, of all layers together."""
    return not isinstance(keep, list) and not parts


def _size(keep: Any) -> int:
    """The number of numbers to keep."""
    return sum(map(np.size, jax.tree.leaves(keep)))


def _chunks(net: Network) -> list[Group]:
    """Layers that share a program: those of each block of a network that repeats one, and the rest.

    Blocks have as many layers of each shape, and their number leaves the fewest layers to compile.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, layer in enumerate(net.layers):
        alike.setdefault(layer.shape, []).append(i)

    def repeated(number: int) -> list[list[int]]:
        return [places for places in alike.values() if len(places) % number == 0]

    def saved(number: int) -> float:
        return sum(map(len, repeated(number))) * (1 - 1 / number)

    number = max({len(places) for places in alike.values()}, key=saved)
    blocks = [np.array_split(places, number) for places in repeated(number)]
    chunks = [np.concatenate(own).tolist() for own in zip(*blocks, strict=True)]
    rest = [i for places in alike.values() if len(places) % number for i in places]
    return [Group(None, places) for places in [*chunks, rest] if places]


@meshes.program()
def _count(_: Network | None, scores: list[Array], probes: Array) -> list[Array]:
    """How many scores of each line reach each probe, (probe, line) for each layer."""
    counts = []
    for x in scores:
        ranks = ranks_of_magnitudes(x).reshape(-1, line_length(x.shape))
        counts.append(jnp.stack([n[:, 0] for n in totals([ranks >= p for p in probes], (1,))]))
    return counts


@meshes.program(donate=(0,))
def _weighed_by_cut(
    _: Network | None,
    memory: list[Array],
    strengths: list[Array],
    scores: list[Array],
    before: list[Array],
    cut: Cut,
) -> list[Array]:
    found: list[Array] = _weighed.fn(None, memory, strengths, kept(scores, before, cut))
    return found


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
