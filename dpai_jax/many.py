"""Prunes one network several times in one call, and in one program where that is faster."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from dpai_jax import checks
from dpai_jax.granularity import parsed
from dpai_jax.measuring import compile_ahead
from dpai_jax.methods.base import Data, Loss, Method, Problem, Report, read_batches
from dpai_jax.methods.dpai import DPaI
from dpai_jax.paths import Network, trace
from dpai_jax.pruning import (
    Result,
    check_arguments,
    check_network,
    check_repair,
    prune,
    results_of,
    silent,
)
from dpai_jax.tools.meshes import given_up_on_failure, shardings_of
from dpai_jax.tools.switches import uncollected, usual_switches

PyTree = Any


@usual_switches()
def prune_many(
    fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    sparsity: float | Sequence[float],
    *,
    method: Method | Sequence[Method] | None = None,
    key: Array | Sequence[Array] | None = None,
    loss_fn: Loss | None = None,
    batches: Iterable[PyTree] | None = None,
    granularity: str = "weight",
    repair: bool = False,
    prunable: Callable[[str, Any], bool] | None = None,
    gates: str = "balanced",
    progress: bool | Report | None = None,
) -> list[Result]:
    """Prunes a network several times: with several keys, sparsities or methods.

    The masks are those of as many calls of `prune`, bit by bit. But where `DPaI` differs in key,
    sparsity, α, β or γ alone, all runs are one program; several devices share the runs, and on a
    single CPU two threads do. Other methods, `DPaI` with an optimizer that counts its steps (Adam)
    and networks on a mesh are pruned one after another.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((16, 32)), "out": jnp.ones((32, 4))}
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> results = dpai.prune_many(fn, params, jnp.ones((1, 16)), 0.9, key=keys)
      >>> [result.topology.weights for result in results]
      [64, 64, 64]

    Args:
      fn: the network, `fn(params, x)`.
      params: pytree of arrays.
      x: an input, or the shape of one.
      sparsity: one for all, or a sequence.
      method: one for all, or a sequence; `DPaI()` if not given.
      key: one for all, a sequence, or an array of keys; `jax.random.key(0)` if not given.
      loss_fn: as for `prune`.
      batches: as for `prune`; the same for all.
      granularity: as for `prune`; the same for all.
      repair: as for `prune`.
      prunable: as for `prune`.
      gates: as for `prune`.
      progress: as for `prune`; of one program a function gets the means of what was measured.

    Returns:
      A result for each. Its `seconds` are those of all together divided by their number.

    Raises:
      TypeError, ValueError, NotImplementedError: as `prune`; and if the sequences differ in length.
    """
    start = time.perf_counter()
    jobs = _jobs(sparsity, DPaI() if method is None else method, key)
    for _, one, one_key in jobs:
        check_arguments(one, params, x, one_key, repair, progress)
    by = parsed(granularity)
    check_repair(repair, by)
    net = trace(fn, params, x, prunable, gates)
    data = Data(loss_fn, None if batches is None else read_batches(batches))
    report = progress if callable(progress) else silent
    problems = [Problem(net, params, s, checks.key(k), report, fn, x, data, by) for s, _, k in jobs]
    single = functools.partial(
        prune,
        fn,
        params,
        x,
        loss_fn=data.loss_fn,
        batches=data.batches,
        granularity=granularity,
        repair=repair,
        prunable=prunable,
        gates=gates,
        progress=progress,
    )
    results: dict[int, Result] = {}
    for group in _groups(net, params, problems, [one for _, one, _ in jobs]):
        if len(group) == 1:
            one_sparsity, one, one_key = jobs[group[0]]
            results[group[0]] = single(one_sparsity, method=one, key=one_key)
            continue
        methods: list[Any] = [jobs[i][1] for i in group]
        with given_up_on_failure(), uncollected():
            compile_ahead(net, net.leaves(params))
            check_network(net, params)
            found = methods[0].run_many(methods, [problems[i] for i in group])
            many = results_of(methods, [problems[i] for i in group], found, repair, checked=True)
        results |= dict(zip(group, many, strict=True))
    each = (time.perf_counter() - start) / max(len(jobs), 1)
    return [dataclasses.replace(results[i], seconds=each) for i in range(len(jobs))]


def _jobs(sparsity: Any, method: Any, key: Any) -> list[tuple[float, Method, Array | None]]:
    """The sparsity, method and key of each pruning."""
    given = {"sparsity": sparsity, "method": method, "key": key}
    several = {name: list(value) for name, value in given.items() if _is_sequence(value)}
    sizes = {name: len(values) for name, values in several.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{n} of {name}" for name, n in sizes.items())
        raise ValueError(f"sparsity, method and key must be sequences of one length, got {found}")
    n = next(iter(sizes.values()), 1)
    columns = [several.get(name, [value] * n) for name, value in given.items()]
    return list(zip(*columns, strict=True))


def _is_sequence(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return isinstance(value, list | tuple)
    # One old-style key is already a vector.
    return jnp.ndim(value) == 1 + bool(dtype == jnp.uint32)


def _groups(
    net: Network, params: PyTree, problems: Sequence[Problem], methods: Sequence[Any]
) -> list[list[int]]:
    """The prunings that can share one program, by their indices."""
    groups: dict[Any, list[int]] = {}
    on_mesh = any(shardings_of(net.leaves(params)))
    for i, (problem, method) in enumerate(zip(problems, methods, strict=True)):
        problem.granularity.check(net, problem.sparsity)
        together = i if on_mesh else getattr(method, "together", i)
        groups.setdefault(together, []).append(i)
    return list(groups.values())
