"""DPaI: gradient ascent on scores that balances effective paths, nodes and kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Sharding

from dpai_jax.allocation import erk
from dpai_jax.masks import check_numbers, from_layers, is_total
from dpai_jax.methods.base import Allocation, Problem, Pruned, score_tree
from dpai_jax.methods.noise import normal_scores
from dpai_jax.paths import Network
from dpai_jax.paths.meshes import (
    Shardings,
    automatic,
    laid_out,
    placed,
    placed_like,
    shardings_of,
    whole_beside,
)
from dpai_jax.paths.network import check_counting, check_parallel
from dpai_jax.paths.sums import count_true, fold, settled, sum_over
from dpai_jax.paths.trees import check_structure
from dpai_jax.selection import Cut, as_count, find_cut, kept, select

PyTree = Any

_ASCENT = optax.sgd(0.01)

# Steps between two looks at the numbers: reading one waits for the device.
_READ_EVERY = 10


def ascent(
    net: Network,
    scores: PyTree,
    keep: PyTree | int,
    alpha: float = 0.99,
    beta: float = 0.5,
    gamma: float = math.inf,
    counting: str = "exact",
) -> PyTree:
    """The direction in which one step of DPaI moves the scores.

    With m = top-k(|s|) in each layer and g = ∂ log R_P/∂m · sign(s), the straight-through gradient,

        d = (1 − α)·g + α·((1 − β)·g·[node ineffective] + β·g·[kernel ineffective]).

    A node is effective by the indicator tanh(γ·N) of N = Σ m·∂ log R_P/∂m over its incoming
    weights, the share of all paths that pass it, and a kernel by that over its taps. The bracket is
    the indicator's slope up to the factor γ, 1 − tanh²(γ·N); for γ → ∞ one where N = 0, else zero.
    Pure, and jittable with `net` static.

    Args:
      net: the traced network.
      scores: pytree of scores parallel to the parameters.
      keep: pytree of the number of weights to keep per layer (see `dpai_jax.erk`), or one number
        for all layers together.
      alpha: weight of nodes and kernels against paths, in [0, 1].
      beta: weight of kernels against nodes, in [0, 1].
      gamma: how sharp the indicators are, positive.
      counting: "exact" or "mean_field" (see `dpai_jax.log_paths`).

    Returns:
      Pytree like `scores`; zero where nothing can be pruned.

    Raises:
      ValueError: if the scores or `keep` do not fit the network, or `counting` is unknown.

    References:
      DPaI (ICLR 2025), Algorithm 1, lines 5 to 8.
    """
    leaves = [jnp.asarray(s) for s in check_parallel(net, scores, "scores")]
    check_counting(counting)
    objective = _Objective(alpha, beta, gamma, counting, normalize=False)

    def direction(scores: list[Array], keep: list[Array] | Array) -> list[Array]:
        masks, _ = select(scores, keep, magnitude=True)
        return _direction(net, objective, scores, masks)[0]

    return score_tree(net, automatic(direction, leaves, _counts(net, keep), like=leaves))


def _counts(net: Network, keep: PyTree | int) -> list[Array] | Array:
    """The numbers of weights to keep, layer by layer or in all."""
    if is_total(keep, net.treedef):
        return as_count(keep)
    check_structure(keep, net.treedef, "keep", "params")
    return [as_count(k) for k in net.leaves(keep)]


class _Objective(NamedTuple):
    """What the scores ascend (see `ascent`)."""

    alpha: float
    beta: float
    gamma: float
    counting: str
    normalize: bool


def _direction(
    net: Network,
    objective: _Objective,
    scores: list[Array],
    masks: list[Array],
    shardings: Shardings = (),
) -> tuple[list[Array], dict[str, Array]]:
    """The direction at the masks of the scores, and what is measured there."""
    alpha, beta, gamma, counting, normalize = objective
    log_paths, gradients = jax.value_and_grad(net.log_count)(
        [m.astype(jnp.float32) for m in masks], counting, shardings
    )
    directions, nodes, kernels = [], [], []
    for layer, s, m, g in zip(net.layers, scores, masks, gradients, strict=True):
        passing = jnp.where(m, g, 0.0)
        kernel = settled(fold(passing, layer.taps)) if layer.taps else passing
        node = settled(jnp.sum(kernel, layer.inputs, keepdims=True))
        push = (1 - beta) * _slope(node, gamma) + beta * _slope(kernel, gamma)
        slope = (1 - alpha) + alpha * push
        if normalize:
            copy = tuple(i for i in range(g.ndim) if i not in layer.stack)
            mean = sum_over(slope * fold(g, layer.taps), copy) * (layer.copies / layer.size)
            slope = slope * jnp.where(mean > 0, 1 / mean, 0.0)
        directions.append(slope * g * jnp.sign(s))
        nodes.append(count_true(node > 0))
        kernels.append(count_true(kernel > 0))
    measured = {"log_paths": log_paths, "nodes": sum(nodes), "kernels": sum(kernels)}
    return directions, measured


def _slope(share: Array, gamma: Any) -> Array:
    """The slope, but for the factor γ, of the indicator of what has this share of the paths."""
    sharp = isinstance(gamma, float) and math.isinf(gamma)
    slope = 0.0 if sharp else 1 - jnp.square(jnp.tanh(gamma * share))
    return jnp.where(share > 0, slope, 1.0)


class _State(NamedTuple):
    """What the scores' steps hand on: pytrees over the layers."""

    scores: list[Array]
    optimizer: Any
    masks: list[Array]


@dataclasses.dataclass(frozen=True)
class DPaI:
    """Differentiable Pruning at Initialization.

    Attributes:
      alpha: weight of effective nodes and kernels against paths, in [0, 1]; 0 leaves paths alone.
      beta: weight of kernels against nodes, in [0, 1]; 0 leaves kernels out, and 1 nodes.
      gamma: how sharp the indicators of effective nodes and kernels are, positive (see `ascent`).
      counting: how paths are counted, "mean_field" or "exact" (see `dpai_jax.log_paths`).
      steps: the largest number of steps T.
      optimizer: makes the scores follow the direction of `ascent`: any optax optimiser.
      normalize: whether the direction of each layer is first divided by its mean magnitude, so
        that the default optimiser, `optax.sgd(0.01)`, moves its scores by 0.01 a step on average.
        Without, `optax.sgd(η)` is the ascent of the paper's Algorithm 1.
      allocation: weights to keep, `allocation(net, sparsity)`: `dpai_jax.erk`, `dpai_jax.uniform`,
        any function that returns a pytree of the numbers for the layers, or
        `dpai_jax.weights_to_keep` for one threshold over all layers.
      tolerance: ends before, when ten steps have raised log R_P by less than this fraction of it;
        −inf never does.
      scores: pytree parallel to the parameters of the scores to start from; drawn from N(0, 1) if
        not given.

    The published code's setting is `DPaI(optimizer=optax.adam(5e-3), normalize=False, steps=3000,
    tolerance=-math.inf, counting="exact")`. At 97 % sparsity and less it ends with more paths
    in a convolutional network, through half as many kernels.

    Raises:
      ValueError: if a number is out of its range.

    References:
      Xiang et al., DPaI: Differentiable Pruning at Initialization with Node-Path Balance
      Principle, ICLR 2025.
    """

    alpha: float = 0.99
    beta: float = 0.5
    gamma: float = math.inf
    counting: str = "mean_field"
    steps: int = 100
    optimizer: optax.GradientTransformation = _ASCENT
    normalize: bool = True
    allocation: Allocation = erk
    tolerance: float = 0.01
    # A compiled step does not hang on where the scores start.
    scores: PyTree = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")
        check_counting(self.counting)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if math.isnan(self.tolerance):
            raise ValueError("tolerance must be a number, got nan")

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        net = problem.net
        counts = _counts(net, self.allocation(net, problem.sparsity))
        scores = self._start(problem)
        masks = [jnp.zeros_like(s, bool) for s in scores]
        state = _State(scores, self.optimizer.init(scores), masks)
        thresholds = jnp.zeros((2, sum(k.size for k in jax.tree.leaves(counts))), jnp.uint32)
        whole = whole_beside(scores)
        state, counts, thresholds = placed((state, counts, thresholds), whole)
        shardings = shardings_of(jax.tree.leaves(state))
        measured: list[dict[str, Any]] = []
        stopped, paths = "", -math.inf
        for t in range(self.steps):
            cut, thresholds = _cut(whole, state.scores, counts, thresholds)
            state, numbers = self._step(net, shardings, state, cut)
            measured.append(numbers)
            if t % _READ_EVERY == 0 or t == self.steps - 1:
                numbers = jax.device_get(measured[-1])
                problem.report(t + 1, self.steps, numbers)
                before, paths = paths, float(numbers["log_paths"])
                if t % _READ_EVERY == 0 and paths - before < self.tolerance * abs(paths):
                    stopped = f"log-paths grew by {paths - before:.2g} in {_READ_EVERY} steps"
                    break
        # One more look, at the masks of the final scores, which the step would move on.
        scores = score_tree(net, jax.tree.map(jnp.copy, state.scores))
        cut, _ = _cut(whole, state.scores, counts, thresholds)
        state, numbers = self._step(net, shardings, state, cut)
        measured.append(numbers)
        masks = from_layers(net, state.masks)
        del state  # what the optimiser remembers is as large as all the rest
        history = {
            name: np.asarray(jax.device_get([numbers[name] for numbers in measured]))
            for name in measured[0]
        }
        rank = functools.partial(jax.tree.map, jnp.abs, scores)
        return Pruned(masks, scores, history, stopped, rank)

    def _start(self, problem: Problem) -> list[Array]:
        net = problem.net
        if self.scores is None:
            return net.leaves(normal_scores(net, problem.key, problem.params))
        scores = check_parallel(net, self.scores, "scores")
        for layer, s in zip(net.layers, scores, strict=True):
            check_numbers(layer.name, s)
        copies = [jnp.array(s, jnp.float32) for s in scores]
        return placed_like(copies, net.leaves(problem.params))

    @functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3, keep_unused=True)
    def _step(
        self,
        net: Network,
        shardings: Shardings,
        state: _State,
        cut: Cut,
    ) -> tuple[_State, dict[str, Array]]:
        """One step of Algorithm 1 by where the scores are cut, its state laid out as it was.

        The masks of the step before lend the new ones their memory, and nothing else.
        """
        # The scores come first.
        advance = functools.partial(self._advance, net, shardings[: len(net.layers)])
        after, measured = automatic(advance, state, cut, like=(state, None))
        return laid_out(after, shardings), measured

    def _advance(
        self,
        net: Network,
        shardings: Shardings,
        state: _State,
        cut: Cut,
    ) -> tuple[_State, dict[str, Array]]:
        masks = kept(state.scores, cut, magnitude=True)
        objective = _Objective(self.alpha, self.beta, self.gamma, self.counting, self.normalize)
        directions, measured = _direction(net, objective, state.scores, masks, shardings)
        descent = jax.tree.map(jnp.negative, directions)
        # Some of optax's optimisers mix dtypes, which a user's strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(descent, state.optimizer, state.scores)
        scores = optax.apply_updates(state.scores, updates)
        return _State(scores, optimizer, masks), measured


@functools.partial(jax.jit, static_argnums=0)
def _cut(
    whole: Sharding | None,
    scores: list[Array],
    keep: list[Array] | Array,
    thresholds: Array,
) -> tuple[Cut, Array]:
    """Where scores are cut, and the last two thresholds; whole on every device."""

    def find(
        scores: list[Array], keep: list[Array] | Array, thresholds: Array
    ) -> tuple[Cut, Array]:
        # Thresholds go on as they went, more or less.
        before, last = thresholds[:1], thresholds[1:]
        cut = find_cut(scores, keep, last + (last - before), magnitude=True)
        return cut, jnp.concatenate([last, cut.thresholds])

    found = automatic(find, scores, keep, thresholds, like=None)
    return laid_out(found, [whole] * len(jax.tree.leaves(found)))
