"""NTK-SAP: pruning that keeps the spectrum of the neural tangent kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from dpai_jax import checks
from dpai_jax.allocation import Allocation, check_allocation, global_threshold
from dpai_jax.methods.base import Problem, Pruned
from dpai_jax.methods.noise import normal_scores
from dpai_jax.methods.saliency import (
    PyTree,
    exponential,
    gradual,
    put,
    scaled,
)
from dpai_jax.paths import Network
from dpai_jax.tools import meshes
from dpai_jax.tools.signatures import Alike


@dataclasses.dataclass(frozen=True)
class NTKSAP:
    """Keeps the weights that the output's response to a change of the weights depends on most.

    The score is |∂/∂m ‖f(x; θ⊙m) − f(x; (θ + εz)⊙m)‖²|, an estimate of a weight's part in the trace
    of the neural tangent kernel, with x and z drawn from N(0, 1). Each step draws x, z and the
    weights anew, so that no one initialisation decides. Step t of T keeps the fraction d^(t/T) of
    the weights, d being the density asked for; what a step removed stays removed, and has the score
    −∞. Scores are not normalised. Needs no data.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.arange(8.0).reshape(4, 2)}
      >>> method = dpai.NTKSAP(steps=2)
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=method)
      >>> result.topology.weights
      4

    Attributes:
      steps: T.
      epsilon: ε, the size of the change.
      init: draws parameters, `init(key)`. If not given, each kernel is drawn from a normal
        distribution of its own mean and deviation in `params`, and the rest stays as it is.
      allocation: see `SNIP`.

    Raises:
      ValueError: if `steps` is less than 1 or `epsilon` is not positive.

    References:
      Wang et al., NTK-SAP: Improving neural network pruning by aligning training dynamics, ICLR
      2023.
    """

    steps: int = 100
    epsilon: float = 1e-2
    init: Callable[[Array], PyTree] | None = None
    allocation: Allocation = global_threshold

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)
        checks.number("epsilon", self.epsilon, *checks.POSITIVE)
        if self.init is not None:
            checks.function("init", self.init, "init(key)")
        check_allocation(self.allocation)

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`).

        Raises:
          ValueError: if an input of the network is not floating.
        """
        problem.weights()
        for leaf in jax.tree.leaves(problem.x):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(f"x must be floating, as NTKSAP draws it, but is {leaf.dtype}")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), problem.x)
        net = problem.net

        def saliency(masks: list[Array], t: int) -> list[Array]:
            drawn, noise, inputs = jax.random.split(jax.random.fold_in(problem.key, t), 3)
            if self.init is None:
                own = normal_scores(net, drawn, problem.params)
                params = put(net, problem.params, _redraw(net, problem.weights(), own))
            else:
                params = self.init(drawn)
            x = _normal_like(inputs, shapes)
            z = normal_scores(net, noise, params)
            return _response(net, params, z, self.epsilon, x, masks, fn=Alike(problem.fn))

        return gradual(
            problem, saliency, exponential(problem.sparsity, self.steps), self.allocation
        )


@meshes.program()
def _response(
    net: Network,
    params: PyTree,
    z: list[Array],
    epsilon: float,
    x: PyTree,
    masks: list[Array],
    *,
    fn: Alike,
) -> list[Array]:
    weights = net.leaves(params)
    moved = [w + (epsilon * d).astype(w.dtype) for w, d in zip(weights, z, strict=True)]

    def distance(masks: list[Array]) -> Array:
        outputs = [fn(scaled(net, p, masks), x) for p in (params, put(net, params, moved))]
        squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), *outputs)
        return functools.reduce(jnp.add, jax.tree.leaves(squares)).astype(jnp.float32)

    floats = [m.astype(jnp.float32) for m in masks]
    return [jnp.abs(g) for g in jax.grad(distance)(floats)]


@meshes.program(like=lambda weights, _: weights, layers=lambda weights, _: weights)
def _redraw(_: Network, weights: list[Array], noise: list[Array]) -> list[Array]:
    pairs = zip(weights, noise, strict=True)
    return [jnp.mean(w) + jnp.std(w) * n.astype(w.dtype) for w, n in pairs]


def _normal_like(key: Array, tree: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)
