"""Contractions: `dot_general` and `conv_general_dilated`, of flows with kernels and with flows.

A contraction of a flow and a kernel is the same contraction of the counts and the mask. Values
that no path passes count as all ones. A contraction of two flows (attention's QKᵀ, its product
with V) is a product followed by a sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from dpai_jax.paths import values as v
from dpai_jax.paths._jax import shape_of
from dpai_jax.paths.constants import unknown
from dpai_jax.paths.interpreter import Interpreter, Use, rules_for
from dpai_jax.paths.rules.elementwise import nonzero, product_terms
from dpai_jax.paths.values import Axes, Flow, Free, Spread, Value, Weight

Bilinear = Callable[[Spread, Spread], Spread]


@rules_for("dot_general")
def _dot_general(interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    dims = eqn.params["dimension_numbers"]
    (contracted, batch) = dims
    for side, (operand, other) in enumerate(((lhs, rhs), (rhs, lhs))):
        if isinstance(operand, Weight) and isinstance(other, Flow):
            rest = set(range(len(operand.shape))) - set(contracted[side]) - set(batch[side])
            groups = math.prod(operand.shape[i] for i in batch[side])
            outputs = {*rest, *batch[side]}
            _record(interpreter, operand, set(contracted[side]), outputs, set(), groups)
    shape = shape_of(eqn.outvars[0])
    return _contract(interpreter, eqn, lhs, rhs, lambda a, b: _dot(a, b, dims, shape))


@rules_for("conv_general_dilated")
def _conv(interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    if isinstance(lhs, Flow) and isinstance(rhs, Weight):
        out, features, *taps = eqn.params["dimension_numbers"].rhs_spec
        groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
        _record(interpreter, rhs, {features}, {out}, set(taps), groups)
    shape = shape_of(eqn.outvars[0])
    return _contract(interpreter, eqn, lhs, rhs, lambda a, b: _convolve(a, b, eqn.params, shape))


def _contract(
    interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value, bilinear: Bilinear
) -> Value:
    if isinstance(lhs, Flow) and isinstance(rhs, Flow):
        return _contract_flows(interpreter, lhs, rhs, bilinear)
    if isinstance(lhs, Flow):
        flow, other = lhs, rhs
    elif isinstance(rhs, Flow):
        flow, other = rhs, lhs
    else:
        return unknown(eqn)[0]
    a, b = _spread(lhs), _spread(rhs)
    if interpreter.entering and isinstance(other, Weight):
        if other is rhs:
            b = _entered(b, functools.partial(bilinear, a))
        else:
            a = _entered(a, lambda weight: bilinear(weight, b))
    # A matrix of known numbers (a mean, a rotation) is no kernel: what it gives is a statistic.
    known = isinstance(other, Free) and other.known is not None
    return interpreter.flow(
        bilinear(a, b),
        flow.exponent,
        ancestors=flow.lineage if known else frozenset(),
        rest=math.inf if flow.always_alive and not isinstance(other, Weight) else 0.0,
    )


def _contract_flows(interpreter: Interpreter, lhs: Flow, rhs: Flow, bilinear: Bilinear) -> Flow:
    a, b = product_terms(interpreter, lhs, rhs)
    (x, y), exponent = v.align([a, b])
    first = bilinear(Spread(x, a.shape), Spread(rhs.alive(), b.shape))
    second = bilinear(Spread(lhs.alive(), a.shape), Spread(y, b.shape))
    # The two terms may be uniform along different axes.
    array = first.array + second.array
    rest = math.inf if lhs.always_alive and rhs.always_alive else 0.0
    spread = Spread(array, first.shape)
    return interpreter.flow(spread, exponent, ancestors=lhs.lineage & rhs.lineage, rest=rest)


def _entered(weight: Spread, contract: Callable[[Spread], Spread]) -> Spread:
    """A kernel whose gradient is the number of paths that enter at each of its weights."""

    def paths(array: Array) -> Array:
        return jnp.sum(contract(Spread(array, weight.shape)).array)

    entering = jax.grad(paths)(weight.array)
    largest = jnp.max(entering, initial=0.0)
    entering = entering / jnp.where(largest > 0, largest, 1.0)
    return Spread(v.with_gradient(weight.array, entering), weight.shape)


def _spread(value: Value) -> Spread:
    if isinstance(value, Flow):
        return value.spread
    if isinstance(value, Weight):
        return Spread(value.array, value.shape)
    present = nonzero(value)
    return v.ones(value.shape) if present is None else Spread(jnp.asarray(present), value.shape)


def _record(
    interpreter: Interpreter,
    weight: Weight,
    inputs: set[int],
    outputs: set[int],
    taps: set[int],
    groups: int,
) -> None:
    """Notes what each axis of the kernels in a weight is to the contraction that uses it."""
    for leaf, axes in weight.sources:
        into, positions = _leaf_axes(axes, inputs), _leaf_axes(axes, taps)
        # A kernel's axis that is folded from features of both sides counts as an input.
        outof = tuple(a for a in _leaf_axes(axes, outputs) if a not in into + positions)
        interpreter.uses.append(Use(leaf, into, outof, positions, groups))


def _leaf_axes(axes: Axes, of_view: set[int]) -> tuple[int, ...]:
    return tuple(sorted(set().union(*(axes[i] for i in of_view)))) if of_view else ()


def _dot(a: Spread, b: Spread, dims: Any, shape: v.Shape) -> Spread:
    """`lax.dot_general`, touching uniform axes only where it must."""
    (contract_a, contract_b), (batch_a, batch_b) = dims
    scale = 1.0
    for i, j in zip(contract_a, contract_b, strict=True):
        if a.uniform(i) and b.uniform(j):
            scale *= a.shape[i]
        elif a.uniform(i):
            b = Spread(jnp.sum(b.array, j, keepdims=True), b.shape)
        elif b.uniform(j):
            a = Spread(jnp.sum(a.array, i, keepdims=True), a.shape)
    for i, j in zip(batch_a, batch_b, strict=True):
        if a.uniform(i) != b.uniform(j):
            a, b = a.full(i), b.full(j)
    array = lax.dot_general(
        a.array, b.array, dims, lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return Spread(array * scale if scale != 1.0 else array, shape)


def _convolve(lhs: Spread, rhs: Spread, params: dict[str, Any], shape: v.Shape) -> Spread:
    """`lax.conv_general_dilated`, keeping axes uniform where no padding breaks them."""
    dims = params["dimension_numbers"]
    strides, padding = list(params["window_strides"]), list(params["padding"])
    dilation = list(params["rhs_dilation"])
    rhs = rhs.full()
    spread_axes = [dims.lhs_spec[1]] + (
        [dims.lhs_spec[0]] if params["batch_group_count"] > 1 else []
    )
    taps = rhs.array
    for i, axis in enumerate(dims.lhs_spec[2:]):
        padded = tuple(padding[i]) != (0, 0) or params["lhs_dilation"][i] != 1
        if lhs.uniform(axis) and not padded:
            taps = jnp.sum(taps, dims.rhs_spec[2 + i], keepdims=True)
            strides[i], dilation[i] = 1, 1
        else:
            spread_axes.append(axis)
    array: Array = lax.conv_general_dilated(
        lhs.full(*spread_axes).array,
        taps,
        strides,
        padding,
        params["lhs_dilation"],
        dilation,
        dims,
        params["feature_group_count"],
        params["batch_group_count"],
        lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return Spread(array, shape)
