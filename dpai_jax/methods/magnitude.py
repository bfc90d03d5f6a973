"""Magnitude pruning, before training."""

from __future__ import annotations

import dataclasses

from dpai_jax.allocation import Allocation, check_allocation, global_threshold
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.saliency import magnitudes, one_shot


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Keeps the weights of the largest |θ|.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.arange(8.0).reshape(4, 2)}
      >>> method = dpai.Magnitude()
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=method)
      >>> result.masks["w"].tolist()
      [[False, False], [False, False], [True, True], [True, True]]

    Attributes:
      allocation: weights to keep, `allocation(net, sparsity)`: `dpai_jax.global_threshold` for one
        threshold over all layers, `dpai_jax.erk`, `dpai_jax.uniform` or the like for one a layer.

    References:
      Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015.
    """

    allocation: Allocation = global_threshold

    def __post_init__(self) -> None:
        check_allocation(self.allocation)

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`); the scores are |θ|."""
        saliencies = magnitudes(problem.net, problem.weights())
        return one_shot(problem, saliencies, self.allocation)
