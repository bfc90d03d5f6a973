"""Equations with inner jaxprs: calls are inlined, loops run their body on each step's masks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn, Literal, jaxpr_as_fun

from dpai_jax.paths import values as v
from dpai_jax.paths.constants import constant, unknown
from dpai_jax.paths.interpreter import Interpreter, rules_for
from dpai_jax.paths.rewriting import CALLS, called_jaxpr
from dpai_jax.paths.rules.elementwise import add, joined_at_zero
from dpai_jax.paths.values import Flow, Independent, Shape, Spread, Value, Weight, WeightSum
from dpai_jax.tools.jaxprs import open_jaxpr, scan_arity, shape_of


@rules_for(" ".join(CALLS), inlined=True)
def _call(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    return interpreter.evaluate(called_jaxpr(eqn), *args)


@rules_for("cond", inlined=True)
def _cond(interpreter: Interpreter, eqn: JaxprEqn, index: Value, *args: Value) -> Sequence[Value]:
    """The branch that is taken, or the sum over all branches if it is unknown."""
    branches = eqn.params["branches"]
    if eqn.params.get("branches_platforms") is not None:
        # The branches are one computation, written once for each platform.
        return interpreter.evaluate(branches[-1], *args)
    if isinstance(index, Independent) and index.scalar is not None:
        taken = min(max(int(index.scalar), 0), len(branches) - 1)
        return interpreter.evaluate(branches[taken], *args)
    outcomes = [interpreter.evaluate(branch, *args) for branch in branches]
    return [_either(interpreter, *cases) for cases in zip(*outcomes, strict=True)]


def _either(interpreter: Interpreter, *cases: Value) -> Value:
    flows = [case for case in cases if isinstance(case, Flow)]
    if flows:
        total = functools.reduce(functools.partial(add, interpreter), flows)
        return v.replace(total, at_zero=joined_at_zero([flow.at_zero for flow in flows]))
    if all(case is cases[0] for case in cases):
        return cases[0]
    return Independent(cases[0].shape)


# Loops carry only counts. Constants that were concatenated with a flow are not followed in loops.
def _without_constants(args: Sequence[Value]) -> list[Value]:
    return [v.replace(arg, constants=None) if isinstance(arg, Flow) else arg for arg in args]


@rules_for("scan", carries_constants=True)
def _scan(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    n_consts, n_carry = scan_arity(eqn.params)
    plain = _without_constants(args)
    consts, start, xs = plain[:n_consts], plain[n_consts:][:n_carry], plain[n_consts + n_carry :]
    shapes = [shape_of(var) for var in eqn.outvars[n_carry:]]
    body, length, reverse = (eqn.params[name] for name in ("jaxpr", "length", "reverse"))
    return _Loop(interpreter, body, consts, start, xs, shapes).run(length, reverse)


@rules_for("while", carries_constants=True)
def _while(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    """Runs the body once per step, or until a step adds no path if the number is unknown."""
    if not any(isinstance(arg, Flow) for arg in args):
        return unknown(eqn)
    params, plain = eqn.params, _without_constants(args)
    n_test, n_body = params["cond_nconsts"], params["body_nconsts"]
    tested, consts, start = plain[:n_test], plain[n_test:][:n_body], plain[n_test + n_body :]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    steps = _number_of_steps(test, body, tested, consts, start)
    if steps is not None:
        return _Loop(interpreter, body, consts, start, [], []).run(steps)
    # At an unknown step, numbers that the body changes are unknown.
    fixed = _handed_on(body, n_body, len(start))
    carry: list[Value] = [
        Independent(value.shape) if isinstance(value, Independent) and not same else value
        for value, same in zip(start, fixed, strict=True)
    ]
    # With n carried values, a path reaches all that it can reach within n steps.
    for _ in range(len(carry) + 1):
        after = interpreter.evaluate(body, *consts, *carry)
        if all(_is_same(a, b) for a, b in zip(carry, after, strict=True)):
            return after
        carry = after
    raise NotImplementedError(
        "no path semantics for a while loop whose every step adds paths and whose number of steps "
        f"is not computed from constants, used at {interpreter.source_line()}; loop with "
        "jax.lax.scan or with constant bounds"
    )


def _is_same(a: Value, b: Value) -> bool:
    """Whether two values stand for the same paths."""
    if isinstance(a, Flow) and isinstance(b, Flow):
        return a.unit == b.unit and a.always_alive == b.always_alive
    if isinstance(a, Independent) and isinstance(b, Independent):
        return True
    return a is b


def _number_of_steps(
    test: Any, body: Any, tested: Sequence[Value], consts: Sequence[Value], start: Sequence[Value]
) -> int | None:
    """How often a while loop runs its body, if that depends on constants alone."""
    counters = _read_by(test, {0})
    needed = {i for i in counters if i < len(tested)}
    carried = {i - len(tested) for i in counters if i >= len(tested)}
    while True:
        read = _read_by(body, carried)
        before, carried = carried, carried | {i - len(consts) for i in read if i >= len(consts)}
        if carried == before:
            break
    sources = [*(tested[i] for i in needed), *(start[i] for i in carried)]
    sources += [consts[i] for i in read if i < len(consts)]
    if any(not isinstance(x, Independent) or x.known is None or x.known.traced for x in sources):
        return None

    def number(value: Value) -> Any:
        if isinstance(value, Independent) and value.known is not None and not value.known.traced:
            return jnp.broadcast_to(value.known.value, value.shape)
        return None

    def filled(values: Sequence[Any], jaxpr: Any, first: int) -> list[Any]:
        """The values, with zeros for those that the number of steps does not depend on."""
        avals = jaxpr.in_avals[first : first + len(values)]
        pairs = zip(values, avals, strict=True)
        return [jnp.zeros(a.shape, a.dtype) if x is None else x for x, a in pairs]

    with jax.ensure_compile_time_eval():
        fixed_test = filled([number(x) for x in tested], test, 0)
        fixed_body = filled([number(x) for x in consts], body, 0)
        values = [number(x) if i in carried else None for i, x in enumerate(start)]
        values = filled(values, body, len(consts))

        def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
            steps, carry = state
            after = jaxpr_as_fun(body)(*fixed_body, *carry)
            return steps + 1, [y if i in carried else carry[i] for i, y in enumerate(after)]

        def goes_on(state: tuple[Any, list[Any]]) -> Any:
            return jaxpr_as_fun(test)(*fixed_test, *state[1])[0]

        steps, _ = jax.jit(lambda state: lax.while_loop(goes_on, step, state))((0, values))
        return int(steps)


def _read_by(jaxpr: Any, results: set[int]) -> set[int]:
    """The indices of a jaxpr's arguments that some of its results depend on."""
    opened, _ = open_jaxpr(jaxpr)
    needed = {opened.outvars[i] for i in results if not isinstance(opened.outvars[i], Literal)}
    for eqn in reversed(opened.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(var for var in eqn.invars if not isinstance(var, Literal))
    return {i for i, var in enumerate(opened.invars) if var in needed}


def _handed_on(body: Any, n_consts: int, n_carry: int) -> list[bool]:
    """Which carried values the body of a loop passes on unchanged."""
    opened, _ = open_jaxpr(body)
    carried = opened.invars[n_consts : n_consts + n_carry]
    return [a is b for a, b in zip(carried, opened.outvars[:n_carry], strict=True)]


class _Loop:
    """A loop with a known number of steps in path semantics.

    The form of a carried value may change from step to step: the zeros that an LSTM starts from
    become a flow, a uniform count becomes uneven. So the body is first evaluated abstractly, until
    what goes in and what comes out have the same form.

    Args:
      interpreter: evaluates the body.
      body: a jaxpr from constants, a carry and one step of the inputs to a carry and outputs.
      consts, start, xs: the constants, the first carry, and the inputs of all steps, stacked.
      shapes: the shapes of the stacked outputs.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        body: Any,
        consts: Sequence[Value],
        start: Sequence[Value],
        xs: Sequence[Value],
        shapes: Sequence[Shape],
    ):
        self.interpreter = interpreter
        self.body = body
        self.consts, self.start, self.xs, self.shapes = consts, start, xs, shapes
        self.token = object()
        # A carry that the body passes on unchanged is a constant of the loop.
        self.fixed = _handed_on(body, len(consts), len(start))

    def run(self, length: int, reverse: bool = False) -> list[Value]:
        """The last carry, and the outputs of all steps."""
        forms = self._stable_forms()
        ys: list[Value] = []

        def body(carry: list[Any], steps: list[Any]) -> tuple[list[Any], list[Any]]:
            after, ys[:] = self._step(_filled(forms, carry), steps)
            conformed = [_conform(*pair) for pair in zip(after, forms, strict=True)]
            # Normalized, as counts that are only added up would overflow after many steps.
            return _arrays(map(self._settled, conformed)), _arrays(ys)

        start = _arrays(map(self._settled, map(_conform, self.start, forms)))
        carry, stacked = lax.scan(body, start, self._scanned(), length, reverse)
        outputs = [self._stacked(*y) for y in zip(ys, stacked, self.shapes, strict=True)]
        return [*self._with_fixed(_filled(forms, carry)), *outputs]

    def _step(
        self, carry: Sequence[Value], steps: Sequence[Any]
    ) -> tuple[list[Value], list[Value]]:
        """Evaluates the body on a carry and one step of the inputs; returns carry and outputs."""
        xs = [_slice(x, step, self.token) for x, step in zip(self.xs, steps, strict=True)]
        results = self.interpreter.evaluate(self.body, *self.consts, *self._with_fixed(carry), *xs)
        # Only counts and counters leave the loop. Of everything else only the shape does.
        results = [
            Independent(result.shape) if isinstance(result, Weight | WeightSum) else result
            for result in results
        ]
        return results[: len(carry)], results[len(carry) :]

    def _with_fixed(self, carry: Sequence[Value]) -> list[Value]:
        items = zip(self.fixed, self.start, carry, strict=True)
        return [start if fixed else value for fixed, start, value in items]

    def _scanned(self) -> list[Any]:
        """The arrays that the loop slices at each step."""
        return [None if isinstance(x, Flow) and x.spread.uniform(0) else _array(x) for x in self.xs]

    def _stable_forms(self) -> list[Value]:
        """Carried values whose forms the body keeps."""
        forms = [
            Independent(start.shape)
            if fixed or isinstance(start, Weight | WeightSum)
            else self._one_unit(start, i)
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
        """The forms of the carry after one step of the body. Their arrays are placeholders."""
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
            unit = (self.token, carry)
            return v.replace(value, unit=unit, ancestors=frozenset(), views=frozenset(), below=1.0)
        return Independent(value.shape) if isinstance(value, Weight | WeightSum) else value

    def _merged(self, before: Value, after: Value, carry: int) -> Value:
        """A form that covers both values."""
        if isinstance(before, Independent) and isinstance(after, Independent):
            return before if before.known and after.known else Independent(before.shape)
        a, b = v.as_flow(before), v.as_flow(after)
        shape = jnp.broadcast_shapes(a.mantissa.shape, b.mantissa.shape)
        at_zero = joined_at_zero([a.at_zero, b.at_zero])
        mantissa = jnp.zeros(shape, jnp.float32)
        unit = (self.token, carry)
        return Flow(mantissa, jnp.int32(0), before.shape, unit, at_zero=at_zero, below=1.0)

    def _settled(self, value: Value) -> Value:
        if not isinstance(value, Flow):
            return value
        settled = self.interpreter.flow(value.spread, value.exponent)
        return v.replace(settled, unit=value.unit, at_zero=value.at_zero)

    def _stacked(self, y: Value, arrays: Any, shape: Shape) -> Value:
        """The stacked results of all steps as one value; each step has its own exponent."""
        if not isinstance(y, Flow):
            return Independent(shape)
        mantissa, exponents, filled = arrays
        largest = v.largest_exponent(exponents, filled)
        scale = v.power_of_two(exponents - largest).reshape((-1,) + (1,) * (mantissa.ndim - 1))
        return self.interpreter.flow(Spread(mantissa * scale, shape), largest, at_zero=y.at_zero)


def _slice(x: Value, step: Any, token: object) -> Value:
    """What one step sees of a value that is scanned over."""
    if isinstance(x, Independent):
        return Independent(x.shape[1:]) if x.known is None else constant(step)
    if isinstance(x, Weight):
        sources = tuple((leaf, axes[1:]) for leaf, axes in x.sources)
        return v.replace(x, array=step, sources=sources)
    if isinstance(x, WeightSum):
        terms = zip(x.terms, step, strict=True)
        return WeightSum(tuple(cast(Weight, _slice(*term, token)) for term in terms))
    mantissa = jnp.squeeze(x.mantissa, 0) if x.spread.uniform(0) else step
    return Flow(
        mantissa,
        x.exponent,
        x.shape[1:],
        ("step", token, x.unit),
        at_zero=x.at_zero,
        filled=x.filled,
        below=x.below,
    )


def _form(value: Value) -> Any:
    """The form of a value, which must stay the same from step to step."""
    if isinstance(value, Flow):
        return value.mantissa.shape, value.at_zero
    return isinstance(value, Independent) and value.known is not None


def _conform(value: Value, form: Value) -> Value:
    """A value in the form that the next step expects."""
    if isinstance(form, Flow):
        flow = v.as_flow(value)
        return v.replace(flow, mantissa=jnp.broadcast_to(flow.mantissa, form.mantissa.shape))
    return value if _form(form) else Independent(value.shape)


def _arrays(values: Iterable[Value]) -> list[Any]:
    """The arrays that a loop carries: counts with their exponents, and known numbers."""
    return [_counts(x) if isinstance(x, Flow) else _array(x) for x in values]


def _counts(flow: Flow) -> tuple[Array, Array, Array]:
    return flow.mantissa, flow.exponent, jnp.asarray(flow.filled)


def _array(value: Value) -> Any:
    if isinstance(value, Flow):
        return value.mantissa
    if isinstance(value, Weight):
        return value.array
    if isinstance(value, WeightSum):
        return [term.array for term in value.terms]
    return None if value.known is None else jnp.broadcast_to(value.known.value, value.shape)


def _filled(forms: Sequence[Value], arrays: Sequence[Any]) -> list[Value]:
    """Values of the given forms that hold the given arrays."""
    return [_holding(form, array) for form, array in zip(forms, arrays, strict=True)]


def _holding(form: Value, array: Any) -> Value:
    if isinstance(form, Flow):
        mantissa, exponent, filled = array
        return v.replace(form, mantissa=mantissa, exponent=exponent, filled=filled)
    return Independent(form.shape) if array is None else constant(array)
