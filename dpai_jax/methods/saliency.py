"""Shared by methods that score weights by a saliency: derivatives, selection, schedules."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
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
from dpai_jax.tools.host import Quick
from dpai_jax.tools.rows import are_small, by_groups, counts_of, groups_of, in_order

PyTree = Any

# Takes the layers' boolean masks and the step's number; returns the layers' saliencies.
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
    masks, kept = ones(problem), []
    for t, sparsity in enumerate(sparsities):
        scores = saliency(masks, t)
        check(problem, scores, warn=t == 0)
        if not revive:
            scores = by_groups(_left, problem.net, scores, masks)
        keep = problem.keep(allocation, sparsity)
        masks = problem.select(scores, keep)
        kept.append(problem.weights_of(keep, masks))
        problem.report(t + 1, len(sparsities), {"weights": kept[-1]})
    return Pruned(masks, scores, {"weights": np.asarray(kept)})


def ones(problem: Problem) -> list[Array]:
    """The layers' masks before pruning, all true, sharded like the weights."""
    net = problem.net
    arrays = [np.ones(layer.shape, bool) for layer in net.layers]
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
    layers, groups = problem.net.layers, groups_of(problem.net, saliencies)
    found = jax.device_get([_counts(group.owner, group.of(saliencies)) for group in groups])
    numbers = in_order(groups, found)
    for layer, (n_nan, _) in zip(layers, numbers, strict=True):
        if n_nan:
            culprit = "loss_fn" if problem.given.is_used else "params"
            raise ValueError(
                f"{culprit} must be finite, but the saliency of a weight of {layer.name} is NaN"
            )
    silent = [layer.name for layer, (_, n) in zip(layers, numbers, strict=True) if n == 0]
    if warn and silent:
        warnings.warn(
            f"all saliencies are 0 in {', '.join(silent)}, as next to kernels that are zero at "
            "initialisation: which of their weights stay is arbitrary",
            stacklevel=6,  # the call of prune
        )


@meshes.program(layers=lambda saliencies: saliencies, by_numpy=lambda: Quick(_counts_by_numpy))
def _counts(_: Network | None, saliencies: list[Array]) -> Array:
    """How many saliencies of each layer are NaN, and how many are not zero: (layer, 2)."""
    small = are_small(saliencies)
    tests = jnp.isnan, lambda s: s != 0
    return jnp.stack([counts_of(saliencies, small, test) for test in tests], 1)


def _counts_by_numpy(saliencies: list[np.ndarray]) -> np.ndarray:
    numbers = [(np.count_nonzero(np.isnan(s)), np.count_nonzero(s)) for s in saliencies]
    return np.asarray(numbers, np.uint32)


@meshes.program(like=lambda scores, _: scores, layers=lambda scores, _: scores, by_numpy="exactly")
def _left(_: Network | None, scores: list[Array], masks: list[Array]) -> list[Array]:
    """The scores of the weights that are left; −∞ for the others."""
    return [jnp.where(m, s, -jnp.inf) for m, s in zip(masks, scores, strict=True)]


@meshes.program(like=lambda arrays: arrays, layers=lambda arrays: arrays, by_numpy="exactly")
def magnitudes(_: Network, arrays: list[Array]) -> list[Array]:
    """The magnitudes of each layer's entries, in float32."""
    return [jnp.abs(x).astype(jnp.float32) for x in arrays]


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


def mean(trees: Iterable[PyTree]) -> PyTree:
    """The mean of trees of arrays, which are added up one at a time."""
    total, n = None, 0
    for n, tree in enumerate(trees, 1):  # noqa: B007  (n is used after the loop)
        total = tree if total is None else _sum(total, tree)
    return total if n == 1 else _quotient(total, n)


@jax.jit
def _sum(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, one, other)


@jax.jit
def _quotient(total: PyTree, n: Array) -> PyTree:
    return jax.tree.map(lambda x: x / n, total)
