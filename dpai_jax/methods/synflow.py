"""SynFlow: the synaptic flow, paths weighed by the magnitudes of their weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from dpai_jax import counts
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.saliency import InSteps, exponential, gradual
from dpai_jax.paths import Network
from dpai_jax.tools import meshes


@dataclasses.dataclass(frozen=True)
class SynFlow(InSteps):
    """Keeps the weights that the most flow passes, in steps that let no layer run dry.

    With R = Σ_paths Π |θ|, the number of paths with |θ| in place of the masks, the score of a
    weight is its share of the flow, θ ∂ log R/∂θ: the paper's ∂R/∂θ ⊙ θ normalised by R, which is
    one number for all weights and would overflow on deep networks. Step t of T keeps the fraction
    d^(t/T) of the weights, d being the density asked for; what a step removed stays removed, and
    has the score −∞. Needs no data.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.arange(8.0).reshape(4, 2)}
      >>> method = dpai.SynFlow(steps=2)
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=method)
      >>> result.masks["w"].tolist()
      [[False, False], [False, False], [True, True], [True, True]]

    Attributes:
      steps: T.
      allocation: see `SNIP`.

    Raises:
      ValueError: if `steps` is less than 1.

    References:
      Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic
      flow, NeurIPS 2020.
    """

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        weights = problem.weights()
        return gradual(
            problem,
            lambda masks, _: _flow(problem.net, weights, masks),
            exponential(problem.sparsity, self.steps),
            self.allocation,
        )


@meshes.program(like=lambda _, masks: masks, layers=lambda _, masks: masks)
def _flow(net: Network, weights: list[Array], masks: list[Array]) -> list[Array]:
    strengths = [jnp.abs(w).astype(jnp.float32) * m for w, m in zip(weights, masks, strict=True)]
    gradients = jax.grad(functools.partial(counts.log_count, net))(strengths, "exact")
    return [s * g for s, g in zip(strengths, gradients, strict=True)]
