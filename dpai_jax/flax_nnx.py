"""Flax NNX: a module as a function of its parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

PyTree = Any


def from_nnx(model: Any) -> tuple[Callable[[PyTree, PyTree], PyTree], PyTree]:
    """A Flax NNX module as a pure function and its parameters, for `dpai_jax.prune`.

    The function runs the module as in evaluation: batch norm uses its running statistics, dropout
    does nothing. The module itself is left as it is.

    Example:
      >>> import jax, jax.numpy as jnp, optax, dpai_jax as dpai
      >>> from flax import nnx
      >>> model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
      >>> fn, params = dpai.from_nnx(model)
      >>> result = dpai.prune(fn, params, jnp.ones((1, 16)), 0.75, method=dpai.Random())
      >>> nnx.update(model, dpai.apply_masks(params, result.masks))
      >>> tx = dpai.keep_pruned(optax.adamw(1e-3), result.masks)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    Args:
      model: the module.

    Returns:
      `fn(params, x)`, and the state of the module's `nnx.Param` variables.

    Raises:
      TypeError: if `model` is not a Flax NNX module.
    """
    # If there is a module, Flax has been imported. The library itself does not need Flax.
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a Flax NNX module, got a {type(model).__name__}")
    evaluated = nnx.clone(model)
    evaluated.eval()
    graphdef, params, others = nnx.split(evaluated, nnx.Param, ...)

    def fn(params: PyTree, x: PyTree) -> PyTree:
        return nnx.merge(graphdef, params, others, copy=True)(x)

    return fn, params
