"""FORCE: foresight connection sensitivity, by which removed weights can come back."""

from __future__ import annotations

import dataclasses

from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.saliency import InSteps, exponential, gradual
from dpai_jax.methods.snip import sensitivity


@dataclasses.dataclass(frozen=True)
class FORCE(InSteps):
    """Pruning in steps by |g(m⊙θ)·θ|, the gradient of the pruned network times the dense weights.

    A weight removed by one step may come back in the next. Step t of T keeps the fraction d^(t/T)
    of the weights, d being the density asked for.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> loss_fn = lambda params, batch: jnp.sum(batch @ params["w"])
      >>> data = {"loss_fn": loss_fn, "batches": [jnp.array([[0.0, 1.0, 2.0, 3.0]])]}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=dpai.FORCE(2), **data)
      >>> result.masks["w"].tolist()
      [[False, False], [False, False], [True, True], [True, True]]

    Attributes:
      steps: T.
      allocation: see `SNIP`.

    Raises:
      ValueError: if `steps` is less than 1.

    References:
      de Jorge et al., Progressive Skeletonization: Trimming more fat from a network at
      initialization, ICLR 2021.
    """

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        return gradual(
            problem,
            lambda masks, _: sensitivity(problem, masks),
            exponential(problem.sparsity, self.steps),
            self.allocation,
            revive=True,
        )
