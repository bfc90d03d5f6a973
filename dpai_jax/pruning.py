"""The one call: from a network function and a sparsity to masks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.metadata
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks, counts
from dpai_jax.granularity import Granularity, parsed
from dpai_jax.measuring import Topology, compile_ahead, measure
from dpai_jax.methods.base import Data, Loss, Method, Problem, Pruned, Report
from dpai_jax.methods.dpai import DPaI
from dpai_jax.paths import Network, trace
from dpai_jax.progress import ProgressLine
from dpai_jax.repairing import repaired_layers
from dpai_jax.summaries import Summary
from dpai_jax.tools import meshes
from dpai_jax.tools.settings import described
from dpai_jax.tools.switches import uncollected, usual_switches
from dpai_jax.tools.trees import shown

PyTree = Any


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A pruned network.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda params, x: x @ params["w"], {"w": jnp.ones((8, 4))}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 8)), 0.5, method=dpai.Random())
      >>> result
      Result(16 of 32 weights kept, 16 effective, 4 nodes, 16 kernels, log_paths=2.77)
      >>> result.masks["w"].shape, result.settings["method"]["type"]
      ((8, 4), 'Random')

    Attributes:
      masks: pytree of boolean masks parallel to the parameters, sharded as these are; `True` for a
        leaf that cannot be pruned. Exactly `round((1 − sparsity)·N)` weights are kept.
      scores: pytree of the scores that the masks were made of, likewise; `0.` for such a leaf.
      topology: what remains of the network.
      history: arrays of one length, what the method measured at each step (for DPaI log R_P as
        `log_paths`, R_N as `nodes`, and R_C as `kernels`).
      seconds: the time that it took, compilation included.
      settings: what the call was given, in JSON's terms: the method with all of its settings, the
        sparsity, the granularity, the key, `repair` and `gates`, and the release of the library.
      net: the traced network; None in a result that was pickled or loaded.
    """

    masks: PyTree
    scores: PyTree
    topology: Topology
    history: Mapping[str, np.ndarray]
    seconds: float
    settings: Mapping[str, Any]
    net: Network

    def __repr__(self) -> str:
        return repr(self.topology).replace("Topology", "Result", 1)

    def summary(self) -> Summary:
        """A table of the layers, for a terminal or a notebook (see `Topology.summary`).

        Example:
          >>> import jax.numpy as jnp, dpai_jax as dpai
          >>> fn, params = lambda params, x: x @ params["w"], {"w": jnp.ones((8, 4))}
          >>> result = dpai.prune(fn, params, jnp.ones((1, 8)), 0.5, method=dpai.Random())
          >>> print(result.summary().title)
          Random at sparsity 0.5: 16 of 32 weights kept

        Returns:
          The table. In the last row are the totals.
        """
        topo, settings = self.topology, self.settings
        method = settings["method"]["type"] + " and repair" * settings["repair"]
        title = f"{method} at sparsity {settings['sparsity']:.6g}"
        return topo.titled(f"{title}: {topo.weights:,} of {topo.size:,} weights kept")

    def __getstate__(self) -> dict[str, Any]:
        # A trace cannot be pickled.
        return self.__dict__ | {"net": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Result:
        fields = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        return Result(**fields)


@usual_switches()
def prune(
    fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    sparsity: float,
    *,
    method: Method | None = None,
    key: Array | None = None,
    loss_fn: Loss | None = None,
    batches: Iterable[PyTree] | None = None,
    granularity: str = "weight",
    repair: bool = False,
    prunable: Callable[[str, Any], bool] | None = None,
    gates: str = "balanced",
    progress: bool | Report | None = None,
) -> Result:
    """Prunes a network before it is trained.

    JAX's switches `disable_jit`, `transfer_guard` and `debug_infs` do not hold inside.

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
      fn: the network, `fn(params, x)`. Define it once: what is compiled for it is kept for the last
        eight functions.
      params: pytree of arrays. Leaves that are not prunable (biases, norm scales) may be in it.
      x: an input, or the shape of one (`jax.ShapeDtypeStruct`); only its shape matters here.
      sparsity: the fraction of prunable weights to remove, in [0, 1).
      method: how; `DPaI()` if not given.
      key: random key; `jax.random.key(0)` if not given. The same key gives the same masks.
      loss_fn: for methods that prune by a loss (SNIP, GraSP, ...), `loss_fn(params, batch)`, a
        scalar.
      batches: the batches for it, each any pytree: a list, or an iterator, of which the first 128
        are read. Methods that use no loss read none.
      granularity: which weights stand or fall together: "weight", each alone; "kernel", the taps
        that join an input feature to an output feature; "channel", an output feature with all its
        weights (those of the network's outputs stay); or N:M such as "2:4", of each M consecutive
        weights along the inputs the N best, at a sparsity of 1 − N/M (see docs/structure.md).
      repair: whether to move kept weights that no path passes to where one does, as
        `dpai_jax.repair`; for single weights alone.
      prunable: narrows what is pruned (see `trace`).
      gates: see `trace`.
      progress: whether to show progress on standard error, by default if that is a terminal; or a
        function that takes it, `progress(step, steps, numbers)`.

    Returns:
      The masks, and what is known about them.

    Raises:
      TypeError, ValueError, NotImplementedError: as `trace`; and if an argument is not as said
        above, `params` has a NaN, no path leads to the output, or an allocation asks too much.
    """
    start = time.perf_counter()
    method = DPaI() if method is None else method
    check_arguments(method, params, x, key, repair, progress)
    key, by = checks.key(key), parsed(granularity)
    check_repair(repair, by)
    net = trace(fn, params, x, prunable, gates)
    by.check(net, sparsity)
    name, data = type(method).__name__, Data(loss_fn, batches)
    line = ProgressLine(name) if progress is True or (progress is None and _at_terminal()) else None
    report = progress if callable(progress) else line or silent
    problem = Problem(net, params, sparsity, key, report, fn, x, data, by)
    with meshes.given_up_on_failure():
        with uncollected():
            # In the order in which they are needed.
            compile_ahead(net, net.leaves(params))
            if hasattr(method, "compile_ahead"):
                method.compile_ahead(problem)
            check_network(net, params)
        (result,) = results_of([method], [problem], [method.run(problem)], repair)
        meshes.keep_on_disk()
    result = dataclasses.replace(result, seconds=time.perf_counter() - start)
    if line is not None:
        line.close(_summary(name, result))
    return result


def results_of(
    methods: Sequence[Method],
    problems: Sequence[Problem],
    found: Sequence[Pruned],
    repair: bool,
    *,
    checked: bool = False,
) -> list[Result]:
    """The results of several problems on one network, without their seconds.

    Args:
      methods: a method for each problem.
      problems: the problems.
      found: what the methods returned.
      repair: whether to repair the masks.
      checked: whether it is known that no score is NaN.

    Returns:
      The results.
    """
    problem, net, name = problems[0], problems[0].net, type(methods[0]).__name__
    if problem.given.is_given and not problem.given.is_used:
        warnings.warn(f"{name} uses no data: loss_fn and batches were ignored", stacklevel=4)
    leaves, one = net.leaves(problem.params), jnp.ones((), bool)
    on_mesh = any(meshes.shardings_of(leaves))

    def put(arrays: list[Array]) -> list[Array]:
        return meshes.device_put_like(arrays, leaves) if on_mesh else arrays

    def check_scores() -> None:
        for pruned in () if checked else found:
            checks.not_diverged(net, pruned.scores)

    masks: list[list[Any]] = [pruned.masks for pruned in found]
    if repair:
        check_scores()
        masks = [_repaired(*pair) for pair in zip(problems, found, strict=True)]
    masks = [put(list(map(_on_device, own))) for own in masks]
    topologies = measure(net, masks)
    # What Python does while they are measured.
    results = [
        functools.partial(
            Result,
            masks=net.tree(own, lambda: one),
            scores=net.tree(put(pruned.scores), lambda: np.float32(0)),
            history=pruned.history,
            seconds=0.0,
            settings=_settings(method, problem, repair),
            net=net,
        )
        for method, problem, pruned, own in zip(methods, problems, found, masks, strict=True)
    ]
    if not repair:
        check_scores()
    ended = []
    for problem, own, result, topo in zip(problems, masks, results, topologies(), strict=True):
        _check_kept(name, problem, own, topo.weights)
        if topo.collapsed:
            warnings.warn(_collapse(topo), stacklevel=4)
        ended.append(result(topology=topo))
    return ended


def _on_device(mask: Any) -> Array:
    return mask if isinstance(mask, Array) else jnp.asarray(mask)


def _repaired(problem: Problem, pruned: Pruned) -> list[Array]:
    rank = pruned.scores if pruned.rank is None else pruned.rank()
    key = jax.random.fold_in(problem.key, 1)
    masks: list[Any] = repaired_layers(problem.net, pruned.masks, rank, key)
    return masks


def _collapse(topo: Topology) -> str:
    """Says which layers no path passes any more, and whether any path is left."""
    names = list(topo.collapsed)
    if len(names) > 4:
        names[3:] = [f"{len(names) - 3} more"]
    what = "paths past them remain" if math.isfinite(topo.log_paths) else "no path remains"
    return f"no path passes {', '.join(names)} any more (layer collapse); {what}"


def _check_kept(name: str, problem: Problem, masks: list[Array], kept: int) -> None:
    try:
        problem.granularity.check_kept(problem.net, masks, kept, problem.sparsity)
    except RuntimeError as error:
        raise RuntimeError(f"{name} {error}") from None


def _settings(method: Method, problem: Problem, repair: bool) -> dict[str, Any]:
    return {
        "method": described(method, read=False),
        "sparsity": float(problem.sparsity),
        "granularity": problem.granularity.name,
        "key": np.asarray(jax.random.key_data(problem.key)).tolist(),
        "repair": bool(repair),
        "gates": problem.net.gates,
        "dpai_jax": _release(),
    }


@functools.cache
def _release() -> str:
    try:
        return importlib.metadata.version("dpai_jax")
    except importlib.metadata.PackageNotFoundError:  # imported from a folder on Python's path
        return "not installed"


def check_arguments(
    method: Any, params: PyTree, x: PyTree, key: Any, repair: Any, progress: Any
) -> None:
    """Raises an error if an argument is wrong for every method."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, x, key))):
        raise TypeError(
            "params, x and key must not be traced, and prune must not be called under jax.jit: call"
            " trace outside, and ascent, binarize and log_paths inside"
        )
    if isinstance(method, type):
        raise TypeError(f"method must be an instance such as dpai.{method.__name__}(), got a class")
    if not callable(getattr(method, "run", None)):
        raise TypeError(f"method must be a pruning method such as dpai.DPaI(), got {shown(method)}")
    checks.flag("repair", repair)
    if progress is not None and not callable(progress):
        checks.flag("progress", progress)


def check_repair(repair: bool, granularity: Granularity) -> None:
    """Refuses a repair of what is no single weight."""
    if repair and not granularity.is_weight:
        raise ValueError(
            f"repair must be False with granularity {granularity.name!r}: it moves single weights"
        )


def check_network(net: Network, params: PyTree) -> None:
    """Raises a ValueError if the network has no path, or a weight is NaN."""
    if not any(flags.any() for flags in counts.possible(net)):
        raise ValueError("fn has no path from x to its output even with all weights kept")
    weights = net.leaves(params)
    if not any(isinstance(w, jax.ShapeDtypeStruct) for w in weights):
        checks.all_numbers("params", net, weights)


def _at_terminal() -> bool:
    return sys.stderr.isatty()


def silent(step: int, steps: int, numbers: Mapping[str, float]) -> None:
    """Ignores progress."""


def _summary(name: str, result: Result) -> str:
    topo = result.topology
    line = f"{name}  kept {topo.weights:,} of {topo.size:,} weights"
    line += f"  log-paths {topo.log_paths:.2f}  nodes {topo.nodes:,}  kernels {topo.kernels:,}"
    return line + f"  {result.seconds:.1f} s"
