"""ProsPr: prospect pruning, the sensitivity of the loss after some steps of training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from dpai_jax import checks
from dpai_jax.allocation import Allocation, check_allocation, global_threshold
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.saliency import PyTree, one_shot, scaled
from dpai_jax.paths import Network
from dpai_jax.tools import meshes
from dpai_jax.tools.signatures import Alike


@dataclasses.dataclass(frozen=True)
class ProsPr:
    """Scores a weight by |∂L(θ_M)/∂m|, where θ_M comes of M steps of SGD from θ_0 = m⊙θ.

    Step i takes batch i, the loss at the end that batch which follows; where there are fewer
    batches they come round again. All floating parameters are trained. The derivative runs back
    through the steps, second-order terms included. Scores are not normalised.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> loss_fn = lambda params, batch: jnp.sum(batch @ params["w"])
      >>> data = {"loss_fn": loss_fn, "batches": [jnp.array([[0.0, 1.0, 2.0, 3.0]])]}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=dpai.ProsPr(), **data)
      >>> result.masks["w"].tolist()
      [[False, False], [False, False], [True, True], [True, True]]

    Attributes:
      steps: M.
      learning_rate: of the steps.
      allocation: see `SNIP`.

    Raises:
      ValueError: if `steps` is less than 1 or the learning rate is not positive.

    References:
      Alizadeh et al., Prospect Pruning: Finding Trainable Weights at Initialization using
      Meta-Gradients, ICLR 2022.
    """

    steps: int = 3
    learning_rate: float = 0.1
    allocation: Allocation = global_threshold

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)
        checks.number("learning_rate", self.learning_rate, *checks.POSITIVE)
        check_allocation(self.allocation)

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        loss_fn, batches = problem.data()
        problem.weights()
        needed = [batches[i % len(batches)] for i in range(self.steps + 1)]
        saliencies = _meta_gradient(
            problem.net, problem.params, needed, self.learning_rate, loss_fn=loss_fn
        )
        return one_shot(problem, saliencies, self.allocation)


@meshes.program()
def _meta_gradient(
    net: Network, params: PyTree, batches: list[PyTree], learning_rate: float, *, loss_fn: Alike
) -> list[Array]:
    # Recomputed on the way back, so that only one step's activations are in memory at a time.
    @jax.checkpoint
    def step(params: PyTree, batch: PyTree) -> PyTree:
        gradients = jax.grad(loss_fn, allow_int=True)(params, batch)
        return jax.tree.map(
            lambda p, g: (
                p - jnp.asarray(learning_rate, p.dtype) * g
                if jnp.issubdtype(p.dtype, jnp.floating)
                else p
            ),
            params,
            gradients,
        )

    def loss_after(masks: list[Array]) -> Array:
        trained = functools.reduce(step, batches[:-1], scaled(net, params, masks))
        return loss_fn(trained, batches[-1])

    ones = [jnp.ones(layer.shape, jnp.float32) for layer in net.layers]
    return [jnp.abs(g).astype(jnp.float32) for g in jax.grad(loss_after)(ones)]
