"""Contractions: `dot_general` and `conv_general_dilated`, of flows with kernels and with flows.

A contraction of a flow and a kernel is the same contraction of the counts and the mask. Values
that no path passes count as all ones. A contraction of two flows (attention's QKᵀ, its product
with V) is a product followed by a sum.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding

from dpai_jax.paths import values as v
from dpai_jax.paths._jax import shape_of
from dpai_jax.paths.constants import unknown
from dpai_jax.paths.interpreter import Interpreter, Use, rules_for
from dpai_jax.paths.meshes import mesh_axes, split_along
from dpai_jax.paths.rules.elementwise import nonzero, product_terms
from dpai_jax.paths.rules.windows import coverage
from dpai_jax.paths.sums import fold, product_sum
from dpai_jax.paths.values import Axes, Flow, Free, Spread, Value, Weight

Bilinear = Callable[[Spread, Spread], Spread]


@rules_for("dot_general")
def _dot_general(interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    dims = eqn.params["dimension_numbers"]
    (contracted, batch) = dims
    kernel = None
    for side, (operand, other) in enumerate(((lhs, rhs), (rhs, lhs))):
        if isinstance(operand, Weight) and isinstance(other, Flow):
            summed = (*contracted[side], *batch[side])
            rest = [i for i in range(len(operand.shape)) if i not in summed]
            groups = math.prod(operand.shape[i] for i in batch[side])
            outputs = {*rest, *batch[side]}
            _record(interpreter, operand, set(contracted[side]), outputs, set(), groups)
            meets = dict(zip(summed, (*contracted[1 - side], *batch[1 - side]), strict=True))
            # Of the result the batch axes come first, then those of the left side, of the right.
            n_before = len(batch[0]) if side == 0 else len(other.shape) - len(contracted[0])
            becomes = {axis: n_before + i for i, axis in enumerate(rest)}
            becomes |= {axis: i for i, axis in enumerate(batch[side])}
            kernel = _Kernel(operand, meets, becomes)
    shape = shape_of(eqn.outvars[0])
    dot = _dot_by_sums if interpreter.mean_field else _dot
    return _contract(interpreter, eqn, lhs, rhs, lambda a, b: dot(a, b, dims, shape), kernel)


@rules_for("conv_general_dilated")
def _conv(interpreter: Interpreter, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    dims = eqn.params["dimension_numbers"]
    out, features, *taps = dims.rhs_spec
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    kernel, on_mesh = None, False
    if isinstance(lhs, Flow) and isinstance(rhs, Weight):
        _record(interpreter, rhs, {features}, {out}, set(taps), groups)
        # The features of a group are what those of its outputs are made of.
        split = features if groups == 1 else out
        kernel = _Kernel(rhs, {split: dims.lhs_spec[1]}, {out: dims.out_spec[1]})
        on_mesh = _sharding(interpreter, rhs) is not None
    shape = shape_of(eqn.outvars[0])
    bilinear = functools.partial(
        _convolve,
        params=eqn.params,
        shape=shape,
        mean_field=interpreter.mean_field,
        convolve=_convolve_by_taps if on_mesh and groups > 1 else _convolve_at_once,
    )
    return _contract(interpreter, eqn, lhs, rhs, bilinear, kernel)


class _Kernel(NamedTuple):
    """A kernel that meets a flow.

    Attributes:
      weight: its mask.
      meets: the flow's axes that its axes meet.
      becomes: the result's axes that its axes become.
    """

    weight: Weight
    meets: dict[int, int]
    becomes: dict[int, int]


def _contract(
    interpreter: Interpreter,
    eqn: JaxprEqn,
    lhs: Value,
    rhs: Value,
    bilinear: Bilinear,
    kernel: _Kernel | None,
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
    if kernel is not None and other is rhs:
        a = _split(interpreter, kernel.weight, kernel.meets, a)
    elif kernel is not None:
        b = _split(interpreter, kernel.weight, kernel.meets, b)
    if interpreter.entering and isinstance(other, Weight):
        if other is rhs:
            b = _entered(b, functools.partial(bilinear, a))
        else:
            a = _entered(a, lambda weight: bilinear(weight, b))
    result = bilinear(a, b)
    if kernel is not None:
        result = _split(interpreter, kernel.weight, kernel.becomes, result)
    # A matrix of known numbers (a mean, a rotation) is no kernel: what it gives is a statistic.
    known = isinstance(other, Free) and other.known is not None
    return interpreter.flow(
        result,
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


def _split(interpreter: Interpreter, kernel: Weight, places: dict[int, int], x: Spread) -> Spread:
    """Counts in which a kernel's axes have these places, split on a mesh like the kernel."""
    sharding = _sharding(interpreter, kernel)
    if sharding is None:
        return x
    names, split = mesh_axes(sharding), {}
    for axis, place in sorted(places.items()):
        # Of axes that a reshape makes one the first splits it in blocks, of one that it makes
        # several it is the first that is split.
        for of_kernel in sorted(kernel.sources[0][1][axis])[:1]:
            split[place], names[of_kernel] = names[of_kernel], ()
    return Spread(split_along(x.array, sharding.mesh, split), x.shape)


def _sharding(interpreter: Interpreter, kernel: Weight) -> NamedSharding | None:
    return interpreter.shardings.get(kernel.sources[0][0])


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


def _dot_by_sums(a: Spread, b: Spread, dims: Any, shape: v.Shape) -> Spread:
    """`_dot` of an array and a vector by sums in any order; of other arrays as it is."""
    (contract_a, contract_b), (batch_a, batch_b) = dims
    if _is_vector(b, {*contract_b, *batch_b}):
        sums = _dot_vector(a, b, contract_a, contract_b, batch_a, batch_b)
        ones_first = 0
    elif _is_vector(a, {*contract_a, *batch_a}):
        sums = _dot_vector(b, a, contract_b, contract_a, batch_b, batch_a)
        ones_first = len(a.shape) - len(contract_a) - len(batch_a)
    else:
        return _dot(a, b, dims, shape)
    batch, rest = sums.shape[: len(batch_a)], sums.shape[len(batch_a) :]
    ones_last = len(shape) - len(sums.shape) - ones_first
    sizes = (*batch, *(1,) * ones_first, *rest, *(1,) * ones_last)
    return Spread(sums.reshape(sizes), shape)


def _is_vector(x: Spread, axes: set[int]) -> bool:
    """Whether an array is uniform but along some axes."""
    return all(i in axes or x.uniform(i) for i in range(len(x.shape)))


def _dot_vector(
    x: Spread,
    vector: Spread,
    contract: Sequence[int],
    contract_vector: Sequence[int],
    batch: Sequence[int],
    batch_vector: Sequence[int],
) -> Array:
    """The contraction with a vector: its batch axes, then those of `x` that are left."""
    pairs = zip([*batch, *contract], [*batch_vector, *contract_vector], strict=True)
    places = sorted(pairs)
    others = tuple(i for i in range(len(x.shape)) if i not in (*batch, *contract))
    axes = [j for _, j in places]
    rest = [j for j in range(len(vector.shape)) if j not in axes]
    aligned = vector.array.transpose(*axes, *rest).reshape([vector.array.shape[j] for j in axes])
    sums = product_sum(x.array, jnp.expand_dims(aligned, others), tuple(contract))
    uniform = [
        x.shape[i]
        for i, j in zip(contract, contract_vector, strict=True)
        if x.uniform(i) and vector.uniform(j)
    ]
    sums = jnp.squeeze(sums.transpose(*batch, *others, *contract), _last(len(contract), sums.ndim))
    return sums * float(math.prod(uniform))


def _last(number: int, rank: int) -> tuple[int, ...]:
    return tuple(range(rank - number, rank))


def _convolve(
    lhs: Spread,
    rhs: Spread,
    params: dict[str, Any],
    shape: v.Shape,
    mean_field: bool,
    convolve: Callable[..., Array],
) -> Spread:
    """`lax.conv_general_dilated`, keeping axes uniform where no padding breaks them.

    In the mean field padding breaks nothing: each tap counts by the fraction of positions at which
    it lies inside.
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
        if lhs.uniform(axis) and (mean_field or np.all(covered == 1)):
            if not np.all(covered == 1):
                others = [j for j in range(len(rhs.shape)) if j != tap]
                weights = weights * jnp.expand_dims(jnp.asarray(covered), others)
            summed.append(tap)
            strides[i] = base_dilation[i] = dilation[i] = 1
            padding[i] = (0, 0)
    taps = rhs.array * weights if weights.ndim else rhs.array
    taps = fold(taps, tuple(summed))
    batch, features, *_ = dims.lhs_spec
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    is_uniform = len(summed) == len(strides) and lhs.uniform(batch) and batch_groups == 1
    if mean_field and is_uniform:
        return _convolve_uniform(lhs, taps, dims, groups, shape)
    kept = [axis for i, axis in enumerate(dims.lhs_spec[2:]) if dims.rhs_spec[2 + i] not in summed]
    batches = [batch] if batch_groups > 1 else []
    array = convolve(
        lhs.full(features, *batches, *kept).array,
        taps,
        strides,
        padding,
        base_dilation,
        dilation,
        dims,
        groups,
        batch_groups,
    )
    return Spread(array, shape)


_convolve_at_once = functools.partial(
    lax.conv_general_dilated,
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
)


def _convolve_by_taps(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    dilation: Sequence[int],
    dims: Any,
    groups: int,
    batch_groups: int,
) -> Array:
    """`lax.conv_general_dilated` of several groups as a sum over taps, for a kernel on a mesh.

    The compiler's partitioner brings the kernel of a grouped convolution to each device, or fails.
    """
    x, kernel = x.transpose(dims.lhs_spec), kernel.transpose(dims.rhs_spec)
    edges = [
        (low, high, step - 1) for (low, high), step in zip(padding, base_dilation, strict=True)
    ]
    x = lax.pad(x, jnp.float32(0), [(0, 0, 0), (0, 0, 0), *edges])
    n_groups = groups * batch_groups
    batches, features, *sizes = x.shape
    n_out, n_in, *window = kernel.shape
    x = x.reshape(batch_groups, batches // batch_groups, groups, features // groups, *sizes)
    kernel = kernel.reshape(n_groups, n_out // n_groups, n_in, *window)
    reaches = [(n - 1) * step + 1 for n, step in zip(window, dilation, strict=True)]
    ends = [
        (size - reach) // stride * stride + 1
        for size, reach, stride in zip(sizes, reaches, strides, strict=True)
    ]

    def of_tap(tap: tuple[int, ...]) -> Array:
        starts = [i * step for i, step in zip(tap, dilation, strict=True)]
        places = tuple(
            slice(start, start + end, stride)
            for start, end, stride in zip(starts, ends, strides, strict=True)
        )
        weights = kernel[(..., *tap)].reshape(batch_groups, groups, n_out // n_groups, n_in)
        return jnp.einsum(
            "abgi...,agoi->bago...", x[(..., *places)], weights, precision=lax.Precision.HIGHEST
        )

    sums = functools.reduce(jnp.add, map(of_tap, itertools.product(*map(range, window))))
    found = sums.reshape(batches // batch_groups, n_out, *sums.shape[4:])
    return found.transpose(np.argsort(dims.out_spec))


def _convolve_uniform(lhs: Spread, taps: Array, dims: Any, groups: int, shape: v.Shape) -> Spread:
    """A convolution of what is uniform everywhere, by a kernel whose taps are summed up."""
    out, into, *positions = dims.rhs_spec
    n_out, n_in = taps.shape[out], taps.shape[into]
    kernel = taps.transpose(into, out, *positions).reshape(n_in, groups, n_out // groups)
    features = lhs.full(dims.lhs_spec[1]).array.reshape(groups, n_in, 1).swapaxes(0, 1)
    sizes = [1] * len(shape)
    sizes[dims.out_spec[1]] = n_out
    return Spread(product_sum(kernel, features, (0,)).reshape(sizes), shape)
