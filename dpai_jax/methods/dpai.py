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
from jax import Array, lax
from jax.sharding import Sharding

from dpai_jax.allocation import erk
from dpai_jax.masks import check_numbers, from_layers, is_total
from dpai_jax.methods.base import Allocation, Problem, Pruned, score_tree
from dpai_jax.methods.noise import layout, normal_scores
from dpai_jax.paths import Network
from dpai_jax.paths.network import check_counting, check_parallel
from dpai_jax.paths.sums import count_true, fold, settled
from dpai_jax.paths.trees import check_structure
from dpai_jax.selection import as_count, select

PyTree = Any

_ADAM = optax.adam(5e-3)

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
    objective = _Objective(alpha, beta, gamma, counting)
    return score_tree(net, _direction(net, objective, leaves, _counts(net, keep)).directions)


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


class _Ascent(NamedTuple):
    """A direction, the masks it is taken at, their thresholds, and what was measured there."""

    directions: list[Array]
    masks: list[Array]
    thresholds: Array
    measured: dict[str, Array]


def _direction(
    net: Network,
    objective: _Objective,
    scores: list[Array],
    keep: list[Array] | Array,
    near: Array | None = None,
) -> _Ascent:
    """One step's direction; thresholds of the step before make it faster."""
    alpha, beta, gamma, counting = objective
    masks, thresholds = select(scores, keep, near, magnitude=True)
    log_paths, gradients = jax.value_and_grad(net.log_count)(
        [m.astype(jnp.float32) for m in masks], counting
    )
    directions, nodes, kernels = [], [], []
    for layer, s, m, g in zip(net.layers, scores, masks, gradients, strict=True):
        passing = jnp.where(m, g, 0.0)
        kernel = settled(fold(passing, layer.taps)) if layer.taps else passing
        node = settled(jnp.sum(kernel, layer.inputs, keepdims=True))
        push = (1 - beta) * _slope(node, gamma) + beta * _slope(kernel, gamma)
        directions.append(((1 - alpha) + alpha * push) * g * jnp.sign(s))
        nodes.append(count_true(node > 0))
        kernels.append(count_true(kernel > 0))
    measured = {"log_paths": log_paths, "nodes": sum(nodes), "kernels": sum(kernels)}
    return _Ascent(directions, masks, thresholds, measured)


def _slope(share: Array, gamma: float) -> Array:
    """The slope, but for the factor γ, of the indicator of what has this share of the paths."""
    return jnp.where(share > 0, 1 - jnp.square(jnp.tanh(gamma * share)), 1.0)


class _State(NamedTuple):
    """What one step hands to the next: pytrees over the layers; thresholds of two steps."""

    scores: list[Array]
    optimizer: Any
    masks: list[Array]
    thresholds: Array
    unchanged: Array


@dataclasses.dataclass(frozen=True)
class DPaI:
    """Differentiable Pruning at Initialization.

    Attributes:
      alpha: weight of effective nodes and kernels against paths, in [0, 1]; 0 leaves paths alone.
      beta: weight of kernels against nodes, in [0, 1]; 0 leaves kernels out, and 1 nodes.
      gamma: how sharp the indicators of effective nodes and kernels are, positive (see `ascent`).
      counting: how paths are counted, "mean_field" or "exact" (see `dpai_jax.log_paths`).
      steps: the largest number of steps T. The published code takes 3000; beyond some hundreds the
        scores' growth gathers the weights of a layer on ever fewer nodes.
      optimizer: makes the scores follow the direction of `ascent`: any optax optimiser.
        `optax.sgd(η)` is the plain ascent of the paper's Algorithm 1.
      allocation: weights to keep, `allocation(net, sparsity)`: `dpai_jax.erk`, `dpai_jax.uniform`,
        any function that returns a pytree of the numbers for the layers, or
        `dpai_jax.weights_to_keep` for one threshold over all layers.
      patience: ends after so many steps in a row that changed no mask.
      scores: pytree parallel to the parameters of the scores to start from; drawn from N(0, 1) if
        not given.

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
    steps: int = 300
    optimizer: optax.GradientTransformation = _ADAM
    allocation: Allocation = erk
    patience: int = 50
    # A compiled step does not hang on where the scores start.
    scores: PyTree = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")
        check_counting(self.counting)
        for name in ("steps", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        net = problem.net
        counts = _counts(net, self.allocation(net, problem.sparsity))
        scores, shardings = self._start(problem), layout(net, problem.params)
        state = _State(
            scores,
            self.optimizer.init(scores),
            [jnp.zeros_like(s, bool) for s in scores],
            jnp.zeros((2, sum(k.size for k in jax.tree.leaves(counts))), jnp.uint32),
            jnp.int32(0),
        )
        measured: list[dict[str, Any]] = []
        stopped = ""
        for t in range(self.steps):
            state, numbers = self._step(net, shardings, state, counts)
            measured.append(numbers)
            if t % _READ_EVERY == 0 or t == self.steps - 1:
                problem.report(t + 1, self.steps, jax.device_get(numbers))
                if int(state.unchanged) >= self.patience:
                    stopped = f"no mask changed in {int(state.unchanged)} steps"
                    break
        # One more look, at the masks of the final scores, which the step would move on.
        scores = score_tree(net, jax.tree.map(jnp.copy, state.scores))
        state, numbers = self._step(net, shardings, state, counts)
        measured.append(numbers)
        history = {
            name: np.asarray(jax.device_get([numbers[name] for numbers in measured]))
            for name in measured[0]
        }
        masks, rank = from_layers(net, state.masks), jax.tree.map(jnp.abs, scores)
        return Pruned(masks, scores, history, stopped, rank)

    def _start(self, problem: Problem) -> list[Array]:
        net = problem.net
        if self.scores is None:
            return net.leaves(normal_scores(net, problem.key, problem.params))
        scores = check_parallel(net, self.scores, "scores")
        for layer, s in zip(net.layers, scores, strict=True):
            check_numbers(layer.name, s)
        return [jnp.array(s, jnp.float32) for s in scores]

    @functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
    def _step(
        self,
        net: Network,
        shardings: tuple[Sharding | None, ...],
        state: _State,
        keep: list[Array] | Array,
    ) -> tuple[_State, dict[str, Array]]:
        """One step of Algorithm 1."""
        objective = _Objective(self.alpha, self.beta, self.gamma, self.counting)
        # Thresholds go on as they went, more or less.
        before, last = state.thresholds[:1], state.thresholds[1:]
        ascent = _direction(net, objective, state.scores, keep, last + (last - before))
        thresholds = jnp.concatenate([last, ascent.thresholds])
        changes = [count_true(a != b) for a, b in zip(ascent.masks, state.masks, strict=True)]
        changed = functools.reduce(jnp.add, changes)
        descent = jax.tree.map(jnp.negative, ascent.directions)
        # Some of optax's optimisers mix dtypes, which a user's strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(descent, state.optimizer, state.scores)
        scores = _laid_out(optax.apply_updates(state.scores, updates), shardings)
        unchanged = jnp.where(changed == 0, state.unchanged + 1, 0)
        masks = _laid_out(ascent.masks, shardings)
        after = _State(scores, optimizer, masks, thresholds, unchanged)
        return after, ascent.measured | {"changed": changed}


def _laid_out(arrays: list[Array], shardings: tuple[Sharding | None, ...]) -> list[Array]:
    """The layers' arrays on the devices where their kernels are."""
    return [
        x if sharding is None else lax.with_sharding_constraint(x, sharding)
        for x, sharding in zip(arrays, shardings, strict=True)
    ]
