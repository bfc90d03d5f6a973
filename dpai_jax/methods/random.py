"""Random pruning: the control that every comparison needs."""

from __future__ import annotations

import dataclasses

from dpai_jax.allocation import Allocation, erk
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.noise import normal_scores


@dataclasses.dataclass(frozen=True)
class Random:
    """Keeps weights at random, as many in each layer as its share of the whole says.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> method = dpai.Random()
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=method)
      >>> result.topology.weights
      4

    Attributes:
      allocation: weights to keep per layer, `allocation(net, sparsity)`: `dpai_jax.erk`,
        `dpai_jax.er`, `dpai_jax.uniform`, or another function of the same kind.

    References:
      Evci et al., Rigging the Lottery, ICML 2020 (ERK); Frankle et al., Pruning Neural Networks at
      Initialization: Why Are We Missing the Mark?, ICLR 2021.
    """

    allocation: Allocation = erk

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        scores = normal_scores(problem.net, problem.key, problem.params)
        return Pruned(problem.select(scores, problem.keep(self.allocation)), scores)
