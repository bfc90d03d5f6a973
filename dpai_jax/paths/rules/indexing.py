"""Gathers, scatters and slices at computed positions.

If the indices are known, the same operation is applied to the counts. If not, the gathered axis is
summed. Token ids start a flow, with one path to each unit of the embedding's output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from dpai_jax.paths import values as v
from dpai_jax.paths.constants import unknown
from dpai_jax.paths.interpreter import Interpreter, derived, rules_for
from dpai_jax.paths.kernels import KernelUse
from dpai_jax.paths.rules.contraction import pass_kernel
from dpai_jax.paths.rules.elementwise import at_zero_of, joined_at_zero, product_terms
from dpai_jax.paths.rules.shape import same_axes, viewed
from dpai_jax.paths.values import Flow, Independent, Shape, Spread, Value, Weight
from dpai_jax.tools.jaxprs import shape_of


def known_indices(*indices: Value) -> list[Array] | None:
    """The values of index operands, or None unless all depend on constants alone."""
    known = [index.known for index in indices if isinstance(index, Independent) and index.known]
    if len(known) < len(indices):
        return None
    shapes = [index.shape for index in indices]
    return [jnp.broadcast_to(k.value, shape) for k, shape in zip(known, shapes, strict=True)]


@rules_for("gather", carries_gains=True)
def _gather(interpreter: Interpreter, eqn: JaxprEqn, operand: Value, indices: Value) -> Value:
    shape = shape_of(eqn.outvars[0])
    known = known_indices(indices)
    if isinstance(operand, Weight):
        if known:
            operand = cast(Weight, interpreter.baked(operand))
            spread = Spread(operand.array, operand.shape)
            gathered = _gather_at(spread, known[0], eqn.params, shape)
            dims = eqn.params["dimension_numbers"]
            picked = frozenset(dims.start_index_map) & frozenset(dims.collapsed_slice_dims)
            made_of = _gathered_axes(dims, len(operand.shape), len(shape))
            axes = tuple(picked if axis is None else frozenset({axis}) for axis in made_of)
            return viewed(operand, gathered, axes)
        if not isinstance(indices, Flow):
            return unknown(eqn)[0]
        # A table of tokens that is also a kernel elsewhere (a tied embedding).
        return pass_kernel(interpreter, _look_up(interpreter, eqn, operand, indices))
    if not isinstance(operand, Flow):
        return interpreter.source(shape)
    gather = _gather_anywhere(interpreter, operand.spread, eqn.params, shape)
    if known:
        gather = _gather_at(operand.spread, known[0], eqn.params, shape)
    return _moved(interpreter, operand, gather)


def _look_up(interpreter: Interpreter, eqn: JaxprEqn, table: Weight, tokens: Flow) -> KernelUse:
    """The use of a table whose rows are picked by tokens; every token is an input feature."""
    params, shape = eqn.params, shape_of(eqn.outvars[0])
    dims = params["dimension_numbers"]
    sizes = enumerate(params["slice_sizes"])
    picked = {i for i, size in sizes if size < table.shape[i]} | set(dims.collapsed_slice_dims)
    inputs = tuple(sorted(picked))
    outputs = tuple(i for i in range(len(table.shape)) if i not in picked)
    kept = [i for i in range(len(table.shape)) if i not in dims.collapsed_slice_dims]
    writes = dict(zip(kept, dims.offset_dims, strict=False))
    is_any = jnp.any(tokens.mantissa > 0).astype(jnp.float32)
    rows = v.replace(
        tokens,
        mantissa=jnp.broadcast_to(is_any, (1,) * len(inputs)),
        exponent=jnp.int32(0),
        shape=tuple(table.shape[i] for i in inputs),
        below=1.0,
    )

    def contract(flow: Spread, weight: Spread, *, by_taps: bool = False) -> Spread:
        by = Spread(jnp.expand_dims(flow.array, outputs), weight.shape, flow.below)
        return _gather_anywhere(interpreter, weight, params, shape, by)

    return KernelUse(
        table,
        rows,
        inputs=inputs,
        outputs=outputs,
        taps=(),
        batch=(),
        groups=1,
        reads={axis: i for i, axis in enumerate(inputs)},
        writes={i: axis for i, axis in writes.items() if i not in picked},
        contract=contract,
        shape=shape,
        is_lookup=True,
    )


def _moved(interpreter: Interpreter, source: Flow, spread: Spread) -> Flow:
    return interpreter.flow(
        spread, source.exponent, ancestors=source.lineage, at_zero=source.at_zero
    )


def _gather_at(x: Spread, indices: Array, params: dict[str, Any], shape: Shape) -> Spread:
    """A gather with known indices; uniform axes that it does not slice stay uniform."""
    dims, sizes = params["dimension_numbers"], list(params["slice_sizes"])
    for axis, size in enumerate(x.shape):
        if x.uniform(axis) and sizes[axis] == size and axis not in dims.operand_batching_dims:
            sizes[axis] = 1
        else:
            x = x.full(axis)
    array = lax.gather(x.array, indices, dims, tuple(sizes), mode=params["mode"], fill_value=0)
    return Spread(array, shape)


def _gather_anywhere(
    interpreter: Interpreter,
    x: Spread,
    params: dict[str, Any],
    shape: Shape,
    by: Spread | None = None,
) -> Spread:
    """A gather with unknown indices: sums over the axes that it slices, of products if given."""
    made_of = _gathered_axes(params["dimension_numbers"], len(x.shape), len(shape))
    batched = params["dimension_numbers"].operand_batching_dims
    sizes = enumerate(params["slice_sizes"])
    partial = [i for i, size in sizes if size < x.shape[i] and i not in batched]
    return _laid_along(interpreter, x, made_of, partial, shape, by)


def _laid_along(
    interpreter: Interpreter,
    x: Spread,
    made_of: Sequence[int | None],
    summed: Sequence[int],
    shape: Shape,
    by: Spread | None = None,
) -> Spread:
    """Sums an array over some axes, and moves the others to axes of another shape.

    Args:
      interpreter: has the counting that adds up.
      x: the array.
      made_of: for each axis of the result, the axis of `x` that becomes it; None if the result is
        uniform along it.
      summed: the axes of `x` to sum over, including all that are not in `made_of`.
      shape: the shape of the result.
      by: by what to multiply `x` before.

    Returns:
      The result.
    """
    array = interpreter.counting.sum(x, summed, by).array
    # Axes that are summed and dropped go last, with size one.
    order = [axis for axis in made_of if axis is not None]
    order += [axis for axis in range(len(x.shape)) if axis not in order]
    moved = iter(array.transpose(order).shape)
    target = [1 if axis is None else next(moved) for axis in made_of]
    return Spread(array.transpose(order).reshape(target), shape)


def _gathered_axes(dims: Any, operand_rank: int, rank: int) -> list[int | None]:
    """For each axis of a gather's result the operand's axis that it comes from, or None."""
    dropped = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    kept = iter(axis for axis in range(operand_rank) if axis not in dropped)
    batching = dict(zip(dims.start_indices_batching_dims, dims.operand_batching_dims, strict=True))
    axes: list[int | None] = []
    index_axis = 0
    for position in range(rank):
        if position in dims.offset_dims:
            axes.append(next(kept))
        else:
            axes.append(batching.get(index_axis))
            index_axis += 1
    return axes


@rules_for("dynamic_slice")
def _dynamic_slice(
    interpreter: Interpreter, eqn: JaxprEqn, operand: Value, *starts: Value
) -> Value:
    shape = shape_of(eqn.outvars[0])
    if not isinstance(operand, Flow | Weight):
        return interpreter.source(shape)
    spread = operand.spread
    for axis, (start, size) in enumerate(zip(starts, shape, strict=True)):
        if size == operand.shape[axis]:
            continue
        known = known_indices(start)
        if known is None:
            spread = Spread(interpreter.counting.sum(spread, [axis]).array, spread.shape)
        elif not spread.uniform(axis):
            array = lax.dynamic_slice_in_dim(spread.array, known[0], size, axis)
            spread = Spread(array, spread.shape)
    spread = Spread(spread.array, shape)
    if isinstance(operand, Weight):
        return viewed(operand, spread, same_axes(len(shape)))
    return _moved(interpreter, operand, spread)


@rules_for("dynamic_update_slice")
def _dynamic_update_slice(
    interpreter: Interpreter, eqn: JaxprEqn, operand: Value, update: Value, *starts: Value
) -> Value:
    if not isinstance(operand, Flow) and not isinstance(update, Flow):
        return unknown(eqn)[0]
    sizes = zip(update.shape, operand.shape, strict=True)
    partial = [i for i, (size, full) in enumerate(sizes) if size < full]
    anywhere = [i for i in partial if known_indices(starts[i]) is None]
    (x, y), exponent, ancestors, at_zero = _written(operand, update)
    if anywhere:
        y = interpreter.counting.sum(Spread(y, update.shape), anywhere).array
        sizes = zip(update.shape, operand.shape, strict=True)
        shape = tuple(full if i in anywhere else size for i, (size, full) in enumerate(sizes))
        y = jnp.broadcast_to(y, shape)
    known = [known_indices(start) for start in starts]
    places = [jnp.int32(0) if place is None else place[0] for place in known]
    into = jnp.zeros_like(x) if anywhere else x
    array = lax.dynamic_update_slice(into, y, places)
    # At an unknown position, what was there before may not be overwritten.
    spread = Spread(x + array if anywhere else array, operand.shape)
    return interpreter.flow(spread, exponent, ancestors=ancestors, at_zero=at_zero)


@rules_for("scatter scatter-add scatter-max scatter-min scatter-sub")
def _scatter(
    interpreter: Interpreter, eqn: JaxprEqn, operand: Value, indices: Value, update: Value
) -> Value:
    if not isinstance(operand, Flow) and not isinstance(update, Flow):
        return unknown(eqn)[0]
    (x, y), exponent, ancestors, at_zero = _written(operand, update)
    known, params = known_indices(indices), eqn.params
    if known is None:
        array = x + _scatter_anywhere(interpreter, Spread(y, update.shape), params, operand.shape)
    else:
        scatter = lax.scatter if eqn.primitive.name == "scatter" else lax.scatter_add
        array = scatter(x, known[0], y, params["dimension_numbers"], mode=params["mode"])
    spread = Spread(array, operand.shape)
    return interpreter.flow(spread, exponent, ancestors=ancestors, at_zero=at_zero)


@rules_for("scatter-mul")
def _scatter_mul(
    interpreter: Interpreter, eqn: JaxprEqn, operand: Value, indices: Value, update: Value
) -> Value:
    """The terms of the product rule where an update is written, the operand elsewhere."""
    if not isinstance(update, Flow):
        if not isinstance(operand, Flow):
            return unknown(eqn)[0]
        at_zero = math.inf if operand.at_zero else 0.0
        return derived(interpreter, eqn, operand, operand.spread, at_zero)
    a, b = product_terms(interpreter, v.as_flow(operand), update)
    (x, y), exponent = v.align([a, b])
    x, y = jnp.broadcast_to(x, a.shape), jnp.broadcast_to(y, b.shape)
    alive_x, alive_y = (interpreter.counting.alive(flow) for flow in (a, b))
    known, params = known_indices(indices), eqn.params
    if known is None:
        y = _scatter_anywhere(interpreter, Spread(y, b.shape), params, a.shape)
        array = x + alive_x * y
    else:
        place = functools.partial(
            _place, indices=known[0], dims=params["dimension_numbers"], mode=params["mode"]
        )
        # If several updates go to one position, all of them are its factors.
        factors = place(lax.scatter_mul, jnp.ones_like(x), jnp.broadcast_to(alive_y, b.shape))
        array = factors * (x + alive_x * place(lax.scatter_add, jnp.zeros_like(x), y))
    at_zero = math.inf if a.at_zero and b.at_zero else 0.0
    return interpreter.flow(Spread(array, a.shape), exponent, at_zero=at_zero)


def _place(
    scatter: Callable[..., Array], into: Array, y: Array, *, indices: Array, dims: Any, mode: Any
) -> Array:
    return scatter(into, indices, y, dims, mode=mode)


def _scatter_anywhere(
    interpreter: Interpreter, update: Spread, params: dict[str, Any], shape: Shape
) -> Array:
    """What may be written at each position if the indices are unknown: the sum of all updates."""
    dims = params["dimension_numbers"]
    window = iter(dims.update_window_dims)
    scattered = [i for i in range(len(update.shape)) if i not in dims.update_window_dims]
    # For each axis of the operand the axis of the update that covers it.
    made_of: list[int | None] = [None] * len(shape)
    for i, size in enumerate(shape):
        if i in dims.operand_batching_dims:
            place = dims.operand_batching_dims.index(i)
            made_of[i] = scattered[dims.scatter_indices_batching_dims[place]]
        elif i not in dims.inserted_window_dims:
            axis = next(window)
            made_of[i] = axis if update.shape[axis] == size else None
    summed = [i for i in range(len(update.shape)) if i not in made_of]
    return _laid_along(interpreter, update, made_of, summed, shape).full().array


@rules_for("approx_top_k top_k")
def _top_k(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Sequence[Value]:
    """Each chosen value may be any along the axis. The indices are a switch, without paths."""
    _, indices = unknown(eqn)
    axis = eqn.params["axis" if "axis" in eqn.params else "reduction_dimension"]
    return [_any_along(interpreter, eqn, x, axis, 0), indices]


@rules_for("sort")
def _sort(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    """Each position may hold any of the values along the axis."""
    axis = eqn.params["dimension"]
    return [_any_along(interpreter, eqn, x, axis, i) for i, x in enumerate(args)]


def _any_along(interpreter: Interpreter, eqn: JaxprEqn, x: Value, axis: int, which: int) -> Value:
    if not isinstance(x, Flow):
        return unknown(eqn)[which]
    array = interpreter.counting.sum(x.spread, [axis]).array
    spread = Spread(array, shape_of(eqn.outvars[which]))
    return derived(interpreter, eqn, x, spread, x.at_zero, which)


def _written(operand: Value, update: Value) -> tuple[list[Array], Array, frozenset[Any], float]:
    """The counts of an array and of an update written into it, under one exponent."""
    flows = [value for value in (operand, update) if isinstance(value, Flow)]
    aligned, exponent = v.align(flows)
    arrays = iter(aligned)
    counts = [
        jnp.broadcast_to(next(arrays) if isinstance(value, Flow) else 0.0, value.shape)
        for value in (operand, update)
    ]
    ancestors = frozenset.intersection(*(flow.lineage for flow in flows))
    at_zero = joined_at_zero([at_zero_of(operand), at_zero_of(update)])
    return counts, exponent, ancestors, at_zero
