"""Repair: moves kept weights that lie on no path to places on a path."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks
from dpai_jax.counts import reached
from dpai_jax.paths import Network
from dpai_jax.tools.meshes import device_put_like, on_host
from dpai_jax.tools.random import numpy_generator
from dpai_jax.tools.switches import usual_switches

PyTree = Any

# How often to try for a new path through each layer: first by score, then in random order.
_TRIES = 32

# Of how many masks to remember what is reached.
_KNOWN = 8

# How fast a search for one of the first items goes on to later ones.
_STRIDE = 8


@usual_switches()
def repair(net: Network, masks: PyTree, scores: PyTree = None, key: Array | None = None) -> PyTree:
    """Moves the kept weights that no path passes, within their layers, to where one does.

    A kept weight that lies on no path from the input to the output is wasted. Such weights are
    dropped, and as many are put back in the same layer:

    1. where one weight by itself is effective at once, ∂ log R_P/∂m > 0, those of the highest
       scores first; again and again, as each of them opens places in other layers;
    2. where no such place is left, along new paths: as few new weights as complete one, for which
       a layer that has none to spare gives up a weight that the others can do without.

    Weights that cannot be placed stay where they were, kept and ineffective; `topology` tells how
    many. So each layer keeps as many weights as before, and no fewer are effective in any of them.
    New paths are a search, which may miss what is possible where a kernel is applied repeatedly, as
    in recurrent networks, and keeps very few weights.
    Masks without ineffective weights come back as they are.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
      >>> net = dpai.trace(fn, params, jnp.ones((1, 2)))
      >>> hidden = jnp.array([[True, True, False], [False, False, False]])
      >>> masks = {"hidden": hidden, "out": jnp.array([[True], [False], [False]])}
      >>> dpai.repair(net, masks)["hidden"].tolist()
      [[True, False, False], [True, False, False]]

    Args:
      net: the traced network.
      masks: pytree parallel to the parameters: booleans, or zeros and ones.
      scores: pytree of scores parallel to the parameters: of two places that would do, the one of
        the higher score is taken, and by chance if they are equal. For scores whose magnitude
        counts, as those of `DPaI`, pass their absolute values. Without scores places are drawn.
      key: random key; `jax.random.key(0)` if not given. The same key gives the same masks.

    Returns:
      Pytree of boolean masks like `masks`.

    Raises:
      ValueError: if the tree or the shapes of masks or scores are not those of the network, or a
        score is NaN.
    """
    kept = checks.masks(net, masks)
    ranks = None if scores is None else checks.scores(net, scores)
    repaired = repaired_layers(net, kept, ranks, checks.key(key))
    return net.tree(device_put_like(repaired, kept), lambda: jnp.ones((), bool))


def repaired_layers(
    net: Network, masks: list[Array], scores: list[Array] | None, key: Array
) -> list[np.ndarray]:
    """`repair` for lists over the layers; runs on the host."""
    kept = net.ravel(list(map(on_host, masks)))
    ranks = np.zeros(net.size, np.float32)
    if scores is not None:
        ranks = net.ravel([on_host(s).astype(np.float32) for s in scores])
    work = _Repair(net, kept, ranks, numpy_generator(key))
    live = work.filled(kept & work.reached(kept))
    while not work.is_full(live) and (longer := work.lengthened(live)) is not None:
        live = work.filled(longer)
    return net.unravel(work.topped_up(live, kept))


class _Repair:
    """One repair in progress.

    A mask is a NumPy array, one row of all weights; a weight is an index into it. Each layer, and
    each copy of a layer in a stacked kernel, is a *slot*: a range of the row, with its own number
    of weights to keep.

    Attributes:
      slots: the ranges.
      counts: the number of weights to keep in each slot.
      scores: the scores of the weights.
      noise: random numbers that break ties between scores.
      between: for a slot, the other slots that the last new path through it passed.
    """

    def __init__(
        self, net: Network, kept: np.ndarray, scores: np.ndarray, rng: np.random.Generator
    ):
        self.net, self.scores, self.rng = net, scores, rng
        sizes = [layer.size // layer.copies for layer in net.layers for _ in range(layer.copies)]
        ends = list(itertools.accumulate(sizes))
        self.slots = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.counts = self.used(kept)
        self.noise = rng.random(kept.size, np.float32)
        self.between: dict[int, list[int]] = {}
        self._remembered = functools.lru_cache(_KNOWN)(self._reached)

    def used(self, masks: np.ndarray) -> np.ndarray:
        """The number of weights kept in each slot."""
        return np.array([np.count_nonzero(masks[slot]) for slot in self.slots])

    def is_full(self, masks: np.ndarray) -> bool:
        """Whether every slot has its number of weights."""
        return np.array_equal(self.used(masks), self.counts)

    def reached(self, masks: np.ndarray) -> np.ndarray:
        """Which weights are on a path, or would be if they were kept."""
        return self._remembered(np.packbits(masks).tobytes())

    def _reached(self, bits: bytes) -> np.ndarray:
        """The same of packed masks."""
        masks = np.unpackbits(np.frombuffer(bits, np.uint8), count=self.net.size).view(bool)
        return self.net.ravel(jax.device_get(reached(self.net, self.net.unravel(masks))))

    def opened(self, masks: np.ndarray, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """The masks with every weight of some slots added."""
        wider = masks.copy()
        for i in slots:
            wider[self.slots[i]] = True
        return wider

    def within(self, slot: int, flags: np.ndarray) -> np.ndarray:
        """The flags of one slot; those of all others are false."""
        return self.opened(np.zeros_like(flags), [slot]) & flags

    def is_effective(self, masks: np.ndarray) -> bool:
        """Whether every kept weight is on a path."""
        return bool(np.all(self.reached(masks)[masks]))

    def ranked(self, weights: np.ndarray) -> np.ndarray:
        """The weights, those of the highest scores first."""
        return weights[np.lexsort((self.noise[weights], self.scores[weights]))[::-1]]

    @functools.cached_property
    def ranking(self) -> np.ndarray:
        """The place of each weight among all, those of the highest scores first."""
        order = self.ranked(np.arange(self.scores.size))
        places = np.empty_like(order)
        places[order] = np.arange(order.size)
        return places

    def topped_up(self, masks: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """The masks with each slot's missing weights added, the best of those allowed."""
        result = masks.copy()
        missing = self.counts - self.used(masks)
        for i in np.flatnonzero(missing):
            slot = self.slots[i]
            free = slot.start + np.flatnonzero(allowed[slot] & ~masks[slot])
            if free.size > missing[i]:
                # This avoids sorting all of a large layer.
                least = np.partition(self.scores[free], -missing[i])[-missing[i]]
                free = self.ranked(free[self.scores[free] >= least])
            result[free[: missing[i]]] = True
        return result

    def filled(self, masks: np.ndarray) -> np.ndarray:
        """The masks with weights added that are effective at once, while there are any.

        Each weight added in a round is effective by itself, so all are added together. The next
        round uses the places that they open in other layers.
        """
        while not self.is_full(masks):
            longer = self.topped_up(masks, self.reached(masks))
            if np.array_equal(longer, masks):
                break
            masks = longer
        return masks

    def lengthened(self, masks: np.ndarray) -> np.ndarray | None:
        """The masks with one or more new paths through a slot that lacks weights.

        None if no slot can spare the weights for one.
        """
        # So many searches follow that a program is worth compiling beside them.
        reached(self.net, self.net.unravel(masks), ahead=True)
        possible = self.possible & ~masks
        targets = np.flatnonzero((self.used(masks) < self.counts) & (self.used(possible) > 0))
        ranking = self.ranking
        # One path often opens places for all missing weights. If the last one did not, many are
        # looked for together, as one search for each missing weight would be slow.
        for target in sorted(self.between.keys() & set(targets.tolist())):
            longer = self._many_through(target, masks)
            if longer is not None:
                return longer
        for _ in range(_TRIES):
            for target in self.rng.permutation(targets).tolist():
                longer = self._through(target, masks, ranking)
                if longer is not None:
                    return longer
            ranking = self.rng.permutation(masks.size)
        return None

    def _through(self, target: int, masks: np.ndarray, ranking: np.ndarray) -> np.ndarray | None:
        """The masks with one new path, through a new weight of one slot."""

        def entries(slots: Sequence[int]) -> np.ndarray:
            return self.within(target, self.reached(self.opened(masks, slots)) & ~masks)

        # Slots that lack weights come first, the target itself last: a path can pass it twice if
        # its kernel is shared. Otherwise near ones, which most new paths pass.
        full = self.used(masks) == self.counts
        slots = self.rng.permutation(np.flatnonzero(self.counts))
        far = abs(slots - target) if ranking is self.ranking else np.zeros_like(slots)
        slots = slots[np.lexsort((far, full[slots], slots == target))]
        through = _needed(slots, lambda slots: bool(np.any(entries(slots))))
        entry = _ranked(entries(through), ranking)[0]
        if target not in through:
            self.between[target] = through
        longer = self._completed(entry, through, masks, ranking)
        return self._relieved(longer, masks, ranking)

    def _completed(
        self, entry: int, through: list[int], masks: np.ndarray, ranking: np.ndarray
    ) -> np.ndarray:
        """The masks with a path through a new weight, and no more weights of slots than needed."""
        longer = self.opened(masks, through)
        longer[entry] = True
        open_ = self.reached(longer)
        for i in through:
            longer[self.slots[i]] = masks[self.slots[i]]
            longer[entry] = False
            before = self.reached(longer)
            longer[entry] = True
            after = self.reached(longer)
            # What is on no path without the entry is on one through it.
            fresh = _ranked(self.within(i, after & ~before), ranking)
            new = fresh[:1].tolist()
            if not new:
                items = _ranked(self.within(i, open_ & ~longer), ranking)
                # Gates and depthwise kernels join features of equal numbers.
                is_likely = after[items] & self._have_equal_features(items, entry)
                items = np.concatenate([items[is_likely], items[~is_likely]])
                new = _needed(items, functools.partial(self._completes, entry, longer))
            longer[new] = True
        return longer

    def _completes(self, entry: int, masks: np.ndarray, weights: Sequence[int]) -> bool:
        """Whether a weight is on a path if others are added to the masks."""
        longer = masks.copy()
        longer[list(weights)] = True
        return bool(self.reached(longer)[entry])

    def _have_equal_features(self, weights: np.ndarray, weight: int) -> np.ndarray:
        """Which weights read or write a feature of a number that another weight reads or writes."""
        numbers = [of_weights[weight] for of_weights in self.features]
        return np.any([np.isin(of_weights[weights], numbers) for of_weights in self.features], 0)

    @functools.cached_property
    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """For each weight the number of the feature it reads, and of that it writes."""

        def numbers(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            _, groups, inputs, outputs, _ = weights.shape
            reads = np.arange(groups * inputs).reshape(groups, inputs, 1, 1)
            return reads, np.arange(groups * outputs).reshape(groups, 1, outputs, 1)

        return self._by_ends(numbers)

    def _many_through(self, target: int, masks: np.ndarray) -> np.ndarray | None:
        """The masks with paths through as many new weights of a slot as possible.

        All of them pass the slots that the last new path through this slot passed.
        """
        through = self.between.pop(target)
        places = self.within(target, self.reached(self.opened(masks, through)) & ~masks)
        entries = _ranked(places, self.ranking)
        number = min(entries.size, self.counts[target] - self.used(masks)[target])
        while number > 1:
            longer = self._joined(entries[:number], through, masks)
            if longer is not None:
                self.between[target] = through
                return longer
            number //= 4
        return None

    def _joined(
        self, entries: np.ndarray, through: list[int], masks: np.ndarray
    ) -> np.ndarray | None:
        """The masks with new weights of one slot, and few weights of others to complete paths."""
        before = self.reached(self.opened(masks, through))
        longer = self.opened(masks, through)
        longer[entries] = True
        for i in through:
            # The places that the entries open. The best one into each output is enough, or the
            # best one out of each input.
            fresh = _ranked(self.within(i, self.reached(longer) & ~before), self.ranking)
            longer[self.slots[i]] = masks[self.slots[i]]
            firsts = [np.unique(lines[fresh], return_index=True)[1] for lines in self.lines]
            for new in sorted((fresh[first] for first in firsts), key=len):
                longer[new] = True
                if np.all(self.reached(longer)[entries]):
                    break
                longer[new] = masks[new]
            else:
                return None
        return self._thinned(longer, masks)

    def _thinned(self, masks: np.ndarray, older: np.ndarray) -> np.ndarray | None:
        """As `_relieved`, but removes only weights whose input and output have others left."""
        numbers = [np.bincount(lines[masks], minlength=self.net.size) for lines in self.lines]
        excess = np.maximum(self.used(masks) - self.counts, 0)
        for i in np.flatnonzero(excess).tolist():
            for weight in _ranked(self.within(i, older), self.ranking)[::-1]:
                if excess[i] == 0:
                    break
                ends = [lines[weight] for lines in self.lines]
                if all(n[end] > 1 for n, end in zip(numbers, ends, strict=True)):
                    masks[weight] = False
                    excess[i] -= 1
                    for n, end in zip(numbers, ends, strict=True):
                        n[end] -= 1
        return None if np.any(excess) or not self.is_effective(masks) else masks

    @functools.cached_property
    def possible(self) -> np.ndarray:
        """What can be reached by any masks that keep weights in the same slots."""
        return self.reached(self.opened(np.zeros(self.net.size, bool), np.flatnonzero(self.counts)))

    @functools.cached_property
    def lines(self) -> tuple[np.ndarray, np.ndarray]:
        """For each weight the input and the output that it joins, as numbers."""
        # A line's number is the index of its first weight.
        return self._by_ends(lambda weights: (weights[:, :, :, :1, :1], weights[:, :, :1, :, :1]))

    def _by_ends(
        self, numbers: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each weight a number of its input, and one of its output.

        Args:
          numbers: gives both for a layer's weights, arranged as by `Layer.by_features`.

        Returns:
          Two rows of all weights.
        """
        inputs, outputs = np.empty((2, self.net.size), np.int64)
        places = self.net.unravel(np.arange(self.net.size))
        for layer, own in zip(self.net.layers, places, strict=True):
            weights = layer.by_features(own)
            inputs[weights], outputs[weights] = numbers(weights)
        return inputs, outputs

    def _relieved(
        self, masks: np.ndarray, older: np.ndarray, ranking: np.ndarray
    ) -> np.ndarray | None:
        """The masks with surplus older weights removed from each slot, all others effective.

        A weight that is needed now is needed after other weights go, so each is tried once.
        """
        if not self.is_effective(masks):
            return None
        excess = np.maximum(self.used(masks) - self.counts, 0)
        for i in np.flatnonzero(excess).tolist():
            for weight in _ranked(self.within(i, older), ranking)[::-1]:
                masks[weight] = False
                excess[i] -= 1
                if not self.is_effective(masks):
                    masks[weight] = True
                    excess[i] += 1
                elif excess[i] == 0:
                    break
        return None if np.any(excess) else masks


def _ranked(flags: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """The weights whose flag is set, in the order of their places in a ranking."""
    weights = np.flatnonzero(flags)
    return weights[np.argsort(ranking[weights])]


def _needed(items: np.ndarray, holds: Callable[[Sequence[int]], bool]) -> list[int]:
    """A set of items that meets a condition, and of which none can be left out.

    The condition must hold for all items together, and for any set that contains one for which it
    holds. Earlier items are preferred: the last item taken is as early as possible, and so on.
    """
    taken: list[int] = []
    end = len(items)
    while end and not holds(taken):
        low, high = 0, 1
        while high < end and not holds([*taken, *items[:high].tolist()]):
            low, high = high, _STRIDE * high
        high = min(high, end)
        while low < high:
            middle = (low + high) // 2
            if holds([*taken, *items[:middle].tolist()]):
                high = middle
            else:
                low = middle + 1
        taken.append(int(items[high - 1]))
        end = high - 1
    return taken
