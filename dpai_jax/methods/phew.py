"""PHEW: keeps the weights on random walks that prefer strong weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dpai_jax.allocation import weights_to_keep
from dpai_jax.measuring import effective
from dpai_jax.methods.base import Problem, Pruned, Report
from dpai_jax.paths import Network
from dpai_jax.paths.channels import Channels, channels
from dpai_jax.tools.meshes import on_host
from dpai_jax.tools.random import numpy_generator

# Walks drawn at once, half of them in each direction.
_WALKS = 4096

# Walking ends when a batch of walks finds fewer new weights than this, one in a hundred walks.
_TOO_FEW = _WALKS // 100

# How often to drop weights that are on no path.
_ROUNDS = 50


@dataclasses.dataclass(frozen=True)
class PHEW:
    """Paths with higher edge weights: keeps the weights on biased random walks.

    Walks go in turn forward, from an input feature to an output, and backward, from an output
    feature to an input; the features they start from take turns. Where a kernel reads a feature,
    the output feature to go to (backward: the input feature to come from) is drawn in proportion
    to the L1 norm of the kernel between them, Σ_taps |θ|, and its tap in proportion to |θ|; evenly
    where all of these are zero. Every weight passed is kept, until there are as many as asked for:
    the last walk is cut. Needs no data.

    Where several layers read one feature (backward: where several make it up), a walk enters the
    first of them or goes on past it with even chances, as at a shortcut; layers side by side, none
    of which leads to another, share the chance evenly.

    Walks ignore positions on a map and the other factors of products (gates, attention). So a
    weight that was walked over may lie on no path: where a map is smaller than its kernel, or the
    other factor is dead. Such weights are dropped and walking goes on, at most 50 times. Where
    walks find hardly any new weights (fewer than one in a hundred walks), as at low sparsities,
    the largest |θ| are added, those on a path first.

    The score of a weight is the number of walks that passed it, and ½ if it was added for its
    magnitude; so all kept weights have positive scores.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.arange(8.0).reshape(4, 2)}
      >>> method = dpai.PHEW()
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=method)
      >>> result.topology.weights
      4

    References:
      Patil and Dovrolis, PHEW: Constructing Sparse Networks that Learn Fast and Generalize Well
      without Training Data, ICML 2021.
    """

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`).

        Args:
          problem: the network, its parameters' values and the sparsity.

        Returns:
          The masks and scores; the history holds the weights kept after each batch of walks.

        Raises:
          TypeError: if the parameters are shapes.
          ValueError: if a weight is not finite.
        """
        problem.refuse_groups("PHEW")
        net = problem.net
        keep = weights_to_keep(net, problem.sparsity)
        strength = net.ravel(_magnitudes(problem))
        on_path = _effective(net, np.ones(net.size, bool))
        graph = channels(net)
        kernels = tuple(np.where(on_path[k], k, k.dtype.type(-1)) for k in graph.kernels)
        graph = dataclasses.replace(graph, kernels=kernels).without_dead_ends()
        walks = _batches(graph, strength, problem.key)
        passes, history = np.zeros(net.size, np.float32), [0]
        for _ in range(_ROUNDS):
            enough = _walk(walks, passes, keep, history, problem.report)
            dead = (passes > 0) & ~_effective(net, passes > 0)
            if not enough or not np.any(dead):
                break
            passes[dead] = 0
        else:
            _walk(walks, passes, keep, history, problem.report)
        if missing := keep - np.count_nonzero(passes):
            passes[np.lexsort((-strength, ~on_path, passes > 0))[:missing]] = 0.5
        scores = net.unravel(passes)
        masks = [jnp.asarray(s > 0) for s in scores]
        return Pruned(masks, list(map(jnp.asarray, scores)), {"weights": np.asarray(history[1:])})


def _magnitudes(problem: Problem) -> list[np.ndarray]:
    """|θ| of each layer.

    Raises:
      ValueError: if one is not finite.
    """
    magnitudes = []
    for layer, weights in zip(problem.net.layers, problem.weights(), strict=True):
        magnitudes.append(np.abs(on_host(weights).astype(np.float32)))
        if not np.all(np.isfinite(magnitudes[-1])):
            raise ValueError(f"params must be finite, but {layer.name} is not")
    return magnitudes


def _effective(net: Network, kept: np.ndarray) -> np.ndarray:
    """Which of the kept weights are on a path; both are rows of all weights."""
    return net.ravel(jax.device_get(effective(net, net.unravel(kept))))


def _batches(graph: Channels, strength: np.ndarray, key: jax.Array) -> Iterator[np.ndarray]:
    """Yields batches of walks without end, forward and backward in turn, padded with −1.

    A batch is (walks, steps). If the network's input reaches no kernel, there are none.
    """
    if not np.any(graph.entered):
        return
    forward, backward = Walker(graph, strength), Walker(graph.reversed(), strength)
    rng = numpy_generator(key)
    for first in itertools.count(0, _WALKS // 2):
        turns = np.arange(first, first + _WALKS // 2)
        yield _interleaved(forward.walks(turns, rng), backward.walks(turns, rng))


def _walk(
    walks: Iterator[np.ndarray],
    passes: np.ndarray,
    keep: int,
    history: list[int],
    report: Report,
) -> bool:
    """Walks until enough weights are passed, or hardly any new ones are found.

    Args:
      walks: batches of walks.
      passes: how often each weight was passed; updated in place.
      keep: the number of weights to pass.
      history: the number of weights passed after each batch; updated in place.
      report: takes progress.

    Returns:
      Whether enough weights were passed.
    """
    kept = int(np.count_nonzero(passes))
    while kept < keep:
        batch = next(walks, None)
        if batch is None:
            return False
        steps = batch[batch >= 0]
        weights, first = np.unique(steps, return_index=True)
        new = np.sort(first[passes[weights] == 0])
        if len(new) >= keep - kept:
            steps = steps[: new[keep - kept - 1] + 1]
        np.add.at(passes, steps, np.float32(1))
        kept += min(len(new), keep - kept)
        history.append(kept)
        report(kept, keep, {"walks": (len(history) - 1) * _WALKS})
        if kept < keep and len(new) < _TOO_FEW:
            return False
    return True


def _interleaved(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Interleaves the walks of two arrays (walks, steps), padded with −1."""
    steps = max(forward.shape[1], backward.shape[1])
    padded = [
        np.pad(walks, ((0, 0), (0, steps - walks.shape[1])), constant_values=-1)
        for walks in (forward, backward)
    ]
    return np.stack(padded, 1).reshape(-1, steps)


class Walker:
    """Draws walks through a channel graph without dead ends, backward if the graph is reversed.

    Args:
      graph: the graph.
      strength: |θ| of all weights.
    """

    def __init__(self, graph: Channels, strength: np.ndarray):
        kernels = graph.kernels
        tables = [_kernel_sums(kernel, strength) for kernel in kernels]
        self.numbers = _joined(kernels)
        self.tap_sums, self.norm_sums, mass = map(_joined, zip(*tables, strict=True))
        # For each feature read: how many features it leads to, their taps, and where each starts.
        features = [k.shape[0] * k.shape[1] for k in kernels]
        self.outputs = np.repeat([k.shape[2] for k in kernels], features)
        self.taps = np.repeat([k.shape[3] for k in kernels], features)
        self.first_norm = _starts(self.outputs)
        self.first_tap = _starts(self.outputs * self.taps)
        inputs, outputs = (
            np.repeat([k.shape[i] for k in kernels], [k.shape[0] for k in kernels]) for i in (1, 2)
        )
        self.first_output = np.repeat(_starts(outputs), inputs)
        uses = _Uses.of(graph)
        self.forks = _Forks(graph, uses, mass)
        self.entered = np.flatnonzero(graph.entered)
        first_uses, self.entered_of_use = np.unique(uses.read[self.entered], return_counts=True)
        self.use_chances, _ = uses.turns(first_uses, ends=False)

    def walks(self, turns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws walks.

        Args:
          turns: the walks' numbers; consecutive ones start from consecutive features.
          rng: the generator.

        Returns:
          The numbers of the weights passed, (walks, steps), padded with −1 after a walk's end.
        """
        use = rng.choice(len(self.use_chances), len(turns), p=self.use_chances)
        first, number = _starts(self.entered_of_use)[use], self.entered_of_use[use]
        walking, feature = np.arange(len(turns)), self.entered[first + turns % number]
        steps = []
        while len(walking):
            first = self.first_norm[feature]
            column = _draw(self.norm_sums, first, self.outputs[feature], rng) - first
            taps = self.taps[feature]
            tap = _draw(self.tap_sums, self.first_tap[feature] + column * taps, taps, rng)
            steps.append(np.full(len(turns), -1))
            steps[-1][walking] = self.numbers[tap]
            feature = self.forks.draw(self.first_output[feature] + column, rng)
            walking, feature = walking[feature >= 0], feature[feature >= 0]
        return np.stack(steps, 1)


def _kernel_sums(
    kernel: np.ndarray, strength: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cumulative sums of |θ| over taps, of norms over outputs, and the norms' totals."""
    present = kernel >= 0
    weights = np.where(present, strength[kernel], np.float32(0))
    norms = np.sum(weights, -1)
    taps = np.cumsum(_or_even(weights, present), -1)
    return taps, np.cumsum(_or_even(norms, np.any(present, -1)), -1), np.sum(norms, -1)


def _or_even(chances: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Chances along the last axis, replaced by even ones where all are zero."""
    return np.where(np.any(chances > 0, -1, keepdims=True), chances, present.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class _Uses:
    """The use of a kernel that each feature belongs to, and which uses lead to which.

    Attributes:
      read, written: the use of each feature.
      leads: matrix, true where a path leads from one use to another.
    """

    read: np.ndarray
    written: np.ndarray
    leads: np.ndarray

    @classmethod
    def of(cls, graph: Channels) -> _Uses:
        """The uses in a graph."""
        shapes = [kernel.shape for kernel in graph.kernels]
        uses = np.arange(len(shapes))
        read = np.repeat(uses, [groups * inputs for groups, inputs, _, _ in shapes])
        written = np.repeat(uses, [groups * outputs for groups, _, outputs, _ in shapes])
        leads = np.zeros((len(uses), len(uses)), bool)
        leads[written[graph.written], read[graph.read]] = True
        for use in reversed(uses):
            leads[use] |= np.any(leads[leads[use]], 0)
        return cls(read, written, leads)

    def turns(self, readers: np.ndarray, ends: bool) -> tuple[np.ndarray, float]:
        """The probabilities of entering each use that reads a feature, and of entering none.

        Uses are side by side if none of them leads to another. A walk enters each such set or goes
        past it with even chances. It enters the last one, unless the output comes after it.
        """
        sets: list[list[int]] = []
        for use in readers:
            if sets and not np.any(self.leads[sets[-1], use]):
                sets[-1].append(use)
            else:
                sets.append([use])
        chances, left = [], 1.0
        for i, members in enumerate(sets):
            entered = left / 2 if ends or i + 1 < len(sets) else left
            chances += [entered / len(members)] * len(members)
            left -= entered
        return np.asarray(chances), left


class _Forks:
    """Where walks go from each feature.

    Args:
      graph: the graph.
      uses: the uses of kernels in it.
      mass: for each feature read, the sum of the norms of its kernels.
    """

    def __init__(self, graph: Channels, uses: _Uses, mass: np.ndarray):
        entering, ending = _fork_chances(graph, uses, mass)
        ended = np.flatnonzero(graph.left)
        feature = np.concatenate([graph.written, ended])
        order = np.argsort(feature, kind="stable")
        self.to = np.concatenate([graph.read, np.full(len(ended), -1)])[order]
        self.size = np.bincount(feature, minlength=len(graph.left))
        self.first = _starts(self.size)
        sums = np.concatenate([[0.0], np.cumsum(np.concatenate([entering, ending])[order])])
        self.sums = sums[1:] - np.repeat(sums[self.first], self.size)

    def draw(self, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The features read next, −1 where the walk ends."""
        return self.to[_draw(self.sums, self.first[features], self.size[features], rng)]


def _fork_chances(graph: Channels, uses: _Uses, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chance of each edge, and of ending after each feature that the output reads."""
    n = len(uses.leads)
    # Pairs of a feature and a use that reads it. Within one, a feature is drawn by its mass.
    pairs, pair = np.unique(graph.written * n + uses.read[graph.read], return_inverse=True)
    total = np.bincount(pair, mass[graph.read], len(pairs))[pair]
    alike = 1 / np.bincount(pair)[pair]
    within = np.where(total > 0, mass[graph.read] / np.where(total > 0, total, 1), alike)
    entering, ending = np.zeros(len(pairs)), np.zeros(len(graph.left))
    bounds = np.searchsorted(pairs, np.arange(len(graph.left) + 1) * n)
    known: dict[tuple[bytes, bool], tuple[np.ndarray, float]] = {}
    for feature, ends in enumerate(graph.left.tolist()):
        here = slice(bounds[feature], bounds[feature + 1])
        readers = pairs[here] % n
        key = (readers.tobytes(), ends)
        if key not in known:
            known[key] = uses.turns(readers, ends)
        entering[here], ending[feature] = known[key]
    return entering[pair] * within, ending[graph.left]


def _draw(
    sums: np.ndarray, first: np.ndarray, size: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draws one entry from each of several rows.

    Args:
      sums: cumulative sums of each row's chances, all rows one after another.
      first: where each row starts.
      size: how many entries each row has.
      rng: the generator.

    Returns:
      The index of each drawn entry, counted over all rows.
    """
    low, high = first, first + size - 1
    # In (0, sum]: so the first entry whose sum reaches it has a chance above zero.
    target = sums[high] * (1 - rng.random(len(first)))
    while np.any(low < high):
        middle = (low + high) // 2
        below = sums[middle] < target
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    return low


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of several consecutive runs of these sizes starts."""
    return np.cumsum(sizes) - sizes
