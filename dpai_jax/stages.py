"""Counting by the chain of a network's stages: what is compiled for one block serves its repeats.

Stages are called one after the other, and for derivatives back again, each a program of its own. On
several devices, within another program, and where little of a network repeats, it is one program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from dpai_jax.paths import Network
from dpai_jax.paths.counting import Counting
from dpai_jax.paths.folding import Call, Stage, in_dtypes, is_real, pulled_back
from dpai_jax.tools import meshes

# Arrays of so many entries are compared at once.
_QUICK_TO_COMPARE = 2**22

# From a call, its arguments, the cotangents of its results, and for each argument the cotangent
# that later stages gave, to the cotangents of its arguments.
Pull = Callable[[Call, list[Any], list[Any], list[Any]], Sequence[Any]]


def chain_for(
    net: Network, masks: Sequence[Any], counting: Counting, below: float | None = None
) -> list[Call]:
    """The chain that serves these masks (see `Network.chain`); none if one program does."""
    is_traced = any(isinstance(x, jax.core.Tracer) for x in masks)
    if is_traced or any(meshes.layer_shardings(masks)):
        return []
    return net.chain(counting, below)


def forward(
    net: Network,
    calls: Sequence[Call],
    masks: Sequence[Any],
    strengths: Sequence[Any] = (),
    exponents: Sequence[Any] = (),
    *,
    run: Any = None,
    ahead: int = 0,
) -> dict[int, Any]:
    """The arrays of all slots.

    Args:
      net: the traced network.
      calls: the chain.
      masks: an array for each layer, or its shape.
      strengths: by what to multiply each mask; by one if not given.
      exponents: of powers of two to multiply it by, too, int32; zero if not given.
      run: runs a stage; `run_roughly` if NumPy may run the first calls also where it rounds
        otherwise.
      ahead: if not zero, only starts to compile, for so many calls.

    Returns:
      The arrays, or their shapes, by slot.
    """
    slots: dict[int, Any] = dict(enumerate(masks))
    of_slots = [dict(enumerate(own)) for own in (strengths, exponents)]
    run = _run if run is None else run
    for call in calls:
        factors, powers = ([own.get(i) for i in call.inputs] for own in of_slots)
        args = [slots[i] for i in call.inputs], factors, powers
        if ahead:
            run.ahead(net, *args, calls=ahead, stage=call.stage)
            results = call.stage.results
        else:
            results = run(net, *args, stage=call.stage)
        slots.update(zip(call.outputs, results, strict=True))
    return slots


def backward(calls: Sequence[Call], slots: dict[int, Any], pull: Pull) -> dict[int, Any]:
    """What is pulled back through a chain to its slots, from a one at its result.

    Args:
      calls: the chain.
      slots: the arrays of all slots.
      pull: pulls back through one stage.

    Returns:
      What the first stage that reads a slot gave for it, by slot.
    """
    found: dict[int, Any] = {calls[-1].outputs[0]: np.ones((), np.float32)}
    for call in reversed(calls):
        cotangents = [found.pop(i) for i in call.outputs if is_real(slots[i])]
        arrays, so_far = [slots[i] for i in call.inputs], [found.get(i) for i in call.inputs]
        found.update(zip(call.inputs, pull(call, arrays, cotangents, so_far), strict=True))
    return found


def pulled_to_masks(
    net: Network,
    calls: Sequence[Call],
    behind: meshes.Program,
    masks: Sequence[Any],
    strengths: Sequence[Any] = (),
    *,
    ahead: bool = False,
    repeats: bool = False,
) -> list[Any]:
    """What is pulled back through a chain to the masks.

    Args:
      net: the traced network.
      calls: the chain.
      behind: a program that calls `pulled_behind`.
      masks: as for `forward`.
      strengths: as for `forward`.
      ahead: whether only to start to compile.
      repeats: whether the network's blocks may get and give the same, as where all weights are
        kept: then what a block gave is given again.

    Returns:
      For each layer what the first stage that reads its mask gave; nothing of use ahead.
    """
    by_slot = dict(enumerate(strengths))

    def pull(call: Call, *pulled: list[Any]) -> Sequence[Any]:
        factors = [by_slot.get(i) for i in call.inputs]
        pairs = zip(call.inputs, call.is_first, strict=True)
        ends = tuple(i < len(masks) and is_first for i, is_first in pairs)
        if ahead:
            behind.ahead(net, *pulled, factors, stage=call.stage, ends=ends)
            return call.stage.arguments
        found: Sequence[Any] = run_behind(net, *pulled, factors, stage=call.stage, ends=ends)
        return found

    run, run_behind = (_Repeated(x) if repeats else x for x in (_run, behind))
    slots = forward(net, calls, masks, strengths, run=run, ahead=ahead)
    slots = backward(calls, slots, pull)
    return [slots[i] for i in range(len(masks))]


class _Repeated:
    """A program that gives again what it gave last, if it is called with the same."""

    def __init__(self, program: meshes.Program):
        self._program = program
        self._last: dict[Any, tuple[list[Any], Any]] = {}

    def __call__(self, net: Network, *args: Any, **settings: Any) -> Any:
        key = tuple(sorted(settings.items())), jax.tree.structure(args)
        leaves = jax.tree.leaves(args)
        before, found = self._last.get(key, ([], None))
        if len(before) != len(leaves) or not all(map(_are_same, before, leaves)):
            found = self._program(net, *args, **settings)
            self._last[key] = leaves, found
        return found


def _are_same(a: Any, b: Any) -> bool:
    """Whether arrays are the same; of large ones only if they are one."""
    if a is b or a.shape != b.shape or a.size > _QUICK_TO_COMPARE:
        return a is b
    return np.array_equal(a, b)


def pulled_behind(
    finish: Callable[[Array, Array], Array],
    arrays: list[Array],
    cotangents: list[Array],
    so_far: list[Array | None],
    factors: list[Array | None],
    *,
    stage: Stage,
    ends: tuple[bool, ...],
) -> list[Array | None]:
    """What is pulled back through one stage, for use within a program (see `pulled_to_masks`).

    Args:
      finish: from a mask's cotangent, when that is done, and the mask times its factor, to what is
        found for the mask.
      arrays: the stage's arguments.
      cotangents: those of its results.
      so_far: for each argument the cotangent that later stages gave.
      factors: by what to multiply each argument; by one where there is none.
      stage: the stage.
      ends: which of its arguments are masks that no stage before reads.

    Returns:
      For each argument its cotangent, or what is found for the mask.
    """
    values = multiplied(arrays, factors)
    found = pulled_back(stage, values, cotangents, so_far)
    return [
        finish(x, value) if is_end and x is not None else x
        for x, value, is_end in zip(found, values, ends, strict=True)
    ]


def multiplied(arrays: Sequence[Array], factors: Sequence[Array | None]) -> list[Array]:
    """Arrays times factors, where there are any."""
    return [x if f is None else x.astype(f.dtype) * f for x, f in zip(arrays, factors, strict=True)]


def _run_stage(
    _: Network,
    arrays: list[Array],
    factors: list[Array | None],
    exponents: list[Array | None],
    *,
    stage: Stage,
) -> list[Array]:
    return stage(in_dtypes(stage, multiplied(arrays, factors)), exponents=exponents)


_run = meshes.program(by_numpy="exactly")(_run_stage)
run_roughly = meshes.program(by_numpy="roughly")(_run_stage)
