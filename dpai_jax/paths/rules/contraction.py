"""Contractions: `dot_general` and `conv_general_dilated`, of flows with kernels and with flows.

A contraction of a flow and a kernel is the same contraction of the counts and the mask. A value
that does not depend on the input counts as all ones. A contraction of two flows (attention's QKᵀ,
and its product with V) is a product followed by a sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import JaxprEqn

from dpai_jax.paths import values as v
from dpai_jax.paths.constants import unknown
from dpai_jax.paths.counting import Counting
from dpai_jax.paths.interpreter import Interpreter, rules_for
from dpai_jax.paths.kernels import KernelUse
from dpai_jax.paths.rules.elementwise import nonzero, product_terms
from dpai_jax.paths.rules.windows import coverage
from dpai_jax.paths.values import Flow, Independent, Shape, Spread, Value, Weight, WeightSum
from dpai_jax.tools.convolutions import Convolution
from dpai_jax.tools.jaxprs import dtype_of, shape_of
from dpai_jax.tools.sums import product_sum, sum_taps

Bilinear = Callable[[Spread, Spread], Spread]


@rules_for("dot_general", carries_gains=True)
def _dot_general(interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    dims, shape = eqn.params["dimension_numbers"], shape_of(eqn.outvars[0])
    contracted, batch = dims

    def dot(a: Spread, b: Spread) -> Spread:
        return interpreter.counting.dot(a, b, dims, shape)

    for side, (weight, flow) in enumerate(((lhs, rhs), (rhs, lhs))):
        if isinstance(weight, Weight) and isinstance(flow, Flow):
            summed = (*contracted[side], *batch[side])
            outputs = tuple(i for i in range(len(weight.shape)) if i not in summed)
            # The result has the batch axes first, then the left side's, then the right side's.
            before = len(batch[0]) if side == 0 else len(flow.shape) - len(contracted[0])
            use = KernelUse(
                weight,
                flow,
                inputs=tuple(contracted[side]),
                outputs=outputs,
                taps=(),
                batch=tuple(batch[side]),
                groups=1,
                reads=dict(zip(summed, (*contracted[1 - side], *batch[1 - side]), strict=True)),
                writes={axis: before + i for i, axis in enumerate(outputs)}
                | {axis: i for i, axis in enumerate(batch[side])},
                contract=functools.partial(_dot_either, dot, side),
                shape=shape,
            )
            return pass_kernel(interpreter, use)
    return _contract(interpreter, eqn, lhs, rhs, dot)


def _dot_either(
    dot: Bilinear, side: int, flow: Spread, weight: Spread, *, by_taps: bool = False
) -> Spread:
    return dot(weight, flow) if side == 0 else dot(flow, weight)


@rules_for("ragged_dot_general", carries_constants=True)
def _ragged_dot(
    interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value, sizes: Value, *offset: Value
) -> Sequence[Value]:
    """Multiplies rows by the kernel of their group, or by all if the groups are unknown."""
    program = functools.partial(_by_groups, params=eqn.params)
    avals = [jax.ShapeDtypeStruct(shape_of(var), dtype_of(var)) for var in eqn.invars[:3]]
    return interpreter.evaluate(jax.make_jaxpr(program)(*avals), lhs, rhs, sizes)


def _by_groups(lhs: Array, rhs: Array, sizes: Array, *, params: dict[str, Any]) -> Array:
    """`lax.ragged_dot_general` from products of all rows with the kernels of all groups."""
    numbers = params["ragged_dot_dimension_numbers"]
    (contracted, batch), (ragged,) = numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    if ragged in batch[0]:
        return dot(lhs, rhs, numbers.dot_dimension_numbers)
    members = _members(sizes, lhs.shape[ragged]).astype(lhs.dtype)
    # The left side repeated for each group, (groups, *lhs.shape), with other groups' rows zero.
    by_group = dot(members, lhs, (((), ()), ((1,), (ragged,))))
    by_group = jnp.moveaxis(by_group, 0, ragged + 1)
    left_contracted, left_batch = ([i + 1 for i in axes] for axes in (contracted[0], batch[0]))
    if ragged in contracted[0]:
        products = dot(by_group, rhs, ((left_contracted, contracted[1]), (left_batch, batch[1])))
        return jnp.moveaxis(products, len(left_batch), 0)
    (group,) = numbers.rhs_group_dimensions
    batch_axes = ([0, *left_batch], [group, *batch[1]])
    return jnp.sum(dot(by_group, rhs, ((left_contracted, contracted[1]), batch_axes)), 0)


def _members(sizes: Array, rows: int) -> Array:
    """Which rows belong to each group, (groups, rows); all, if groups differ within a batch."""
    if sizes.ndim > 1:
        return jnp.ones((sizes.shape[-1], rows), bool)
    ends = jnp.cumsum(sizes)[:, None]
    row = jnp.arange(rows)[None]
    return (row < ends) & (row >= ends - sizes[:, None])


@rules_for("conv_general_dilated", carries_gains=True)
def _conv(interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    lhs = interpreter.baked(lhs)  # it may be a kernel, slid over a flow
    params, shape = dict(eqn.params), shape_of(eqn.outvars[0])
    dims, batch_groups = params["dimension_numbers"], params["batch_group_count"]
    if batch_groups > 1:
        # Groups of images with separate features become groups of features.
        lhs = _batch_groups_as_features(lhs, dims, batch_groups)
        params["feature_group_count"] = batch_groups
    convolve = functools.partial(
        _convolve, params=params, shape=shape, counting=interpreter.counting
    )
    if isinstance(lhs, Flow) and isinstance(rhs, Weight):
        out, features, *taps = dims.rhs_spec
        use = KernelUse(
            rhs,
            lhs,
            inputs=(features,),
            outputs=(out,),
            taps=tuple(taps),
            batch=(),
            groups=params["feature_group_count"],
            reads={features: dims.lhs_spec[1]},
            writes={out: dims.out_spec[1]},
            contract=convolve,
            shape=shape,
        )
        return pass_kernel(interpreter, use)
    return _contract(interpreter, eqn, lhs, rhs, convolve)


def _batch_groups_as_features(value: Value, dims: Any, groups: int) -> Value:
    batch, features, *_ = dims.lhs_spec
    n, n_features = value.shape[batch], value.shape[features]
    shape = list(value.shape)
    shape[batch], shape[features] = n // groups, groups * n_features
    if isinstance(value, Independent | WeightSum):
        return Independent(tuple(shape))
    x = jnp.moveaxis(value.spread.full(batch, features).array, (batch, features), (0, 1))
    x = x.reshape(groups, n // groups, n_features, *x.shape[2:])
    x = jnp.moveaxis(x, 0, 1).reshape(n // groups, groups * n_features, *x.shape[3:])
    x = jnp.moveaxis(x, (0, 1), (batch, features))
    if isinstance(value, Weight):
        return v.replace(value, array=x)
    return v.replace(value, mantissa=x, shape=tuple(shape))


def pass_kernel(interpreter: Interpreter, use: KernelUse) -> Flow:
    """The flow behind a kernel, a new unit without ancestors."""
    exponent, own = use.flow.exponent, use.weight.exponent
    use, behind = use.plain(interpreter.counting)
    counts = interpreter.at_kernel(use)
    for gain in behind:
        counts = counts._replace(array=interpreter.counting.product(counts.array, gain))
    return interpreter.flow(counts, exponent if own is None else exponent + own)


def _contract(
    interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value, bilinear: Bilinear
) -> Value:
    """A contraction of two flows, or of a flow with something other than a kernel."""
    if isinstance(lhs, Flow) and isinstance(rhs, Flow):
        return _contract_flows(interpreter, lhs, rhs, bilinear)
    flow, other = (lhs, rhs) if isinstance(lhs, Flow) else (rhs, lhs)
    if not isinstance(flow, Flow):
        return unknown(eqn)[0]
    # Multiplying by a matrix of known numbers (a mean, a rotation) gives a statistic.
    known = isinstance(other, Independent) and other.known is not None
    return interpreter.flow(
        bilinear(_spread(lhs), _spread(rhs)),
        flow.exponent,
        ancestors=flow.lineage if known else frozenset(),
        at_zero=math.inf if flow.always_alive and not isinstance(other, Weight) else 0.0,
    )


def _contract_flows(interpreter: Interpreter, lhs: Flow, rhs: Flow, bilinear: Bilinear) -> Flow:
    a, b = product_terms(interpreter, lhs, rhs)
    (x, y), exponent = v.align([a, b])
    alive = interpreter.counting.alive
    first = bilinear(Spread(x, a.shape), Spread(alive(rhs), b.shape))
    second = bilinear(Spread(alive(lhs), a.shape), Spread(y, b.shape))
    # The two terms may be uniform along different axes.
    array = first.array + second.array
    at_zero = math.inf if lhs.always_alive and rhs.always_alive else 0.0
    spread = Spread(array, first.shape)
    return interpreter.flow(spread, exponent, ancestors=lhs.lineage & rhs.lineage, at_zero=at_zero)


def _spread(value: Value) -> Spread:
    if isinstance(value, Flow | Weight):
        return value.spread
    present = nonzero(value) if isinstance(value, Independent) else None
    return v.ones(value.shape) if present is None else Spread(jnp.asarray(present), value.shape)


def _convolve(
    lhs: Spread,
    rhs: Spread,
    *,
    params: dict[str, Any],
    shape: Shape,
    counting: Counting,
    by_taps: bool = False,
) -> Spread:
    """`lax.conv_general_dilated` that keeps axes uniform where the counting allows it.

    Along an axis that stays uniform in spite of padding, each tap is weighted by the fraction of
    positions at which it is inside the map.
    """
    dims = params["dimension_numbers"]
    strides, padding = list(params["window_strides"]), list(params["padding"])
    base_dilation, dilation = list(params["lhs_dilation"]), list(params["rhs_dilation"])
    rhs = rhs.full()
    weights, summed = jnp.float32(1), []
    for i, axis in enumerate(dims.lhs_spec[2:]):
        tap = dims.rhs_spec[2 + i]
        covered = coverage(
            lhs.shape[axis],
            rhs.shape[tap],
            shape[dims.out_spec[2 + i]],
            strides[i],
            padding[i],
            base_dilation[i],
            dilation[i],
        )
        if lhs.uniform(axis) and counting.stays_uniform(covered):
            if not np.all(covered == 1):
                others = [j for j in range(len(rhs.shape)) if j != tap]
                weights = weights * jnp.expand_dims(jnp.asarray(covered), others)
            summed.append(tap)
            strides[i] = base_dilation[i] = dilation[i] = 1
            padding[i] = (0, 0)
    taps = counting.scaled(rhs.array, weights) if weights.ndim else rhs.array
    taps = sum_taps(taps, tuple(summed))
    n_summed = math.prod(rhs.shape[tap] for tap in summed)
    kernel = Spread(taps, rhs.shape, None if rhs.below is None else rhs.below * n_summed)
    batch, features, *_ = dims.lhs_spec
    groups = params["feature_group_count"]
    if counting.averages and len(summed) == len(strides) and lhs.uniform(batch):
        return _convolve_uniform(lhs, kernel, dims, groups, shape)
    kept = [axis for i, axis in enumerate(dims.lhs_spec[2:]) if dims.rhs_spec[2 + i] not in summed]
    how = Convolution(
        tuple(strides), tuple(padding), tuple(base_dilation), tuple(dilation), dims, groups
    )
    x = lhs.full(features, *kept).array
    return Spread(how.by_taps(x, taps) if by_taps else how.at_once(x, taps), shape)


def _convolve_uniform(lhs: Spread, taps: Spread, dims: Any, groups: int, shape: Shape) -> Spread:
    """A convolution of counts that are uniform along all axes, by a kernel with summed taps."""
    out, into, *positions = dims.rhs_spec
    n_out, n_in = taps.shape[out], taps.shape[into]
    kernel = taps.array.transpose(into, out, *positions).reshape(n_in, groups, n_out // groups)
    features = lhs.full(dims.lhs_spec[1]).array.reshape(groups, n_in, 1).swapaxes(0, 1)
    sizes = [1] * len(shape)
    sizes[dims.out_spec[1]] = n_out
    below, write = (taps.below, lhs.below), (len(positions) > 0, True)
    sums = product_sum(kernel, features, (0,), below, write)
    return Spread(sums.reshape(sizes), shape)
