"""SynFlow: the synaptic flow, paths weighed by the magnitudes of their weights."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dpai_jax import counts
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.saliency import InSteps, exponential, gradual, magnitudes
from dpai_jax.paths import Network
from dpai_jax.paths.counting import EXACT
from dpai_jax.stages import chain_for, multiplied, pulled_behind, pulled_to_masks
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
        strengths = magnitudes(problem.net, problem.weights())
        return gradual(
            problem,
            lambda masks, _: _flow(problem.net, strengths, masks),
            exponential(problem.sparsity, self.steps),
            self.allocation,
        )

    def compile_ahead(self, problem: Problem) -> None:
        """Starts to compile what `run` needs."""
        weights = problem.net.leaves(problem.params)
        strengths, masks = (meshes.shapes_like(weights, dtype) for dtype in (jnp.float32, bool))
        _flow(problem.net, strengths, masks, ahead=True)


def _flow(
    net: Network, strengths: list[Any], masks: list[Any], *, ahead: bool = False
) -> list[Array]:
    """Each weight's share of the flow that passes the masks.

    Args:
      net: the traced network.
      strengths: |θ| of each layer, or its shape.
      masks: for each layer a boolean array, or its shape.
      ahead: whether only to start to compile this.

    Returns:
      For each layer a float32 array; nothing of use ahead.
    """
    calls = chain_for(net, masks, EXACT)
    if not calls:
        if ahead:
            _flow_at_once.ahead(net, strengths, masks)
            return masks
        found: list[Array] = _flow_at_once(net, strengths, masks)
        return found
    return pulled_to_masks(net, calls, _flow_behind, masks, strengths, ahead=ahead)


@meshes.program(like=lambda _, masks: masks, layers=lambda _, masks: masks)
def _flow_at_once(net: Network, strengths: list[Array], masks: list[Array]) -> list[Array]:
    left = multiplied(masks, strengths)
    gradients = jax.grad(functools.partial(counts.log_count, net))(left, "exact")
    return [s * g for s, g in zip(left, gradients, strict=True)]


@meshes.program()
def _flow_behind(_: Network, *pulled: Any, **of_stage: Any) -> list[Array | None]:
    """What is pulled back through one stage; of masks that end here, the flow."""
    return pulled_behind(operator.mul, *pulled, **of_stage)
