"""Reductions, windows, cumulative sums and Fourier transforms.

Counts are added up. The result is a statistic of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from dpai_jax.paths.constants import unknown
from dpai_jax.paths.interpreter import Interpreter, derived, rules_for
from dpai_jax.paths.rules.windows import coverage
from dpai_jax.paths.values import Flow, Spread, Value
from dpai_jax.tools.jaxprs import shape_of

_REDUCTIONS = """
    reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
    """
_CUMULATIVE = "cumlogsumexp cummax cummin cumprod cumsum"
_WINDOWS = """
    reduce_window_max reduce_window_min reduce_window_sum
    """


@rules_for(_REDUCTIONS)
def _reduce(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
    return _sum_away(interpreter, eqn, x, eqn.params["axes"])


def _sum_away(
    interpreter: Interpreter, eqn: JaxprEqn, x: Value, axes: Sequence[int], which: int = 0
) -> Value:
    if not isinstance(x, Flow):
        return unknown(eqn)[which]
    array = jnp.squeeze(interpreter.counting.sum(x.spread, axes).array, tuple(axes))
    shape = tuple(size for i, size in enumerate(x.shape) if i not in axes)
    return derived(interpreter, eqn, x, Spread(array, shape), _summed(x.at_zero), which)


@rules_for("reduce")
def _reduce_custom(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    operands = args[: len(args) // 2]
    axes = eqn.params["dimensions"]
    return [_sum_away(interpreter, eqn, x, axes, i) for i, x in enumerate(operands)]


@rules_for("pmax pmin psum")
def _reduce_over_devices(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    # Inside a `shard_map` the devices are an axis of the arrays (see `rewriting`).
    axes = eqn.params["axes"]
    if not all(isinstance(axis, int) for axis in axes):
        raise NotImplementedError(
            f"no path semantics for {eqn.primitive.name!r} over the mesh axes {axes} outside "
            f"jax.shard_map, used at {interpreter.source_line()}"
        )
    return [_sum_away(interpreter, eqn, x, axes, i) for i, x in enumerate(args)]


@rules_for("fft")
def _fft(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
    """Every frequency gets the paths of all positions."""
    shape = shape_of(eqn.outvars[0])
    if not isinstance(x, Flow):
        return unknown(eqn)[0]
    axes = range(len(shape) - len(eqn.params["fft_lengths"]), len(shape))
    array = interpreter.counting.sum(x.spread, axes).array
    return derived(interpreter, eqn, x, Spread(array, shape), _summed(x.at_zero))


@rules_for("argmax argmin")
def _argument(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
    return unknown(eqn)[0]


@rules_for(_CUMULATIVE)
def _cumulative(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
    if not isinstance(x, Flow):
        return unknown(eqn)[0]
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]
    array = lax.cumsum(x.spread.full(axis).array, axis, reverse)
    return derived(interpreter, eqn, x, Spread(array, x.shape), _summed(x.at_zero))


@rules_for(_WINDOWS)
def _window(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
    return _pool(interpreter, eqn, x)


@rules_for("reduce_window")
def _window_custom(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    return [_pool(interpreter, eqn, x) for x in args[: len(args) // 2]]


def _pool(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
    shape = shape_of(eqn.outvars[0])
    if not isinstance(x, Flow):
        return unknown(eqn)[0]
    params = eqn.params
    window, strides = list(params["window_dimensions"]), list(params["window_strides"])
    dilation = list(params["window_dilation"])
    spread, scale = x.spread, 1.0
    padding, base_dilation = list(params["padding"]), list(params["base_dilation"])
    for axis, size in enumerate(window):
        covered = coverage(
            x.shape[axis],
            size,
            shape[axis],
            strides[axis],
            padding[axis],
            base_dilation[axis],
            dilation[axis],
        )
        if spread.uniform(axis) and interpreter.counting.stays_uniform(covered):
            scale *= float(covered.sum())
            window[axis] = strides[axis] = dilation[axis] = base_dilation[axis] = 1
            padding[axis] = (0, 0)
        else:
            spread = spread.full(axis)
    array = lax.reduce_window(
        spread.array,
        0.0,
        lax.add,
        window,
        strides,
        padding,
        base_dilation,
        dilation,
    )
    array = interpreter.counting.scaled(array, scale)
    return derived(interpreter, eqn, x, Spread(array, shape), _summed(x.at_zero))


def _summed(at_zero: float) -> float:
    return math.inf if at_zero else 0.0
