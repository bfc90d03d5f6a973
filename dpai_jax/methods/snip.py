"""SNIP: the change of the loss where a weight is removed, to first order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from dpai_jax.allocation import Allocation, check_allocation, global_threshold
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.saliency import (
    InSteps,
    PyTree,
    exponential,
    gradual,
    magnitudes,
    mean,
    one_shot,
    ones,
    scaled,
)
from dpai_jax.paths import Network
from dpai_jax.tools import meshes
from dpai_jax.tools.signatures import Alike


@dataclasses.dataclass(frozen=True)
class SNIP:
    """Single-shot network pruning by connection sensitivity |∂L/∂m| = |g·θ|.

    The derivative is that of the mean loss of all batches, by the mask at one. Scores are not
    normalised.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> loss_fn = lambda params, batch: jnp.sum(batch @ params["w"])
      >>> data = {"loss_fn": loss_fn, "batches": [jnp.array([[0.0, 1.0, 2.0, 3.0]])]}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=dpai.SNIP(), **data)
      >>> result.masks["w"].tolist()
      [[False, False], [False, False], [True, True], [True, True]]

    Attributes:
      allocation: weights to keep, `allocation(net, sparsity)`: `dpai_jax.global_threshold` for one
        threshold over all layers, `dpai_jax.erk` or the like for one a layer.

    References:
      Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019.
    """

    allocation: Allocation = global_threshold

    def __post_init__(self) -> None:
        check_allocation(self.allocation)

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        return one_shot(problem, sensitivity(problem, ones(problem)), self.allocation)


def sensitivity(problem: Problem, masks: list[Array]) -> list[Array]:
    """|∂L/∂m| at these masks, which is |g(m⊙θ)·θ|."""
    loss_fn, batches = problem.data()
    problem.weights()
    net, params = problem.net, problem.params
    found: list[Array] = magnitudes(
        net, mean(_gradient(net, params, masks, batch, loss_fn=loss_fn) for batch in batches)
    )
    return found


@meshes.program()
def _gradient(
    net: Network, params: PyTree, masks: list[Array], batch: PyTree, *, loss_fn: Alike
) -> list[Array]:
    """∂L/∂m of one batch."""
    floats = [m.astype(jnp.float32) for m in masks]
    return jax.grad(lambda m: loss_fn(scaled(net, params, m), batch))(floats)


@dataclasses.dataclass(frozen=True)
class IterativeSNIP(InSteps):
    """SNIP in steps: the sensitivity is taken anew on what each step has left.

    Step t of T keeps the fraction d^(t/T) of the weights, d being the density asked for. What a
    step removed stays removed; its score is −∞.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> loss_fn = lambda params, batch: jnp.sum(batch @ params["w"])
      >>> data = {"loss_fn": loss_fn, "batches": [jnp.array([[0.0, 1.0, 2.0, 3.0]])]}
      >>> result = dpai.prune(
      ...     fn, params, jnp.ones((1, 4)), 0.5, method=dpai.IterativeSNIP(2), **data
      ... )
      >>> result.masks["w"].tolist()
      [[False, False], [False, False], [True, True], [True, True]]

    Attributes:
      steps: T.
      allocation: see `SNIP`.

    Raises:
      ValueError: if `steps` is less than 1.

    References:
      de Jorge et al., Progressive Skeletonization: Trimming more fat from a network at
      initialization, ICLR 2021; Verdenius et al., Pruning via Iterative Ranking of Sensitivity
      Statistics, 2020.
    """

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        return gradual(
            problem,
            lambda masks, _: sensitivity(problem, masks),
            exponential(problem.sparsity, self.steps),
            self.allocation,
        )
