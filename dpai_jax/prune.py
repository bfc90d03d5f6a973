"""The one call: from a network function and a sparsity to masks."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from dpai_jax import masks as mask_trees
from dpai_jax.allocation import weights_to_keep
from dpai_jax.methods.base import Loss, Method, Problem, Pruned, Report
from dpai_jax.methods.dpai import DPaI
from dpai_jax.paths import Network, trace
from dpai_jax.paths.meshes import placed_like
from dpai_jax.progress import ProgressLine
from dpai_jax.repair import repair as repair_masks
from dpai_jax.topology import Topology, topology

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Result:
    """A pruned network.

    Attributes:
      masks: pytree of boolean masks parallel to the parameters, sharded as these are; `True` for a
        leaf that cannot be pruned. Exactly `round((1 − sparsity)·N)` weights are kept.
      scores: pytree of the scores that the masks were made of, likewise; `0.` for such a leaf.
      topology: what remains of the network.
      history: arrays of one length, what the method measured at each step (for DPaI log R_P as
        `log_paths`, R_N as `nodes`, and R_C as `kernels`).
      stopped: why the method ended before its last step, or an empty string.
      seconds: the time that it took, compilation included.
      net: the traced network.
    """

    masks: PyTree
    scores: PyTree
    topology: Topology
    history: Mapping[str, np.ndarray]
    stopped: str
    seconds: float
    net: Network


def prune(
    fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    sparsity: float,
    method: Method | None = None,
    key: Array | None = None,
    *,
    loss_fn: Loss | None = None,
    batches: Iterable[PyTree] = (),
    repair: bool = False,
    prunable: Callable[[str, Any], bool] | None = None,
    gates: str = "balanced",
    progress: bool | Report | None = None,
) -> Result:
    """Prunes a network before it is trained.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((16, 32)), "out": jnp.ones((32, 4))}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 16)), sparsity=0.9, key=jax.random.key(0))
      >>> result.topology.weights
      64
      >>> sparse = dpai.apply_masks(params, result.masks)

    Args:
      fn: the network, `fn(params, x)`.
      params: pytree of arrays. Leaves that are not prunable (biases, norm scales) may be in it.
      x: an input, or the shape of one (`jax.ShapeDtypeStruct`); only its shape matters here.
      sparsity: the fraction of prunable weights to remove, in [0, 1).
      method: how; `DPaI()` if not given.
      key: random key; `jax.random.key(0)` if not given. The same key gives the same masks.
      loss_fn: for methods that prune by a loss (SNIP, GraSP, ...), `loss_fn(params, batch)`, a
        scalar.
      batches: the batches for it, each any pytree.
      repair: whether to move kept weights that no path passes to where one does, as
        `dpai_jax.repair`.
      prunable: narrows what is pruned (see `trace`).
      gates: see `trace`.
      progress: whether to show progress on standard error, by default if that is a terminal; or a
        function that takes it, `progress(step, steps, numbers)`.

    Returns:
      The masks, and what is known about them.

    Raises:
      TypeError, ValueError, NotImplementedError: as `trace`; a ValueError also if the sparsity is
        outside [0, 1) or keeps fewer weights than there are layers, and if a score is NaN.
    """
    method = DPaI() if method is None else method
    if not callable(getattr(method, "run", None)):
        raise TypeError(f"method must be a pruning method such as dpai_jax.DPaI(), got {method!r}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function loss_fn(params, batch), got {loss_fn!r}")
    start = time.perf_counter()
    net = trace(fn, params, x, prunable, gates)
    weights_to_keep(net, sparsity)
    if not math.isfinite(topology(net, mask_trees.ones(net, params)).log_paths):
        raise ValueError("fn has no path from x to its output even with all weights kept")
    name = type(method).__name__
    line = ProgressLine(name) if _is_shown(progress) else None
    report = progress if callable(progress) else line or _silent
    key = jax.random.key(0) if key is None else key
    data = tuple(batches)
    pruned = method.run(Problem(net, params, sparsity, key, report, fn, x, loss_fn, data))
    if repair:
        rank = pruned.scores if pruned.rank is None else pruned.rank()
        masks = repair_masks(net, pruned.masks, rank, jax.random.fold_in(key, 1))
        pruned = dataclasses.replace(pruned, masks=masks)
    masks, scores = (placed_like(tree, params) for tree in (pruned.masks, pruned.scores))
    pruned = dataclasses.replace(pruned, masks=masks, scores=scores)
    result = _checked(net, sparsity, pruned, start)
    if line is not None:
        line.close(_summary(name, result))
    return result


def _is_shown(progress: bool | Report | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress is True


def _silent(step: int, steps: int, numbers: Mapping[str, float]) -> None:
    pass


def _checked(net: Network, sparsity: float, pruned: Pruned, start: float) -> Result:
    """The result, after checking that it is one."""
    topo = topology(net, pruned.masks)
    asked = weights_to_keep(net, sparsity)
    if topo.weights != asked:
        raise RuntimeError(f"{topo.weights} weights were kept where {asked} were asked for")
    if topo.collapsed:
        warnings.warn(
            f"no path passes {', '.join(topo.collapsed)} any more (layer collapse)", stacklevel=3
        )
    return Result(
        masks=pruned.masks,
        scores=pruned.scores,
        topology=topo,
        history=pruned.history,
        stopped=pruned.stopped,
        seconds=time.perf_counter() - start,
        net=net,
    )


def _summary(name: str, result: Result) -> str:
    topo = result.topology
    line = f"{name}  kept {topo.weights:,} of {result.net.size:,} weights"
    line += f"  log-paths {topo.log_paths:.2f}  nodes {topo.nodes:,}  kernels {topo.kernels:,}"
    line += f"  {result.seconds:.1f} s"
    return line + (f"  (stopped: {result.stopped})" if result.stopped else "")
