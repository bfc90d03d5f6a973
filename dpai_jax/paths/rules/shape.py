"""Shape operations: the same operation on the counts or the mask, with zeros for other operands.

An operation on one operand is a *rearrangement*. It says what happens to an array with uniform
axes, for flows and weights alike, and which axes of the operand make up each axis of the result.
The latter shows how a kernel's axes reach a contraction.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from dpai_jax.paths import values as v
from dpai_jax.paths.constants import unknown
from dpai_jax.paths.counting import Counting
from dpai_jax.paths.interpreter import Interpreter, derived, derived_unit, rules_for
from dpai_jax.paths.rules.elementwise import at_zero_of, joined_at_zero
from dpai_jax.paths.rules.windows import coverage
from dpai_jax.paths.values import Axes, Flow, Shape, Spread, Value, Weight, WeightSum
from dpai_jax.tools.jaxprs import shape_of

# The result, and for each of its axes the axes of the operand that make it up.
Rearranged = tuple[Spread, Axes]
Rearrangement = Callable[[dict[str, Any], Spread, Shape], Rearranged]


def rearranges(name: str) -> Callable[[Rearrangement], Rearrangement]:
    """Registers the rule of a shape operation on one operand."""

    def register(rearrange: Rearrangement) -> Rearrangement:
        def rule(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
            shape = shape_of(eqn.outvars[0])
            if isinstance(x, Flow):
                array = rearrange(eqn.params, x.spread, shape)[0].array
                return v.replace(
                    x,
                    mantissa=array,
                    shape=shape,
                    unit=derived_unit(interpreter, eqn, x),
                    ancestors=x.lineage,
                    views=x.views | {x.unit},
                )
            if not isinstance(x, Weight):
                return unknown(eqn)[0]
            spread, axes = rearrange(eqn.params, Spread(x.array, x.shape), shape)
            gains = [rearrange(eqn.params, Spread(g, x.shape), shape)[0].array for g in x.gains]
            return viewed(x, spread, axes, gains)

        rules_for(name, carries_gains=True)(rule)
        return rearrange

    return register


def viewed(weight: Weight, spread: Spread, axes: Axes, gains: Sequence[Array] = ()) -> Weight:
    """The weight after an operation that made its axes from these of the old ones."""
    sources = tuple(
        (leaf, tuple(frozenset().union(*(before[i] for i in made_of)) for made_of in axes))
        for leaf, before in weight.sources
    )
    return v.replace(weight, array=spread.full().array, sources=sources, gains=tuple(gains))


def same_axes(rank: int) -> Axes:
    """The axes of an operation that moves none."""
    return tuple(frozenset({i}) for i in range(rank))


@rearranges("reshape")
def _reshape(params: dict[str, Any], x: Spread, shape: Shape) -> Rearranged:
    sizes, axes = [1] * len(shape), [frozenset[int]()] * len(shape)
    for before, after in reshape_groups(x.shape, shape):
        if not all(x.uniform(i) for i in before):
            x = x.full(*before)
            for j in after:
                sizes[j] = shape[j]
        for j in after:
            axes[j] = frozenset(before)
    return Spread(x.array.reshape(sizes), shape), tuple(axes)


def reshape_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Pairs the shortest runs of axes of two shapes that have the same size.

    Axes of size one are in no run.
    """
    groups: list[tuple[list[int], list[int]]] = []
    before = [i for i, size in enumerate(old) if size != 1]
    after = [j for j, size in enumerate(new) if size != 1]
    if 0 in old:
        return [(before, after)]
    while before or after:
        run_before, run_after = before[:1], after[:1]
        del before[:1], after[:1]
        while (a := _size(old, run_before)) != (b := _size(new, run_after)):
            grows, rest = (run_before, before) if a < b and before else (run_after, after)
            grows.append(rest.pop(0))
        groups.append((run_before, run_after))
    return groups


def _size(shape: Shape, axes: Sequence[int]) -> int:
    return math.prod(shape[i] for i in axes)


@rearranges("transpose")
def _transpose(params: dict[str, Any], x: Spread, shape: Shape) -> Rearranged:
    order = params["permutation"]
    return Spread(jnp.transpose(x.array, order), shape), tuple(frozenset({i}) for i in order)


@rearranges("squeeze")
def _squeeze(params: dict[str, Any], x: Spread, shape: Shape) -> Rearranged:
    dropped = {i % len(x.shape) for i in params["dimensions"]}
    axes = tuple(frozenset({i}) for i in range(len(x.shape)) if i not in dropped)
    return Spread(jnp.squeeze(x.array, tuple(dropped)), shape), axes


@rearranges("broadcast_in_dim")
def _broadcast(params: dict[str, Any], x: Spread, shape: Shape) -> Rearranged:
    sizes, axes = [1] * len(shape), [frozenset[int]()] * len(shape)
    for i, j in enumerate(params["broadcast_dimensions"]):
        sizes[j], axes[j] = x.array.shape[i], frozenset({i})
    return Spread(x.array.reshape(sizes), shape), tuple(axes)


@rearranges("rev")
def _reverse(params: dict[str, Any], x: Spread, shape: Shape) -> Rearranged:
    return Spread(lax.rev(x.array, params["dimensions"]), shape), same_axes(len(shape))


@rules_for("slice", carries_gains=True)
def _slice(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
    shape = shape_of(eqn.outvars[0])
    steps = eqn.params["strides"] or (1,) * len(shape)
    bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], steps, strict=True)
    slices = [slice(*bound) for bound in bounds]
    return _part(interpreter, eqn, x, slices, shape)


@rules_for("pad")
def _pad(interpreter: Interpreter, eqn: JaxprEqn, x: Value, fill: Value) -> Value:
    if not isinstance(x, Flow | Weight):
        return unknown(eqn)[0]
    config, shape = eqn.params["padding_config"], shape_of(eqn.outvars[0])
    padded = [i for i, pads in enumerate(config) if tuple(pads) != (0, 0, 0)]
    spread = x.spread
    if isinstance(x, Flow) and interpreter.counting.averages:
        spread, config = _diluted(interpreter.counting, spread, config, shape)
        padded = [i for i in padded if not spread.uniform(i)]
    spread = spread.full(*padded) if padded else spread
    spread = Spread(lax.pad(spread.array, jnp.float32(0), config), shape)
    if isinstance(x, Weight):
        return viewed(x, spread, same_axes(len(shape)))
    return derived(interpreter, eqn, x, spread, joined_at_zero([x.at_zero, at_zero_of(fill)]))


def _diluted(
    counting: Counting, spread: Spread, config: Sequence[Any], shape: Shape
) -> tuple[Spread, list[Any]]:
    """Averages over padded uniform axes; returns the result and the padding of the other axes."""
    scale, rest = 1.0, list(config)
    for axis, (low, high, interior) in enumerate(config):
        if spread.uniform(axis) and (low, high, interior) != (0, 0, 0):
            scale *= float(
                coverage(spread.shape[axis], 1, shape[axis], 1, (low, high), interior + 1, 1)[0]
            )
            rest[axis] = (0, 0, 0)
    return Spread(counting.scaled(spread.array, scale), spread.shape), rest


@rearranges("tile")
def _tile(params: dict[str, Any], x: Spread, shape: Shape) -> Rearranged:
    reps = [1 if x.uniform(i) else rep for i, rep in enumerate(params["reps"])]
    return Spread(jnp.tile(x.array, reps), shape), same_axes(len(shape))


@rules_for("split", carries_gains=True)
def _split(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Sequence[Value]:
    axis = eqn.params["axis"]
    ends = list(itertools.accumulate(int(size) for size in eqn.params["sizes"]))
    parts: list[Value] = []
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        slices = [slice(None)] * len(x.shape)
        slices[axis] = slice(start, end)
        parts.append(_part(interpreter, eqn, x, slices, shape_of(eqn.outvars[i]), i))
    return parts


@rules_for("unstack", carries_gains=True)
def _unstack(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Sequence[Value]:
    axis = eqn.params["axis"]
    parts: list[Value] = []
    for i, var in enumerate(eqn.outvars):
        slices = [slice(None)] * len(x.shape)
        slices[axis] = slice(i, i + 1)
        parts.append(_part(interpreter, eqn, x, slices, shape_of(var), i, dropped=axis))
    return parts


def _part(
    interpreter: Interpreter,
    eqn: JaxprEqn,
    x: Value,
    slices: Sequence[slice],
    shape: Shape,
    which: int = 0,
    dropped: int | None = None,
) -> Value:
    """Slices a value, and drops one axis if asked to."""
    if not isinstance(x, Flow | Weight):
        return v.Independent(shape)

    def cut(array: Array) -> Array:
        # Along a uniform axis there is a single number, whatever the slice.
        sizes = zip(slices, array.shape, strict=True)
        array = array[tuple(slice(0, 1) if size == 1 else s for s, size in sizes)]
        return array if dropped is None else jnp.squeeze(array, dropped)

    part = Spread(cut(x.spread.array), shape)
    if isinstance(x, Weight):
        axes = tuple(axis for i, axis in enumerate(same_axes(len(x.shape))) if i != dropped)
        return viewed(x, part, axes, list(map(cut, x.gains)))
    return derived(interpreter, eqn, x, part, x.at_zero, which)


@rules_for("concatenate", carries_constants=True)
def _concatenate(interpreter: Interpreter, eqn: JaxprEqn, *parts: Value) -> Value:
    return _join(interpreter, eqn, parts, eqn.params["dimension"])


@rules_for("stack", carries_constants=True)
def _stack(interpreter: Interpreter, eqn: JaxprEqn, *parts: Value) -> Value:
    axis = eqn.params["axis"]
    return _join(interpreter, eqn, [_with_axis(part, axis) for part in parts], axis)


def _with_axis(part: Value, axis: int) -> Value:
    """The value with a new axis of size one."""
    shape = (*part.shape[:axis], 1, *part.shape[axis:])
    if isinstance(part, Flow):
        return v.replace(part, mantissa=jnp.expand_dims(part.mantissa, axis), shape=shape)
    if isinstance(part, Weight):
        axes = tuple(
            (leaf, (*before[:axis], frozenset(), *before[axis:])) for leaf, before in part.sources
        )
        return v.replace(part, array=jnp.expand_dims(part.array, axis), sources=axes)
    if isinstance(part, WeightSum):
        return WeightSum(tuple(cast(Weight, _with_axis(term, axis)) for term in part.terms))
    return v.Independent(shape)


def _join(interpreter: Interpreter, eqn: JaxprEqn, parts: Sequence[Value], axis: int) -> Value:
    shape = shape_of(eqn.outvars[0])
    flows = [part for part in parts if isinstance(part, Flow)]
    if not flows:
        return _join_weights(parts, axis)
    aligned, exponent = v.align(flows)
    ancestors = frozenset.intersection(*(flow.lineage for flow in flows))
    at_zero = joined_at_zero([at_zero_of(part) for part in parts])
    # If all parts have size one, such as the stacked steps of a loop, each keeps its own count.
    uniform = all(flow.spread.uniform(axis) for flow in flows)
    if interpreter.counting.averages and uniform and any(flow.shape[axis] > 1 for flow in flows):
        shares = [flow.shape[axis] / shape[axis] for flow in flows]
        array = functools.reduce(jnp.add, map(interpreter.counting.scaled, aligned, shares))
        spread = Spread(array, shape)
        return interpreter.flow(spread, exponent, ancestors=ancestors, at_zero=at_zero)
    arrays = iter(aligned)
    pieces = [
        next(arrays) if isinstance(part, Flow) else jnp.zeros((1,) * len(shape), jnp.float32)
        for part in parts
    ]
    common = jnp.broadcast_shapes(*(_without(piece.shape, axis) for piece in pieces))
    pieces = [
        jnp.broadcast_to(piece, (*common[:axis], part.shape[axis], *common[axis + 1 :]))
        for piece, part in zip(pieces, parts, strict=True)
    ]
    spread = Spread(lax.concatenate(pieces, axis), shape)
    result = interpreter.flow(spread, exponent, ancestors=ancestors, at_zero=at_zero)
    return v.replace(result, constants=_joined_constants(interpreter, parts, result, axis))


def _joined_constants(
    interpreter: Interpreter, parts: Sequence[Value], joined: Flow, axis: int
) -> Flow | None:
    """The paths from constants among joined parts: from learned ones and from the parts' own."""
    constants = [part.constants if isinstance(part, Flow) else None for part in parts]
    learned = [not isinstance(part, Flow) and at_zero_of(part) != 0 for part in parts]
    tracked = interpreter.counting.tracks_constants and not joined.always_alive
    if not tracked or not (any(learned) or any(constants)):
        return None
    pieces = []
    for part, flow, is_learned in zip(parts, constants, learned, strict=True):
        array = jnp.float32(is_learned) if flow is None else (flow.mantissa > 0).astype(jnp.float32)
        pieces.append(jnp.broadcast_to(array, part.shape))
    spread = Spread(lax.concatenate(pieces, axis), joined.shape)
    return interpreter.flow(spread, jnp.int32(0), unit=joined.unit, ancestors=joined.ancestors)


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _join_weights(parts: Sequence[Value], axis: int) -> Weight | WeightSum:
    """Concatenates kernels, as in a fused projection; parts that are not prunable are ones."""
    several = [part.terms if isinstance(part, Weight | WeightSum) else (part,) for part in parts]
    rows = itertools.zip_longest(*several)
    joined = [_joined_terms(row, [part.shape for part in parts], axis) for row in rows]
    return joined[0] if len(joined) == 1 else WeightSum(tuple(joined))


def _joined_terms(terms: Sequence[Value | None], shapes: Sequence[Shape], axis: int) -> Weight:
    """Joins one term of each part, with zeros for parts that have no such term."""
    arrays = [
        term.array
        if isinstance(term, Weight)
        else jnp.full(shape, float(term is not None), jnp.float32)
        for term, shape in zip(terms, shapes, strict=True)
    ]
    sources = tuple(source for term in terms if isinstance(term, Weight) for source in term.sources)
    bounds = [term.below if isinstance(term, Weight) else 1.0 for term in terms]
    known = [bound for bound in bounds if bound is not None]
    below = max(known) if len(known) == len(bounds) else None
    return Weight(jnp.concatenate(arrays, axis), sources, below)
