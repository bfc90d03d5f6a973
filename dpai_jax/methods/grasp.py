"""GraSP: gradient signal preservation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from dpai_jax.allocation import weights_to_keep
from dpai_jax.methods.base import Allocation, Loss, Problem, Pruned
from dpai_jax.methods.saliency import PyTree, mean, one_shot, put
from dpai_jax.paths import Network


@dataclasses.dataclass(frozen=True)
class GraSP:
    """Keeps the weights whose removal would lower the norm of the gradient most.

    The score is θ⊙Hg, signed and not normalised, and the largest are kept; g is the gradient and H
    the Hessian of the mean loss of all batches, over the prunable weights. (The paper removes the
    largest of −θ⊙Hg.) The product Hg is a derivative of the gradient along g, forward over
    reverse; no Hessian is formed, and one batch is differentiated at a time.

    The paper divides logits by a temperature of 200; that is up to `loss_fn`.

    Attributes:
      allocation: see `SNIP`.

    References:
      Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020.
    """

    allocation: Allocation = weights_to_keep

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        loss_fn, batches = problem.data()
        net, params, weights = problem.net, problem.params, problem.weights()
        g = mean(_gradient(loss_fn, net, params, weights, batch) for batch in batches)
        hg = mean(_product(loss_fn, net, params, weights, g, batch) for batch in batches)
        saliencies = [
            w.astype(jnp.float32) * h.astype(jnp.float32) for w, h in zip(weights, hg, strict=True)
        ]
        return one_shot(problem, saliencies, self.allocation)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(
    loss_fn: Loss, net: Network, params: PyTree, weights: list[Array], batch: PyTree
) -> list[Array]:
    return jax.grad(lambda w: loss_fn(put(net, params, w), batch))(weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _product(
    loss_fn: Loss,
    net: Network,
    params: PyTree,
    weights: list[Array],
    direction: list[Array],
    batch: PyTree,
) -> list[Array]:
    """The Hessian of one batch's loss times a direction."""

    def gradient(weights: list[Array]) -> list[Array]:
        return _gradient(loss_fn, net, params, weights, batch)

    return jax.jvp(gradient, (weights,), (direction,))[1]
