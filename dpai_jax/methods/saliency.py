"""What the methods that score weights by a saliency share: derivatives, selection, schedules."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax.allocation import weights_to_keep
from dpai_jax.masks import binarize, ones
from dpai_jax.methods.base import Allocation, Loss, Problem, Pruned, score_tree
from dpai_jax.paths import Network

PyTree = Any

# From the layers' masks, as float32, and the number of the step: the layers' saliencies.
Saliency = Callable[[list[Array], int], list[Array]]


def one_shot(problem: Problem, saliencies: list[Array], allocation: Allocation) -> Pruned:
    """Keeps the weights of the highest saliencies."""
    check(problem.net, saliencies)
    scores = score_tree(problem.net, saliencies)
    return Pruned(binarize(scores, allocation(problem.net, problem.sparsity)), scores)


def gradual(
    problem: Problem,
    saliency: Saliency,
    sparsities: Sequence[float],
    allocation: Allocation,
    *,
    revive: bool = False,
) -> Pruned:
    """Prunes in steps, scoring anew what each has left.

    Args:
      problem: what to prune.
      saliency: the layers' saliencies under given masks.
      sparsities: those after each step; the last is the one asked for.
      allocation: weights to keep at a sparsity.
      revive: whether a weight that was removed may come back. If not, its score is −∞.

    Returns:
      The masks, and the scores of the last step; the history holds the weights kept by each step.
    """
    net = problem.net
    masks, kept = ones(net, problem.params), []
    for t, sparsity in enumerate(sparsities):
        present = [m.astype(jnp.float32) for m in net.leaves(masks)]
        saliencies = saliency(present, t)
        check(net, saliencies, warn=t == 0)
        if not revive:
            saliencies = [
                jnp.where(m > 0, s, -jnp.inf) for m, s in zip(present, saliencies, strict=True)
            ]
        scores = score_tree(net, saliencies)
        keep = allocation(net, sparsity)
        masks = binarize(scores, keep)
        kept.append(sum(int(np.sum(k)) for k in jax.tree.leaves(keep)))
        problem.report(t + 1, len(sparsities), {"weights": kept[-1]})
    return Pruned(masks, scores, {"weights": np.asarray(kept)})


@dataclasses.dataclass(frozen=True)
class InSteps:
    """The settings of a method that prunes in steps of falling density."""

    steps: int = 100
    allocation: Allocation = weights_to_keep

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def exponential(sparsity: float, steps: int) -> list[float]:
    """Sparsities whose densities fall by one factor a step: d^(t/T), and d itself at the end."""
    return [1 - (1 - sparsity) ** (t / steps) for t in range(1, steps)] + [sparsity]


def check(net: Network, saliencies: list[Array], *, warn: bool = True) -> None:
    """Refuses saliencies that are no numbers, and warns of layers where all of them are zero.

    Raises:
      ValueError: if one is NaN.
    """
    flags = jax.device_get(_flags(saliencies))
    for layer, (is_nan, _) in zip(net.layers, flags, strict=True):
        if is_nan:
            raise ValueError(
                f"the saliency of a weight of {layer.name} is NaN: is the loss finite at params?"
            )
    silent = [layer.name for layer, (_, zero) in zip(net.layers, flags, strict=True) if zero]
    if warn and silent:
        warnings.warn(
            f"all saliencies are 0 in {', '.join(silent)}, as next to kernels that are zero at "
            "initialisation: which of their weights stay is arbitrary",
            stacklevel=5,  # the call of prune
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
    """The parameters with the layers' weights multiplied by float32 factors, in their own dtype."""
    pairs = zip(net.leaves(params), factors, strict=True)
    return put(net, params, [w * f.astype(w.dtype) for w, f in pairs])


def mask_gradient(problem: Problem, masks: list[Array]) -> list[Array]:
    """∂L/∂m at these masks, the mean over all batches."""
    loss_fn, batches = problem.data()
    problem.weights()
    gradients = (
        _mask_gradient(loss_fn, problem.net, problem.params, masks, batch) for batch in batches
    )
    return mean(gradients)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mask_gradient(
    loss_fn: Loss, net: Network, params: PyTree, masks: list[Array], batch: PyTree
) -> list[Array]:
    return jax.grad(lambda m: loss_fn(scaled(net, params, m), batch))(masks)


def mean(trees: Any) -> Any:
    """The mean of several trees of arrays, of which one at a time is held."""
    total, n = None, 0
    for n, tree in enumerate(trees, 1):  # noqa: B007  (their number is what it ends with)
        total = tree if total is None else jax.tree.map(jnp.add, total, tree)
    return jax.tree.map(lambda x: x / n, total)
