"""DPaI: gradient ascent on scores that balances effective paths, nodes and kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dpai_jax.allocation import erk
from dpai_jax.masks import from_layers, largest
from dpai_jax.methods.base import Problem, Pruned, normal_scores, score_tree
from dpai_jax.paths import Layer, Network
from dpai_jax.paths.network import check_parallel
from dpai_jax.paths.trees import check_structure
from dpai_jax.topology import has_kernel, has_node

PyTree = Any

_ADAM = optax.adam(5e-3)

# Steps between two looks at the numbers: reading one waits for the device.
_READ_EVERY = 10


def ascent(
    net: Network, scores: PyTree, keep: PyTree, alpha: float = 0.99, beta: float = 0.5
) -> PyTree:
    """The direction in which one step of DPaI moves the scores.

    With m = top-k(|s|) in each layer and g = ∂ log R_P/∂m · sign(s), the straight-through gradient,

        d = (1 − α)·g + α·((1 − β)·g·[node ineffective] + β·g·[kernel ineffective]).

    The brackets are the limit γ → ∞ of the derivative of the paper's indicators of effective nodes
    and kernels. Pure, and jittable with `net` static.

    Args:
      net: the traced network.
      scores: pytree of scores parallel to the parameters.
      keep: pytree of the number of weights to keep per layer (see `dpai_jax.erk`).
      alpha: weight of nodes and kernels against paths, in [0, 1].
      beta: weight of kernels against nodes, in [0, 1].

    Returns:
      Pytree like `scores`; zero where nothing can be pruned.

    Raises:
      ValueError: if the scores or `keep` do not fit the network.

    References:
      DPaI (ICLR 2025), Algorithm 1, lines 5 to 8.
    """
    leaves = [jnp.asarray(s) for s in check_parallel(net, scores, "scores")]
    check_structure(keep, net.treedef, "keep", "params")
    return score_tree(net, _direction(net, leaves, net.leaves(keep), alpha, beta)[0])


def _direction(
    net: Network, scores: list[Array], keep: list[Any], alpha: float, beta: float
) -> tuple[list[Array], list[Array], dict[str, Array]]:
    """One step's direction, the masks it is taken at, and what was measured there."""
    masks = largest([jnp.abs(s) for s in scores], [jnp.int32(k) for k in keep])
    ones = [m.astype(jnp.float32) for m in masks]
    log_paths, gradients = jax.value_and_grad(net.log_count)(ones)
    directions, nodes, kernels = [], [], []
    for layer, s, m, g in zip(net.layers, scores, masks, gradients, strict=True):
        node, kernel = _effective(layer, m, g)
        push = jnp.where(node, 0.0, 1 - beta) + jnp.where(kernel, 0.0, beta)
        directions.append(((1 - alpha) + alpha * push) * g * jnp.sign(s))
        nodes.append(jnp.sum(node, dtype=jnp.int32))
        kernels.append(jnp.sum(kernel, dtype=jnp.int32))
    measured = {"log_paths": log_paths, "nodes": sum(nodes), "kernels": sum(kernels)}
    return directions, masks, measured


def _effective(layer: Layer, mask: Array, gradient: Array) -> tuple[Array, Array]:
    """Which nodes and kernels of a layer are effective, by the gradient of the path count."""
    effective = mask & (gradient > 0)
    return has_node(layer, effective), has_kernel(layer, effective)


class _State(NamedTuple):
    """What one step hands to the next: pytrees of arrays over the layers."""

    scores: list[Array]
    optimizer: Any
    masks: list[Array]
    unchanged: Array


@dataclasses.dataclass(frozen=True)
class DPaI:
    """Differentiable Pruning at Initialization.

    Attributes:
      alpha: weight of effective nodes and kernels against paths, in [0, 1].
      beta: weight of kernels against nodes, in [0, 1].
      steps: the largest number of steps T. The published code takes 3000; beyond some hundreds the
        scores' growth gathers the weights of a layer on ever fewer nodes.
      optimizer: makes the scores follow the direction of `ascent`: any optax optimiser.
        `optax.sgd(η)` is the plain ascent of the paper's Algorithm 1.
      allocation: weights to keep per layer, `allocation(net, sparsity)`.
      patience: ends after so many steps in a row that changed no mask.

    Raises:
      ValueError: if a number is out of its range.

    References:
      Xiang et al., DPaI: Differentiable Pruning at Initialization with Node-Path Balance
      Principle, ICLR 2025.
    """

    alpha: float = 0.99
    beta: float = 0.5
    steps: int = 300
    optimizer: optax.GradientTransformation = _ADAM
    allocation: Callable[[Network, float], PyTree] = erk
    patience: int = 50

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("steps", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        net = problem.net
        keep = self.allocation(net, problem.sparsity)
        scores = net.leaves(normal_scores(net, problem.key))
        counts = [jnp.asarray(k, jnp.int32) for k in net.leaves(keep)]
        state = _State(
            scores,
            self.optimizer.init(scores),
            [jnp.zeros(layer.shape, bool) for layer in net.layers],
            jnp.int32(0),
        )
        measured: list[dict[str, Any]] = []
        stopped = ""
        for t in range(self.steps):
            state, numbers = self._step(net, state, counts)
            measured.append(numbers)
            if t % _READ_EVERY == 0 or t == self.steps - 1:
                problem.report(t + 1, self.steps, jax.device_get(numbers))
                if int(state.unchanged) >= self.patience:
                    stopped = f"no mask changed in {int(state.unchanged)} steps"
                    break
        # One more look, at the masks of the final scores, which the step would move on.
        scores = score_tree(net, jax.tree.map(jnp.copy, state.scores))
        state, numbers = self._step(net, state, counts)
        measured.append(numbers)
        history = {
            name: np.asarray(jax.device_get([numbers[name] for numbers in measured]))
            for name in measured[0]
        }
        return Pruned(from_layers(net, state.masks), scores, history, stopped)

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
    def _step(
        self, net: Network, state: _State, keep: list[Array]
    ) -> tuple[_State, dict[str, Array]]:
        """One step of Algorithm 1."""
        directions, masks, measured = _direction(net, state.scores, keep, self.alpha, self.beta)
        changes = [jnp.sum(a != b) for a, b in zip(masks, state.masks, strict=True)]
        changed = functools.reduce(jnp.add, changes)
        descent = jax.tree.map(jnp.negative, directions)
        # Some of optax's optimisers mix dtypes, which a user's strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(descent, state.optimizer, state.scores)
        scores = optax.apply_updates(state.scores, updates)
        unchanged = jnp.where(changed == 0, state.unchanged + 1, 0)
        return _State(scores, optimizer, masks, unchanged), measured | {"changed": changed}
