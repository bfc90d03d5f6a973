"""Equations that hold a jaxpr: calls are inlined, scans run their body on each step's masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import JaxprEqn

from dpai_jax.paths import values as v
from dpai_jax.paths._jax import CALLS, called_jaxpr, open_jaxpr, scan_arity, shape_of
from dpai_jax.paths.constants import constant
from dpai_jax.paths.interpreter import Interpreter, rules_for
from dpai_jax.paths.rules.elementwise import add, joined_rest
from dpai_jax.paths.values import Flow, Free, Shape, Spread, Value, Weight


@rules_for(" ".join(CALLS), inlined=True)
def _call(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    return interpreter.evaluate(called_jaxpr(eqn), *args)


@rules_for("cond", inlined=True)
def _cond(interpreter: Interpreter, eqn: JaxprEqn, index: Value, *args: Value) -> Sequence[Value]:
    """The branch that is taken, or the sum over all of them where that is not known."""
    branches = eqn.params["branches"]
    if eqn.params.get("branches_platforms") is not None:
        # One computation, written once for each platform.
        return interpreter.evaluate(branches[-1], *args)
    if isinstance(index, Free) and index.scalar is not None:
        taken = min(max(int(index.scalar), 0), len(branches) - 1)
        return interpreter.evaluate(branches[taken], *args)
    outcomes = [interpreter.evaluate(branch, *args) for branch in branches]
    return [_either(interpreter, *cases) for cases in zip(*outcomes, strict=True)]


def _either(interpreter: Interpreter, *cases: Value) -> Value:
    flows = [case for case in cases if isinstance(case, Flow)]
    if flows:
        total = functools.reduce(functools.partial(add, interpreter), flows)
        return v.replace(total, rest=joined_rest([flow.rest for flow in flows]))
    if all(case is cases[0] for case in cases):
        return cases[0]
    return Free(cases[0].shape)


@rules_for("scan", carries_constants=True)
def _scan(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    # Loops carry counts alone: a constant put beside a flow before the loop is not followed in it.
    plain = [v.replace(arg, constants=None) if isinstance(arg, Flow) else arg for arg in args]
    return _Scan(interpreter, eqn, plain).run()


class _Scan:
    """One scan in path semantics.

    What a step carries to the next may change its kind on the way: the zeros an LSTM starts from
    become a flow, an even count becomes uneven. So the body is first evaluated abstractly until
    what goes in and what comes out have one form.
    """

    def __init__(self, interpreter: Interpreter, eqn: JaxprEqn, args: Sequence[Value]):
        self.interpreter = interpreter
        self.eqn = eqn
        self.token = object()
        n_consts, n_carry = scan_arity(eqn.params)
        self.consts = args[:n_consts]
        self.start = args[n_consts : n_consts + n_carry]
        self.xs = args[n_consts + n_carry :]
        opened, _ = open_jaxpr(eqn.params["jaxpr"])
        carried = opened.invars[n_consts : n_consts + n_carry]
        # A carry that the body hands on unchanged is a constant of the loop.
        self.fixed = [a is b for a, b in zip(carried, opened.outvars[:n_carry], strict=True)]

    def run(self) -> Sequence[Value]:
        forms = self._stable_forms()
        ys: list[Value] = []

        def body(carry: list[Any], steps: list[Any]) -> tuple[list[Any], list[Any]]:
            after, ys[:] = self._step(_filled(forms, carry), steps)
            conformed = [_conform(*pair) for pair in zip(after, forms, strict=True)]
            # Sums alone would let counts grow out of float32 over many steps.
            return _arrays(map(self._settled, conformed)), _arrays(ys)

        params = self.eqn.params
        carry, stacked = lax.scan(
            body,
            _arrays(map(_conform, self.start, forms)),
            self._scanned(),
            params["length"],
            params["reverse"],
            params["unroll"],
        )
        shapes = [shape_of(var) for var in self.eqn.outvars[len(self.start) :]]
        outputs = [self._stacked(*y) for y in zip(ys, stacked, shapes, strict=True)]
        return [*self._with_fixed(_filled(forms, carry)), *outputs]

    def _step(
        self, carry: Sequence[Value], steps: Sequence[Any]
    ) -> tuple[list[Value], list[Value]]:
        """What the body makes of a carry and of one step of the inputs: carry and outputs."""
        xs = [_slice(x, step, self.token) for x, step in zip(self.xs, steps, strict=True)]
        jaxpr = self.eqn.params["jaxpr"]
        results = self.interpreter.evaluate(jaxpr, *self.consts, *self._with_fixed(carry), *xs)
        # Only counts and counters leave the loop: of all else the shape is enough.
        results = [
            Free(result.shape) if isinstance(result, Weight) else result for result in results
        ]
        return results[: len(carry)], results[len(carry) :]

    def _with_fixed(self, carry: Sequence[Value]) -> list[Value]:
        items = zip(self.fixed, self.start, carry, strict=True)
        return [start if fixed else value for fixed, start, value in items]

    def _scanned(self) -> list[Any]:
        """The arrays of which each step sees a slice."""
        return [None if isinstance(x, Flow) and x.spread.uniform(0) else _array(x) for x in self.xs]

    def _stable_forms(self) -> list[Value]:
        """Carries of forms that the body keeps."""
        forms = [
            Free(start.shape) if fixed or isinstance(start, Weight) else self._one_unit(start, i)
            for i, (fixed, start) in enumerate(zip(self.fixed, self.start, strict=True))
        ]
        while True:
            after = self._abstract_step(forms)
            merged = [
                form if fixed else self._merged(form, value, i)
                for i, (fixed, form, value) in enumerate(zip(self.fixed, forms, after, strict=True))
            ]
            if all(_form(a) == _form(b) for a, b in zip(forms, merged, strict=True)):
                return forms
            forms = merged

    def _abstract_step(self, forms: Sequence[Value]) -> list[Value]:
        """What the body makes of a carry, of which only the forms can be used."""
        after: list[Value] = []

        def body(arrays: list[Any], steps: list[Any]) -> None:
            after[:] = self._step(_filled(forms, arrays), steps)[0]

        scanned = self._scanned()
        steps = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), scanned)
        jax.eval_shape(body, _arrays(map(_conform, self.start, forms)), steps)
        return after

    def _one_unit(self, value: Value, carry: int) -> Value:
        """A value as the loop carries it: the same unit at every step."""
        if isinstance(value, Flow):
            return v.replace(
                value, unit=(self.token, carry), ancestors=frozenset(), views=frozenset()
            )
        return value

    def _merged(self, before: Value, after: Value, carry: int) -> Value:
        """The form of which both values are special cases."""
        if isinstance(before, Free) and isinstance(after, Free):
            return before if before.known and after.known else Free(before.shape)
        a, b = _as_flow(before), _as_flow(after)
        shape = jnp.broadcast_shapes(a.mantissa.shape, b.mantissa.shape)
        rest = joined_rest([a.rest, b.rest])
        mantissa = jnp.zeros(shape, jnp.float32)
        return Flow(mantissa, jnp.int32(0), before.shape, (self.token, carry), rest=rest)

    def _settled(self, value: Value) -> Value:
        if not isinstance(value, Flow):
            return value
        settled = self.interpreter.flow(value.spread, value.exponent)
        return v.replace(settled, unit=value.unit, rest=value.rest)

    def _stacked(self, y: Value, arrays: Any, shape: Shape) -> Value:
        """One value of the results of all steps, each of which has an exponent of its own."""
        if not isinstance(y, Flow):
            return Free(shape)
        mantissa, exponents, filled = arrays
        largest = v.largest_exponent(exponents, filled)
        scale = v.power_of_two(exponents - largest).reshape((-1,) + (1,) * (mantissa.ndim - 1))
        return self.interpreter.flow(Spread(mantissa * scale, shape), largest, rest=y.rest)


def _slice(x: Value, step: Any, token: object) -> Value:
    """What one step sees of a value that is scanned over."""
    if isinstance(x, Free):
        return Free(x.shape[1:]) if x.known is None else constant(step)
    if isinstance(x, Weight):
        return Weight(step, tuple((leaf, axes[1:]) for leaf, axes in x.sources))
    mantissa = jnp.squeeze(x.mantissa, 0) if x.spread.uniform(0) else step
    return Flow(
        mantissa, x.exponent, x.shape[1:], ("step", token, x.unit), rest=x.rest, filled=x.filled
    )


def _as_flow(value: Value) -> Flow:
    """A value as a flow: no path where it is free, and dead where it is known to be zero."""
    if isinstance(value, Flow):
        return value
    rest = 0.0 if isinstance(value, Free) and value.scalar == 0 else math.inf
    zeros = jnp.zeros((1,) * len(value.shape), jnp.float32)
    return Flow(zeros, jnp.int32(0), value.shape, None, rest=rest, filled=np.False_)


def _form(value: Value) -> Any:
    """What has to stay the same from step to step."""
    if isinstance(value, Flow):
        return value.mantissa.shape, value.rest
    return isinstance(value, Free) and value.known is not None


def _conform(value: Value, form: Value) -> Value:
    """A value in the form in which the next step takes it."""
    if isinstance(form, Flow):
        flow = _as_flow(value)
        return v.replace(flow, mantissa=jnp.broadcast_to(flow.mantissa, form.mantissa.shape))
    return value if _form(form) else Free(value.shape)


def _arrays(values: Iterable[Value]) -> list[Any]:
    """What a loop carries of values: counts with their exponents, and known numbers."""
    return [_counts(x) if isinstance(x, Flow) else _array(x) for x in values]


def _counts(flow: Flow) -> tuple[Array, Array, Array]:
    return flow.mantissa, flow.exponent, jnp.asarray(flow.filled)


def _array(value: Value) -> Any:
    if isinstance(value, Flow):
        return value.mantissa
    if isinstance(value, Weight):
        return value.array
    return None if value.known is None else jnp.broadcast_to(value.known.value, value.shape)


def _filled(forms: Sequence[Value], arrays: Sequence[Any]) -> list[Value]:
    """Values of the given forms that hold the given arrays."""
    return [_holding(form, array) for form, array in zip(forms, arrays, strict=True)]


def _holding(form: Value, array: Any) -> Value:
    if isinstance(form, Flow):
        mantissa, exponent, filled = array
        return v.replace(form, mantissa=mantissa, exponent=exponent, filled=filled)
    return Free(form.shape) if array is None else constant(array)
