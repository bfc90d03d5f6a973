"""Following features alone: an evaluation in which paths end at every kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from dpai_jax.paths import values as v
from dpai_jax.paths._jax import find_primitives, scan_arity, shape_of
from dpai_jax.paths.interpreter import Interpreter
from dpai_jax.paths.values import Flow, Free, Known, Shape, Spread, Value, Weight

DOT, CONV, GATHER, SCAN = find_primitives("dot_general conv_general_dilated gather scan")


@dataclasses.dataclass(frozen=True)
class _Open(Flow):
    """A flow that is alive wherever it is a factor."""

    def alive(self) -> Array:
        return jnp.ones((1,) * len(self.shape), jnp.float32)


@dataclasses.dataclass
class Following(Interpreter):
    """An evaluation in which paths end at every kernel, and start behind it where told to.

    Scans are written out, so that what is read and written in each step stands for itself. The
    other factors of a product count as alive.

    Attributes:
      start: what the network's input holds, one or zero.
      starts: for each use of a kernel, what its output features hold; zeros where not given.
      mixed: for each use of a kernel, whether it holds weights that nobody prunes.
      kernels: the uses met, their masks as (groups, inputs, outputs, taps).
      reads: for each of them, what arrives at its input features.
    """

    start: Array | float = 1.0
    starts: Sequence[Array] = ()
    mixed: Sequence[bool] = ()
    kernels: list[Array] = dataclasses.field(default_factory=list)
    reads: list[Array] = dataclasses.field(default_factory=list)

    def flow(self, *args: Any, **arguments: Any) -> Flow:
        """As `Interpreter.flow`."""
        flow = super().flow(*args, **arguments)
        return _Open(**{f.name: getattr(flow, f.name) for f in dataclasses.fields(flow)})

    def source(self, shape: Shape) -> Flow:
        """What the input holds, at every unit."""
        return self.flow(Spread(v.ones(shape).array * self.start, shape), jnp.int32(0))

    def apply(self, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
        """The results of one equation."""
        if eqn.primitive is SCAN and any(isinstance(arg, Flow | Weight) for arg in args):
            return self._unrolled(eqn, args)
        if any(isinstance(arg, Flow) for arg in args):
            if eqn.primitive is DOT and any(isinstance(arg, Weight) for arg in args):
                return [self._dot(eqn, *args)]
            if eqn.primitive is CONV and isinstance(args[1], Weight):
                return [self._conv(eqn, *args)]
            if eqn.primitive is GATHER and _is_look_up(eqn, *args):
                return [self._look_up(eqn, *args)]
        return super().apply(eqn, *args)

    def _dot(self, eqn: JaxprEqn, lhs: Any, rhs: Any) -> Flow:
        side = 0 if isinstance(lhs, Weight) else 1
        weight, flow = (lhs, rhs) if side == 0 else (rhs, lhs)
        contracted, batch = eqn.params["dimension_numbers"]
        inputs, groups = contracted[side], batch[side]
        outputs = [i for i in range(len(weight.shape)) if i not in (*inputs, *groups)]
        kernel = weight.array.transpose(*groups, *inputs, *outputs)
        sizes = [[weight.shape[i] for i in axes] for axes in (groups, inputs, outputs)]
        positions = len(flow.shape) - len(groups) - len(inputs)
        ones = [1] * positions
        return self._pass(
            eqn,
            (lhs, rhs),
            kernel.reshape(*map(math.prod, sizes), 1),
            _arriving(flow, [*batch[1 - side], *contracted[1 - side]]),
            [*sizes[0], *(sizes[2] + ones if side == 0 else ones + sizes[2])],
        )

    def _conv(self, eqn: JaxprEqn, flow: Any, weight: Any) -> Flow:
        dims = eqn.params["dimension_numbers"]
        batches = eqn.params["batch_group_count"]
        groups = eqn.params["feature_group_count"] * batches
        (out, into, *taps), (batch, features, *_) = dims.rhs_spec, dims.lhs_spec
        n_out, n_in = weight.shape[out], weight.shape[into]
        kernel = weight.array.transpose(into, out, *taps)
        kernel = kernel.reshape(n_in, groups, n_out // groups, -1).swapaxes(0, 1)
        reads = _arriving(flow, [features] if batches == 1 else [batch, features])
        if batches > 1:
            reads = reads.reshape(batches, -1, n_in).sum(1)
        sizes = [1] * len(weight.shape)
        sizes[dims.out_spec[1]] = n_out
        return self._pass(eqn, (flow, weight), kernel, reads, sizes)

    def _look_up(self, eqn: JaxprEqn, weight: Any, tokens: Any) -> Flow:
        """A table of tokens that is a kernel elsewhere too; every token is an input feature."""
        dims, rows = eqn.params["dimension_numbers"], _rows(eqn, weight)
        outputs = [i for i in range(len(weight.shape)) if i not in rows]
        kernel = weight.array.transpose(*rows, *outputs)
        n_rows = math.prod(weight.shape[i] for i in rows)
        sizes = [1] * len(shape_of(eqn.outvars[0]))
        kept = [i for i in range(len(weight.shape)) if i not in dims.collapsed_slice_dims]
        for axis, i in zip(dims.offset_dims, kept, strict=True):
            sizes[axis] = 1 if i in rows else weight.shape[i]
        return self._pass(
            eqn,
            (weight, tokens),
            kernel.reshape(1, n_rows, -1, 1),
            jnp.broadcast_to(jnp.max(tokens.mantissa), (n_rows,)),
            sizes,
        )

    def _pass(
        self,
        eqn: JaxprEqn,
        args: Sequence[Value],
        kernel: Array,
        reads: Array,
        sizes: Sequence[int],
    ) -> Flow:
        """What starts behind a kernel, of these sizes along the axes of its output features."""
        use = len(self.kernels)
        self.kernels.append(kernel)
        self.reads.append(reads.ravel())
        none = jnp.zeros(kernel.shape[0] * kernel.shape[2], jnp.float32)
        array = (self.starts[use] if self.starts else none).reshape(sizes)
        if self.mixed and self.mixed[use]:
            # The masks are zero here, so what passes does so by weights that nobody prunes.
            (passing,) = super().apply(eqn, *args)
            array = array + passing.mantissa  # type: ignore[union-attr]
        return self.flow(Spread(array, shape_of(eqn.outvars[0])), jnp.int32(0))

    def _unrolled(self, eqn: JaxprEqn, args: Sequence[Value]) -> list[Value]:
        """A scan, step by step, so that each use of a kernel in it is one of its own."""
        n_consts, n_carry = scan_arity(eqn.params)
        consts, carry = args[:n_consts], args[n_consts : n_consts + n_carry]
        xs, length = args[n_consts + n_carry :], eqn.params["length"]
        token = object()
        steps = reversed(range(length)) if eqn.params["reverse"] else range(length)
        ys: list[Sequence[Value]] = [()] * length
        for t in steps:
            slices = [_slice(x, t, token) for x in xs]
            results = self.evaluate(eqn.params["jaxpr"], *consts, *carry, *slices)
            # What a step hands on unchanged is still the same unit.
            pairs = zip(carry, results[:n_carry], strict=True)
            carry = [after if after is before else _carried(after) for before, after in pairs]
            ys[t] = results[n_carry:]
        shapes = [shape_of(var) for var in eqn.outvars[n_carry:]]
        outputs = [self._stacked([y[i] for y in ys], shape) for i, shape in enumerate(shapes)]
        return [*carry, *outputs]

    def _stacked(self, steps: Sequence[Value], shape: Shape) -> Value:
        if not any(isinstance(step, Flow) for step in steps):
            return Free(shape)
        none = jnp.zeros((1,) * (len(shape) - 1), jnp.float32)
        arrays = [step.mantissa if isinstance(step, Flow) else none for step in steps]
        common = jnp.broadcast_shapes(*(array.shape for array in arrays))
        array = jnp.stack([jnp.broadcast_to(array, common) for array in arrays])
        return self.flow(Spread(array, shape), jnp.int32(0))


def _rows(eqn: JaxprEqn, table: Value) -> list[int]:
    """The axes along which a gather picks positions."""
    sizes = enumerate(eqn.params["slice_sizes"])
    picked = {i for i, size in sizes if size < table.shape[i]}
    return sorted(picked | set(eqn.params["dimension_numbers"].collapsed_slice_dims))


def _is_look_up(eqn: JaxprEqn, operand: Value, indices: Value) -> bool:
    """Whether single rows of a kernel are picked by what depends on the input."""
    return (
        isinstance(operand, Weight)
        and isinstance(indices, Flow)
        and all(eqn.params["slice_sizes"][i] == 1 for i in _rows(eqn, operand))
        and not eqn.params["dimension_numbers"].operand_batching_dims
    )


def _arriving(flow: Flow, axes: Sequence[int]) -> Array:
    """What arrives along some axes in their order, summed over the others."""
    array = flow.spread.full(*axes).array if axes else flow.mantissa
    others = tuple(i for i in range(array.ndim) if i not in axes)
    kept = sorted(axes)
    return jnp.sum(array, others).transpose([kept.index(axis) for axis in axes])


def _carried(value: Value) -> Value:
    """A value as the next step of a loop takes it: of kernels only the shape, a unit of its own."""
    if isinstance(value, Flow):
        return v.replace(value, unit=object(), ancestors=frozenset(), views=frozenset())
    return Free(value.shape) if isinstance(value, Weight) else value


def _slice(x: Value, t: int, token: object) -> Value:
    """What one step of a scan sees of a value that is scanned over."""
    if isinstance(x, Flow):
        mantissa = x.mantissa[0 if x.spread.uniform(0) else t]
        unit = ("step", token, x.unit)
        nothing: frozenset[Any] = frozenset()
        return v.replace(
            x, mantissa=mantissa, shape=x.shape[1:], unit=unit, ancestors=nothing, views=nothing
        )
    if isinstance(x, Weight):
        return Weight(x.array[t], tuple((leaf, axes[1:]) for leaf, axes in x.sources))
    known, shape = x.known, x.shape[1:]
    if known is None:
        return Free(shape)
    part = Known(lambda: jnp.broadcast_to(known.value, x.shape)[t], shape, known.traced)
    return Free(shape, part)
