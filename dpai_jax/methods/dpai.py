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
from dpai_jax.methods import noise
from dpai_jax.methods.base import Allocation, Problem, Pruned
from dpai_jax.paths import Network
from dpai_jax.selection import as_count
from dpai_jax.tools import meshes
from dpai_jax.tools.rows import are_small, sums_of
from dpai_jax.tools.signatures import Alike
from dpai_jax.tools.sums import sum_over, sum_taps, written_out
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
    weights: tuple[Any, Any, Any] = (alpha, beta, gamma)
    sharp = not isinstance(weights[2], jax.core.Tracer) and math.isinf(gamma)
    objective = Objective(counting, normalize=False, sharp=sharp)

    def run(scores: list[Array], keep: list[Array] | Array) -> list[Array]:
        masks, _ = selection.select(scores, keep, magnitude=True)
        return direction(net, objective, weights, scores, masks)[0]

    numbers = keep_of_layers(net, keep)
    directions = meshes.auto_sharded(run, leaves, numbers, like=leaves)
    return net.tree(directions, lambda: np.float32(0))


class Objective(NamedTuple):
    """What the scores ascend (see `ascent`).

    Attributes:
      counting: as in `ascent`.
      normalize: whether the direction of each layer is divided by its mean magnitude.
      sharp: whether γ is infinite, and so the indicators only tell what has any path.
    """

    counting: str
    normalize: bool
    sharp: bool


def direction(
    net: Network,
    objective: Objective,
    weights: tuple[Any, Any, Any],
    scores: list[Array],
    masks: list[Array],
) -> tuple[list[Array], dict[str, Array]]:
    """Algorithm 1, lines 6 to 8: the direction d at the masks of the scores (see `ascent`).

    Args:
      net: the traced network.
      objective: what to ascend.
      weights: α, β and γ.
      scores: a float32 array of each layer's shape.
      masks: the boolean masks of the scores.

    Returns:
      The layers' directions, and what was measured: `log_paths`, `nodes` and `kernels`.
    """
    counting, normalize, sharp = objective
    alpha, beta, gamma = weights
    count = functools.partial(counts.log_count, net, counting=counting, below=1.0)
    floats = [m.astype(jnp.float32) for m in masks]
    log_paths, gradients = jax.value_and_grad(count)(floats)
    slopes, sizes, open_nodes = [], [], []
    for layer, m, g in zip(net.layers, masks, gradients, strict=True):
        kernel = sum_taps(jnp.where(m, g, 0.0), layer.taps)
        # Sums over taps are read more than once; where there are none, they cost nothing.
        kernel, again = written_out(kernel) if layer.taps else (kernel, kernel)
        open_kernels = (kernel > 0).astype(jnp.float32)
        open_node = jnp.sum(open_kernels, layer.inputs, keepdims=True)
        if sharp:
            of_node, of_kernel = (jnp.where(x > 0, 0.0, 1.0) for x in (open_node, again))
        else:
            node = jnp.sum(kernel, layer.inputs, keepdims=True)
            of_node, of_kernel = (1 - jnp.square(jnp.tanh(gamma * x)) for x in (node, again))
        push = (1 - beta) * of_node + beta * of_kernel
        slope = (1 - alpha) + alpha * push
        slopes.append(slope)
        sizes.append(slope * sum_taps(g, layer.taps))
        open_nodes.append(open_node.ravel())
    if normalize:
        slopes = [
            slope * jnp.where(mean > 0, 1 / mean, 0.0)
            for slope, mean in zip(slopes, _means(net, masks, sizes), strict=True)
        ]
    directions = [
        slope * g * jnp.sign(s) for slope, g, s in zip(slopes, gradients, scores, strict=True)
    ]
    nodes = jnp.concatenate(open_nodes).astype(jnp.uint32)
    measured = {
        "log_paths": log_paths,
        "nodes": jnp.sum(nodes > 0, dtype=jnp.uint32),
        "kernels": jnp.sum(nodes, dtype=jnp.uint32),
    }
    return directions, measured


def _means(net: Network, masks: list[Array], sizes: list[Array]) -> list[Array]:
    """The mean magnitude of each layer's direction, of each copy of it, from sums over taps."""
    small = are_small(masks)
    in_row = [flag and layer.copies == 1 for flag, layer in zip(small, net.layers, strict=True)]
    means = []
    for layer, x, total in zip(net.layers, sizes, sums_of(sizes, in_row), strict=True):
        if layer.stack:
            copy = tuple(i for i in range(x.ndim) if i not in layer.stack)
            total = sum_over(x, copy)
        means.append(total * (layer.copies / layer.size))
    return means


class _State(NamedTuple):
    """What the scores' steps hand on, a list over the layers each."""

    scores: list[Array]
    optimizer: Any


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
        masks, thresholds = self._before(problem, keep)
        settings = self._settings()
        scores = self._start(problem)
        state = _State(scores, self.optimizer.init(scores))
        measured: list[dict[str, Any]] = []
        stopped, paths = "", -math.inf
        for t in range(self.steps):
            masks, thresholds = _select(net, masks, state.scores, keep, thresholds)
            state, numbers = _step(net, state, masks, self._weights(), **settings)
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
        masks, _ = _select(net, masks, scores, keep, thresholds)
        history = jax.tree.map(lambda *xs: np.asarray(xs), *jax.device_get(measured))
        return Pruned(masks, scores, history, stopped, lambda: [jnp.abs(s) for s in scores])

    def compile_ahead(self, problem: Problem) -> None:
        """Starts to compile what `run` needs."""
        net = problem.net
        keep = jax.tree.map(as_count, problem.keep(self.allocation))
        shapes: Any = meshes.shapes_like(net.leaves(problem.params), jnp.float32)
        state = _State(shapes, jax.eval_shape(self.optimizer.init, shapes))
        masks, thresholds = self._before(problem, keep)
        _step.ahead(net, state, masks, self._weights(), **self._settings())
        _select.ahead(net, masks, shapes, keep, thresholds)
        if self.scores is None:
            noise.compile_ahead(net, problem.key, problem.params)

    def _settings(self) -> dict[str, Any]:
        """What a step is compiled for."""
        objective = Objective(self.counting, self.normalize, math.isinf(self.gamma))
        return {"objective": objective, "update": Alike(self.optimizer.update)}

    def _weights(self) -> tuple[Any, Any, Any]:
        return np.float32(self.alpha), np.float32(self.beta), np.float32(self.gamma)

    @staticmethod
    def _before(problem: Problem, keep: Any) -> tuple[list[Any], Array]:
        """Masks to be written over, and thresholds to start from."""
        masks = [np.zeros(layer.shape, bool) for layer in problem.net.layers]
        return masks, jnp.zeros((2, sum(k.size for k in jax.tree.leaves(keep))), jnp.uint32)

    def _start(self, problem: Problem) -> list[Array]:
        """The scores to start from; zero, the lowest magnitude, where no mask is effective."""
        net = problem.net
        if self.scores is None:
            scores = noise.normal_scores(net, problem.key, problem.params)
        else:
            scores = [jnp.array(s, jnp.float32) for s in checks.scores(net, self.scores)]
            scores = meshes.device_put_like(scores, net.leaves(problem.params))
        return counts.rank_last(net, scores, 0.0)


@meshes.program(
    like=lambda _, scores, *__: (scores, None),
    layers=lambda _, scores, *__: scores,
    donate=(0,),
)
def _select(
    _: Network,
    last: list[Array],
    scores: list[Array],
    keep: list[Array] | Array,
    thresholds: Array,
) -> tuple[list[Array], Array]:
    """Line 5 of Algorithm 1: the masks of the scores, and the last two thresholds."""
    del last  # the last masks lend the new ones their memory, no more
    # Extrapolate linearly from the last two thresholds.
    before, near = thresholds[:1], thresholds[1:]
    masks, found = selection.select(scores, keep, near + (near - before), magnitude=True)
    return masks, jnp.concatenate([near, found])


@meshes.program(
    like=lambda state, *_: (state, None), layers=lambda state, *_: state.scores, donate=(0,)
)
def _step(
    net: Network,
    state: _State,
    masks: list[Array],
    weights: tuple[Any, Any, Any],
    *,
    objective: Objective,
    update: Alike,
) -> tuple[_State, dict[str, Array]]:
    """Lines 6 to 8 of Algorithm 1."""
    directions, measured = direction(net, objective, weights, state.scores, masks)
    descent = jax.tree.map(jnp.negative, directions)
    # Some of optax's optimizers mix dtypes, which a user's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, memory = update(descent, state.optimizer, state.scores)
    return _State(optax.apply_updates(state.scores, updates), memory), measured
