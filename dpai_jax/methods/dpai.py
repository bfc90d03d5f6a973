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

from dpai_jax import checks, counts, selection
from dpai_jax.allocation import check_allocation, erk, keep_of_layers
from dpai_jax.methods.base import Allocation, Problem, Pruned
from dpai_jax.methods.noise import normal_scores
from dpai_jax.paths import Network
from dpai_jax.selection import Cut, as_count
from dpai_jax.tools import meshes
from dpai_jax.tools.signatures import Alike
from dpai_jax.tools.sums import count_true, materialize, sum_over, sum_taps
from dpai_jax.tools.switches import usual_switches

PyTree = Any

_ASCENT = optax.sgd(0.01)

# Steps between two looks at the numbers: reading one waits for the device.
_READ_EVERY = 10


@usual_switches()
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
    leaves = checks.scores(net, scores)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, jax.core.Tracer):
            checks.number(name, value, *checks.FRACTION)
    if not isinstance(gamma, jax.core.Tracer):
        checks.number("gamma", gamma, *checks.POSITIVE)
    checks.one_of("counting", counting, counts.COUNTINGS)
    objective = Objective(alpha, beta, gamma, counting, normalize=False)

    def run(scores: list[Array], keep: list[Array] | Array) -> list[Array]:
        masks, _ = selection.select(scores, keep, magnitude=True)
        return direction(net, objective, scores, masks)[0]

    numbers = keep_of_layers(net, keep)
    directions = meshes.auto_sharded(run, leaves, numbers, like=leaves)
    return net.tree(directions, lambda: np.float32(0))


class Objective(NamedTuple):
    """What the scores ascend (see `ascent`).

    Attributes:
      alpha, beta, gamma, counting: as in `ascent`.
      normalize: whether the direction of each layer is divided by its mean magnitude.
    """

    alpha: float
    beta: float
    gamma: float
    counting: str
    normalize: bool


def direction(
    net: Network, objective: Objective, scores: list[Array], masks: list[Array]
) -> tuple[list[Array], dict[str, Array]]:
    """Algorithm 1, lines 6 to 8: the direction d at the masks of the scores (see `ascent`).

    Args:
      net: the traced network.
      objective: what to ascend.
      scores: a float32 array of each layer's shape.
      masks: the boolean masks of the scores.

    Returns:
      The layers' directions, and what was measured: `log_paths`, `nodes` and `kernels`.
    """
    alpha, beta, gamma, counting, normalize = objective
    log_paths, gradients = jax.value_and_grad(functools.partial(counts.log_count, net))(
        [m.astype(jnp.float32) for m in masks], counting
    )
    directions, nodes, kernels = [], [], []
    for layer, s, m, g in zip(net.layers, scores, masks, gradients, strict=True):
        passing = jnp.where(m, g, 0.0)
        kernel = materialize(sum_taps(passing, layer.taps)) if layer.taps else passing
        node = materialize(jnp.sum(kernel, layer.inputs, keepdims=True))
        push = (1 - beta) * _slope(node, gamma) + beta * _slope(kernel, gamma)
        slope = (1 - alpha) + alpha * push
        if normalize:
            copy = tuple(i for i in range(g.ndim) if i not in layer.stack)
            mean = sum_over(slope * sum_taps(g, layer.taps), copy) * (layer.copies / layer.size)
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
    """What the scores' steps hand on, a list over the layers each."""

    scores: list[Array]
    optimizer: Any
    masks: list[Array]


@dataclasses.dataclass(frozen=True)
class DPaI:
    """Differentiable Pruning at Initialization.

    Attributes:
      alpha: weight of effective nodes and kernels against paths, in [0, 1]; 0 optimises paths only.
      beta: weight of kernels against nodes, in [0, 1]; 0 leaves kernels out, and 1 nodes.
      gamma: how sharp the indicators of effective nodes and kernels are, positive (see `ascent`).
      counting: how paths are counted, "mean_field" or "exact" (see `dpai_jax.log_paths`).
      steps: the largest number of steps T.
      optimizer: makes the scores follow the direction of `ascent`: any optax optimizer.
      normalize: whether the direction of each layer is first divided by its mean magnitude, so
        that the default optimizer, `optax.sgd(0.01)`, moves its scores by 0.01 a step on average.
        Without, `optax.sgd(η)` is the ascent of the paper's Algorithm 1.
      allocation: weights to keep, `allocation(net, sparsity)`: `dpai_jax.erk`, `dpai_jax.uniform`,
        any function that returns a pytree of the numbers for the layers, or
        `dpai_jax.global_threshold` for one threshold over all layers.
      tolerance: ends early, when ten steps have raised log R_P by less than this fraction of it;
        −inf never does.
      scores: pytree parallel to the parameters of the scores to start from; drawn from N(0, 1) if
        not given.

    Raises:
      TypeError, ValueError: if a setting is of another type or out of its range.

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
    scores: PyTree = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            checks.number(name, getattr(self, name), *checks.FRACTION)
        checks.number("gamma", self.gamma, *checks.POSITIVE)
        checks.one_of("counting", self.counting, counts.COUNTINGS)
        checks.whole("steps", self.steps, 1)
        checks.number("tolerance", self.tolerance)
        checks.optimizer("optimizer", self.optimizer)
        check_allocation(self.allocation)

    @classmethod
    def published(cls, **settings: Any) -> DPaI:
        """The published code's setting: exact counts, 3000 steps of Adam at 0.005.

        Args:
          **settings: what else to set, as the attributes.

        Returns:
          The method.
        """
        adam = optax.adam(5e-3)
        published = {"optimizer": adam, "normalize": False, "steps": 3000, "tolerance": -math.inf}
        return cls(**{**published, "counting": "exact", **settings})

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network: Algorithm 1 (see `dpai_jax.prune`).

        Args:
          problem: the network and the sparsity.

        Returns:
          The masks and final scores; the history holds what was measured at the masks of each step.
        """
        net = problem.net
        keep = jax.tree.map(as_count, problem.keep(self.allocation))
        scores = self._start(problem)
        state = _State(
            scores, self.optimizer.init(scores), [jnp.zeros_like(s, bool) for s in scores]
        )
        thresholds = jnp.zeros((2, sum(k.size for k in jax.tree.leaves(keep))), jnp.uint32)
        objective = Objective(self.alpha, self.beta, self.gamma, self.counting, self.normalize)
        update = Alike(self.optimizer.update)
        measured: list[dict[str, Any]] = []
        stopped, paths = "", -math.inf
        for t in range(self.steps):
            cut, thresholds = _cut(net, state.scores, keep, thresholds)
            state, numbers = _step(net, state, cut, objective=objective, update=update)
            measured.append(numbers)
            if t % _READ_EVERY == 0 or t == self.steps - 1:
                numbers = jax.device_get(numbers)
                problem.report(t + 1, self.steps, numbers)
                before, paths = paths, float(numbers["log_paths"])
                if t % _READ_EVERY == 0 and paths - before < self.tolerance * abs(paths):
                    stopped = f"log-paths grew by {paths - before:.2g} in {_READ_EVERY} steps"
                    break
        scores = state.scores
        del state  # what the optimizer remembers is as large as all the rest
        masks = _masks(net, scores, _cut(net, scores, keep, thresholds)[0])
        history = jax.tree.map(lambda *xs: np.asarray(xs), *jax.device_get(measured))
        return Pruned(masks, scores, history, stopped, lambda: [jnp.abs(s) for s in scores])

    def _start(self, problem: Problem) -> list[Array]:
        """The scores to start from; zero, the lowest magnitude, where no mask is effective."""
        net = problem.net
        if self.scores is None:
            scores = normal_scores(net, problem.key, problem.params)
        else:
            scores = [jnp.array(s, jnp.float32) for s in checks.scores(net, self.scores)]
            scores = meshes.device_put_like(scores, net.leaves(problem.params))
        return counts.rank_last(net, scores, 0.0)


@meshes.program(layers=lambda scores, *_: scores)
def _cut(
    _: Network, scores: list[Array], keep: list[Array] | Array, thresholds: Array
) -> tuple[Cut, Array]:
    """Line 5 of Algorithm 1: where the scores are cut, and the last two thresholds."""
    # Extrapolate linearly from the last two thresholds.
    before, last = thresholds[:1], thresholds[1:]
    cut = selection.find_cut(scores, keep, last + (last - before), magnitude=True)
    return cut, jnp.concatenate([last, cut.thresholds])


@meshes.program(like=lambda scores, _: scores, layers=lambda scores, _: scores)
def _masks(_: Network, scores: list[Array], cut: Cut) -> list[Array]:
    """The masks of the scores by where they are cut."""
    return selection.apply_cut(scores, cut, magnitude=True)


@meshes.program(
    like=lambda state, _: (state, None), layers=lambda state, _: state.scores, donate=(0,)
)
def _step(
    net: Network, state: _State, cut: Cut, *, objective: Objective, update: Alike
) -> tuple[_State, dict[str, Array]]:
    """Lines 5 to 8 of Algorithm 1. The last masks lend the new ones their memory, no more."""
    masks = selection.apply_cut(state.scores, cut, magnitude=True)
    directions, measured = direction(net, objective, state.scores, masks)
    descent = jax.tree.map(jnp.negative, directions)
    # Some of optax's optimizers mix dtypes, which a user's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, memory = update(descent, state.optimizer, state.scores)
    return _State(optax.apply_updates(state.scores, updates), memory, masks), measured
