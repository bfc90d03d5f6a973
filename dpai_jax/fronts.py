"""The front of what can be had at once: paths, nodes and kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array

from dpai_jax import checks
from dpai_jax.many import prune_many
from dpai_jax.methods.dpai import DPaI
from dpai_jax.pruning import Result
from dpai_jax.tools.trees import shown

PyTree = Any

ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


def pareto(
    fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    sparsity: float,
    *,
    alphas: Sequence[float] = ALPHAS,
    method: DPaI | None = None,
    key: Array | None = None,
    **settings: Any,
) -> list[Result]:
    """Prunes with several α in one program, and returns the front.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> normal = jax.random.normal
      >>> params = {"hidden": normal(jax.random.key(0), (16, 32)), "out": jnp.ones((32, 4))}
      >>> front = dpai.pareto(fn, params, jnp.ones((1, 16)), 0.8, alphas=(0.0, 0.5))
      >>> nodes = [result.topology.nodes for result in front]
      >>> nodes == sorted(nodes)
      True

    Args:
      fn: the network, `fn(params, x)`.
      params: pytree of arrays.
      x: an input, or the shape of one.
      sparsity: the fraction of prunable weights to remove, in [0, 1).
      alphas: the weights of nodes and kernels against paths, each in [0, 1].
      method: the other settings; those of `DPaI()` if not given.
      key: as for `prune`.
      **settings: what else `prune` takes: `repair`, `granularity`, `prunable`, `gates`, `progress`.

    Returns:
      The results, in the order of `alphas`, that no other one equals or surpasses in the number of
      paths, of nodes and of kernels at once. Of equal ones the first is returned.

    Raises:
      TypeError, ValueError, NotImplementedError: as `prune`; and if `alphas` are no such numbers.
    """
    method = DPaI() if method is None else method
    if not isinstance(method, DPaI):
        raise TypeError(f"method must be a dpai.DPaI, got {shown(method)}")
    if np.ndim(alphas) != 1 or not len(alphas):
        raise ValueError(f"alphas must be a sequence of numbers, got {shown(alphas)}")
    for alpha in alphas:
        checks.number("alphas", alpha, *checks.FRACTION)
    methods = [dataclasses.replace(method, alpha=float(alpha)) for alpha in alphas]
    results = prune_many(fn, params, x, sparsity, method=methods, key=key, **settings)
    found = np.array([[t.log_paths, t.nodes, t.kernels] for t in (r.topology for r in results)])
    return [results[i] for i in range(len(results)) if not _is_surpassed(found, i)]


def _is_surpassed(found: np.ndarray, i: int) -> bool:
    """Whether a row is nowhere above another one, or equals one before it."""
    at_least = np.all(found >= found[i], axis=1)
    above = np.any(found > found[i], axis=1)
    return bool(np.any(at_least & above) or np.any(at_least[:i]))
