"""Shared by methods that score weights by a saliency: derivatives, selection, schedules."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks
from dpai_jax.allocation import Allocation, check_allocation, global_threshold
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.paths import Network
from dpai_jax.tools import meshes
from dpai_jax.tools.signatures import Alike

PyTree = Any

# Takes the layers' masks, as float32, and the step's number; returns the layers' saliencies.
Saliency = Callable[[list[Array], int], list[Array]]


def one_shot(problem: Problem, saliencies: list[Array], allocation: Allocation) -> Pruned:
    """Keeps the weights of the highest saliencies."""
    check(problem, saliencies)
    return Pruned(problem.select(saliencies, problem.keep(allocation)), saliencies)


def gradual(
    problem: Problem,
    saliency: Saliency,
    sparsities: Sequence[float],
    allocation: Allocation,
    *,
    revive: bool = False,
) -> Pruned:
    """Prunes in steps; each scores the weights that the last one left.

    Args:
      problem: what to prune.
      saliency: the layers' saliencies under given masks.
      sparsities: the sparsity after each step; the last is the one asked for.
      allocation: weights to keep at a sparsity.
      revive: whether a removed weight can come back. If not, its score is −∞.

    Returns:
      The masks, and the scores of the last step; the history holds the weights kept by each step.
    """
    masks, kept = [m > 0 for m in ones(problem)], []
    for t, sparsity in enumerate(sparsities):
        present = [m.astype(jnp.float32) for m in masks]
        scores = saliency(present, t)
        check(problem, scores, warn=t == 0)
        if not revive:
            scores = [jnp.where(m, s, -jnp.inf) for m, s in zip(masks, scores, strict=True)]
        keep = problem.keep(allocation, sparsity)
        masks = problem.select(scores, keep)
        kept.append(problem.weights_of(keep, masks))
        problem.report(t + 1, len(sparsities), {"weights": kept[-1]})
    return Pruned(masks, scores, {"weights": np.asarray(kept)})


def ones(problem: Problem) -> list[Array]:
    """The layers' masks before pruning, all ones in float32, sharded like the weights."""
    net = problem.net
    arrays = [jnp.ones(layer.shape, jnp.float32) for layer in net.layers]
    placed: list[Array] = meshes.device_put_like(arrays, net.leaves(problem.params))
    return placed


@dataclasses.dataclass(frozen=True)
class InSteps:
    """The settings of a method that prunes in steps of falling density."""

    steps: int = 100
    allocation: Allocation = global_threshold

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)
        check_allocation(self.allocation)


def exponential(sparsity: float, steps: int) -> list[float]:
    """Sparsities whose densities fall by the same factor each step: d^(t/T), d at the end."""
    return [1 - (1 - sparsity) ** (t / steps) for t in range(1, steps)] + [sparsity]


def check(problem: Problem, saliencies: list[Array], *, warn: bool = True) -> None:
    """Raises a ValueError if a saliency is NaN; warns of layers whose saliencies are all zero."""
    flags = jax.device_get(_flags(saliencies))
    layers = problem.net.layers
    for layer, (is_nan, _) in zip(layers, flags, strict=True):
        if is_nan:
            culprit = "loss_fn" if problem.given.is_used else "params"
            raise ValueError(
                f"{culprit} must be finite, but the saliency of a weight of {layer.name} is NaN"
            )
    silent = [layer.name for layer, (_, zero) in zip(layers, flags, strict=True) if zero]
    if warn and silent:
        warnings.warn(
            f"all saliencies are 0 in {', '.join(silent)}, as next to kernels that are zero at "
            "initialisation: which of their weights stay is arbitrary",
            stacklevel=6,  # the call of prune
        )


@jax.jit
def _flags(saliencies: list[Array]) -> list[tuple[Array, Array]]:
    return [(jnp.any(jnp.isnan(s)), jnp.all(s == 0)) for s in saliencies]


def put(net: Network, params: PyTree, weights: list[Array]) -> PyTree:
    """The parameters with other weights at the layers."""
    leaves = net.treedef.flatten_up_to(params)
    for layer, w in zip(net.layers, weights, strict=True):
        leaves[layer.index] = w
    return net.treedef.unflatten(leaves)


def scaled(net: Network, params: PyTree, factors: list[Array]) -> PyTree:
    """The parameters with the layers' weights multiplied by factors; dtypes stay."""
    pairs = zip(net.leaves(params), factors, strict=True)
    return put(net, params, [w * f.astype(w.dtype) for w, f in pairs])


def mask_gradient(problem: Problem, masks: list[Array]) -> list[Array]:
    """∂L/∂m at these masks, the mean over all batches."""
    loss_fn, batches = problem.data()
    problem.weights()
    return mean(
        _mask_gradient(problem.net, problem.params, masks, batch, loss_fn=loss_fn)
        for batch in batches
    )


@meshes.program()
def _mask_gradient(
    net: Network, params: PyTree, masks: list[Array], batch: PyTree, *, loss_fn: Alike
) -> list[Array]:
    gradients = jax.grad(lambda m: loss_fn(scaled(net, params, m), batch))(masks)
    return [g.astype(jnp.float32) for g in gradients]


def mean(trees: Any) -> Any:
    """The mean of trees of arrays, which are added up one at a time."""
    total, n = None, 0
    for n, tree in enumerate(trees, 1):  # noqa: B007  (n is used after the loop)
        total = tree if total is None else jax.tree.map(jnp.add, total, tree)
    return jax.tree.map(lambda x: x / n, total)
