"""Lottery tickets: iterative magnitude pruning with rewinding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from dpai_jax import checks
from dpai_jax.allocation import Allocation, check_allocation, global_threshold
from dpai_jax.masks import apply_masks
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.saliency import PyTree, gradual, magnitudes
from dpai_jax.tools.trees import check_structure


@dataclasses.dataclass(frozen=True)
class IMP:
    """Iterative magnitude pruning: train, remove the smallest weights, rewind, train again.

    Each round calls `train(params, masks)` from the same parameters, those given to
    `dpai_jax.prune`, under the masks so far, and removes the fraction of the weights that is
    smallest in magnitude after it; the last round removes just what is missing to the sparsity
    asked for. It is the expensive reference and no pruning at initialisation: it takes
    log(1 − sparsity)/log(1 − fraction) trainings.

    To rewind to step k (a few hundred, where θ_0 gives no winning ticket), pass the parameters at
    step k as `params`, and let `train` go on from there.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.arange(8.0).reshape(4, 2)}
      >>> method = dpai.IMP(train=lambda params, masks: params)  # your training
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=method)
      >>> result.masks["w"].tolist()
      [[False, False], [False, False], [True, True], [True, True]]

    Attributes:
      train: trains masked parameters and returns the trained ones, of the same structure.
      fraction: what a round removes of the weights that are left, in (0, 1).
      allocation: see `SNIP`.

    Raises:
      TypeError: if `train` is not callable.
      ValueError: if `fraction` is outside (0, 1).

    References:
      Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019; Frankle et al., Linear Mode
      Connectivity and the Lottery Ticket Hypothesis, ICML 2020.
    """

    train: Callable[[PyTree, PyTree], PyTree]
    fraction: float = 0.2
    allocation: Allocation = global_threshold

    def __post_init__(self) -> None:
        checks.function("train", self.train, "train(params, masks)")
        checks.number("fraction", self.fraction, "in (0, 1)", lambda f: 0 < f < 1)
        check_allocation(self.allocation)

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`); the scores are |θ| as last trained."""
        problem.weights()
        net = problem.net

        def saliency(left: list[Array], _: int) -> list[Array]:
            masks = net.tree(left, lambda: jnp.ones((), bool))
            trained = self.train(apply_masks(problem.params, masks), masks)
            check_structure(trained, net.treedef, "what train returns", "params")
            found: list[Array] = magnitudes(net, net.leaves(trained))
            return found

        # A hair less than the quotient, so that rounding makes no round of nothing.
        quotient = math.log1p(-problem.sparsity) / math.log1p(-self.fraction)
        rounds = max(1, math.ceil(quotient - 1e-9))
        sparsities = [1 - (1 - self.fraction) ** t for t in range(1, rounds)]
        return gradual(problem, saliency, [*sparsities, problem.sparsity], self.allocation)
