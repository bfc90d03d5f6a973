"""ProsPr: prospect pruning, the sensitivity of the loss after some steps of training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from dpai_jax.allocation import weights_to_keep
from dpai_jax.methods.base import Allocation, Loss, Problem, Pruned
from dpai_jax.methods.saliency import PyTree, one_shot, scaled
from dpai_jax.paths import Network


@dataclasses.dataclass(frozen=True)
class ProsPr:
    """Scores a weight by |∂L(θ_M)/∂m|, where θ_M comes of M steps of SGD from θ_0 = m⊙θ.

    Step i takes batch i, the loss at the end that batch which follows; where there are fewer
    batches they come round again. All floating parameters are trained. The derivative runs back
    through the steps, second-order terms included. Scores are not normalised.

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
    allocation: Allocation = weights_to_keep

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`)."""
        loss_fn, batches = problem.data()
        problem.weights()
        needed = [batches[i % len(batches)] for i in range(self.steps + 1)]
        saliencies = _meta_gradient(
            loss_fn, problem.net, problem.params, needed, self.learning_rate
        )
        return one_shot(problem, saliencies, self.allocation)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _meta_gradient(
    loss_fn: Loss, net: Network, params: PyTree, batches: list[PyTree], learning_rate: float
) -> list[Array]:
    # Recomputed on the way back, so that one step's activations are held at a time.
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

    ones = [jnp.ones(layer.shape) for layer in net.layers]
    return [jnp.abs(g) for g in jax.grad(loss_after)(ones)]
