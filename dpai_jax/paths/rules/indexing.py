"""Gathers, scatters and slices at computed positions.

Where the indices are known, the same operation moves the counts. Where they are not, the gathered
axis counts as a sum. Token ids start a flow: one path to each unit of the embedding's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from dpai_jax.paths import values as v
from dpai_jax.paths._jax import shape_of
from dpai_jax.paths.constants import unknown
from dpai_jax.paths.interpreter import Interpreter, rules_for
from dpai_jax.paths.kernels import KernelUse
from dpai_jax.paths.rules.contraction import pass_kernel
from dpai_jax.paths.rules.elementwise import joined_rest, rest_of
from dpai_jax.paths.rules.shape import same_axes, viewed
from dpai_jax.paths.values import Flow, Free, Shape, Spread, Value, Weight


def known_indices(*indices: Value) -> list[Array] | None:
    """The values of index operands, where all of them are computed from constants."""
    known = [index.known for index in indices if isinstance(index, Free) and index.known]
    if len(known) < len(indices):
        return None
    shapes = [index.shape for index in indices]
    return [jnp.broadcast_to(k.value, shape) for k, shape in zip(known, shapes, strict=True)]


@rules_for("gather")
def _gather(interpreter: Interpreter, eqn: JaxprEqn, operand: Value, indices: Value) -> Value:
    shape = shape_of(eqn.outvars[0])
    known = known_indices(indices)
    if isinstance(operand, Free):
        return interpreter.source(shape)
    if isinstance(operand, Weight):
        spread = Spread(operand.array, operand.shape)
        if known:
            gathered = _gather_at(spread, known[0], eqn.params, shape)
            dims = eqn.params["dimension_numbers"]
            picked = frozenset(dims.start_index_map) & frozenset(dims.collapsed_slice_dims)
            made_of = _gathered_axes(dims, len(operand.shape), len(shape))
            axes = tuple(picked if axis is None else frozenset({axis}) for axis in made_of)
            return viewed(operand, gathered, axes)
        if not isinstance(indices, Flow):
            return unknown(eqn)[0]
        # A table of tokens that is a kernel elsewhere too (a tied embedding).
        return pass_kernel(interpreter, _look_up(interpreter, eqn, operand, indices))
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
    kept = [i for i in range(len(table.shape)) if i not in dims.collapsed_slice_dims]
    writes = dict(zip(kept, dims.offset_dims, strict=False))

    def contract(flow: Spread, weight: Spread, *, by_taps: bool = False) -> Spread:
        return _gather_anywhere(interpreter, weight, params, shape)

    return KernelUse(
        table,
        v.replace(tokens, exponent=jnp.int32(0)),
        inputs=tuple(sorted(picked)),
        outputs=tuple(i for i in range(len(table.shape)) if i not in picked),
        taps=(),
        batch=(),
        groups=1,
        reads={},
        writes={i: axis for i, axis in writes.items() if i not in picked},
        contract=contract,
        shape=shape,
        is_lookup=True,
    )


def _moved(interpreter: Interpreter, source: Flow, spread: Spread) -> Flow:
    return interpreter.flow(spread, source.exponent, ancestors=source.lineage, rest=source.rest)


def _gather_at(x: Spread, indices: Array, params: dict[str, Any], shape: Shape) -> Spread:
    """A gather whose indices are known; axes that it takes whole stay uniform."""
    dims, sizes = params["dimension_numbers"], list(params["slice_sizes"])
    for axis, size in enumerate(x.shape):
        if x.uniform(axis) and sizes[axis] == size and axis not in dims.operand_batching_dims:
            sizes[axis] = 1
        else:
            x = x.full(axis)
    array = lax.gather(x.array, indices, dims, tuple(sizes), mode=params["mode"], fill_value=0)
    return Spread(array, shape)


def _gather_anywhere(
    interpreter: Interpreter, x: Spread, params: dict[str, Any], shape: Shape
) -> Spread:
    """A gather whose indices are not known: sums over the axes that it takes a part of."""
    made_of = _gathered_axes(params["dimension_numbers"], len(x.shape), len(shape))
    batched = params["dimension_numbers"].operand_batching_dims
    sizes = enumerate(params["slice_sizes"])
    partial = [i for i, size in sizes if size < x.shape[i] and i not in batched]
    array = interpreter.counting.sum(x, partial).array
    # Axes that are summed and dropped go last, where they are of size one.
    order = [axis for axis in made_of if axis is not None]
    order += [axis for axis in range(len(x.shape)) if axis not in order]
    moved = iter(array.transpose(order).shape)
    target = [1 if axis is None else next(moved) for axis in made_of]
    return Spread(array.transpose(order).reshape(target), shape)


def _gathered_axes(dims: Any, operand_rank: int, rank: int) -> list[int | None]:
    """For each axis of a gather's result the operand's axis that it runs along, if there is one."""
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
    if isinstance(operand, Free):
        return interpreter.source(shape)
    spread = operand.spread if isinstance(operand, Flow) else Spread(operand.array, operand.shape)
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
    known = _required(interpreter, eqn, operand, update, *starts)
    if known is None:
        return unknown(eqn)[0]
    (x, y), exponent, ancestors, rest = _written(operand, update)
    return interpreter.flow(
        Spread(lax.dynamic_update_slice(x, y, known), operand.shape),
        exponent,
        ancestors=ancestors,
        rest=rest,
    )


@rules_for("scatter scatter-add scatter-max scatter-min scatter-sub")
def _scatter(
    interpreter: Interpreter, eqn: JaxprEqn, operand: Value, indices: Value, update: Value
) -> Value:
    known = _required(interpreter, eqn, operand, update, indices)
    if known is None:
        return unknown(eqn)[0]
    (x, y), exponent, ancestors, rest = _written(operand, update)
    scatter = lax.scatter if eqn.primitive.name == "scatter" else lax.scatter_add
    dims, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    array = scatter(x, known[0], y, dims, mode=mode)
    return interpreter.flow(Spread(array, operand.shape), exponent, ancestors=ancestors, rest=rest)


def _required(
    interpreter: Interpreter, eqn: JaxprEqn, operand: Value, update: Value, *indices: Value
) -> Sequence[Array] | None:
    """The indices of a write; nothing where no flow takes part."""
    if not isinstance(operand, Flow) and not isinstance(update, Flow):
        return None
    known = known_indices(*indices)
    if known is None:
        raise NotImplementedError(
            f"no path semantics for {eqn.primitive.name!r} at positions that are not computed "
            f"from constants, used at {interpreter.source_line()}; write with constant indices, "
            "or give the primitive a rule with dpai_jax.paths.register_rule"
        )
    return known


def _written(operand: Value, update: Value) -> tuple[list[Array], Array, frozenset[Any], float]:
    """The counts of an array and of what is written into it, under one exponent."""
    flows = [value for value in (operand, update) if isinstance(value, Flow)]
    aligned, exponent = v.align(flows)
    arrays = iter(aligned)
    counts = [
        jnp.broadcast_to(next(arrays) if isinstance(value, Flow) else 0.0, value.shape)
        for value in (operand, update)
    ]
    ancestors = frozenset.intersection(*(flow.lineage for flow in flows))
    rest = joined_rest([rest_of(operand), rest_of(update)])
    return counts, exponent, ancestors, rest
