"""GraSP: gradient signal preservation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from dpai_jax.allocation import Allocation, check_allocation, global_threshold
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.saliency import PyTree, mean, one_shot, put
from dpai_jax.paths import Network
from dpai_jax.tools import meshes
from dpai_jax.tools.signatures import Alike


@dataclasses.dataclass(frozen=True)
class GraSP:
    """Keeps the weights whose removal would lower the norm of the gradient most.

    The score is θ⊙Hg, signed and not normalised, and the largest are kept; g is the gradient and H
    the Hessian of the mean loss of all batches, over the prunable weights. (The paper removes the
    largest of −θ⊙Hg.) The product Hg is a derivative of the gradient along g, forward over
    reverse; no Hessian is formed, and one batch is differentiated at a time.

    The paper divides logits by a temperature of 200; that is up to `loss_fn`.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> loss_fn = lambda params, batch: jnp.sum((batch @ params["w"]) ** 2)
      >>> data = {"loss_fn": loss_fn, "batches": [jnp.array([[0.0, 1.0, 2.0, 3.0]])]}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=dpai.GraSP(), **data)
      >>> result.masks["w"].tolist()
      [[False, False], [False, False], [True, True], [True, True]]

    Attributes:
      allocation: see `SNIP`.

    References:
      Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020.
    """

    allocation: Allocation = global_threshold

    def __post_init__(self) -> None:
        check_allocation(self.allocation)

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        loss_fn, batches = problem.data()
        net, params, weights = problem.net, problem.params, problem.weights()
        g = mean(_gradient(net, params, weights, batch, loss_fn=loss_fn) for batch in batches)
        each = (_saliencies(net, params, weights, g, batch, loss_fn=loss_fn) for batch in batches)
        return one_shot(problem, mean(each), self.allocation)


@meshes.program()
def _gradient(
    net: Network, params: PyTree, weights: list[Array], batch: PyTree, *, loss_fn: Alike
) -> list[Array]:
    return jax.grad(lambda w: loss_fn(put(net, params, w), batch))(weights)


@meshes.program()
def _saliencies(
    net: Network,
    params: PyTree,
    weights: list[Array],
    direction: list[Array],
    batch: PyTree,
    *,
    loss_fn: Alike,
) -> list[Array]:
    """The weights times the product of the Hessian of one batch's loss and a direction."""

    def gradient(weights: list[Array]) -> list[Array]:
        gradients: list[Array] = _gradient(net, params, weights, batch, loss_fn=loss_fn)
        return gradients

    products = jax.jvp(gradient, (weights,), (direction,))[1]
    pairs = zip(weights, products, strict=True)
    return [w.astype(jnp.float32) * h.astype(jnp.float32) for w, h in pairs]
