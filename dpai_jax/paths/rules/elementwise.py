"""Elementwise functions: activations, sums, products, casts.

Any composition of elementwise functions of one unit is an activation function, which a path passes
once. So no list of activations is needed. Combining a unit with something derived from it without a
kernel (its mean, its softmax denominator) is normalisation: the unit's paths pass, the statistic
adds none. Sums of different units add paths. Products of different units give the terms of the
network's Jacobian, `alive(b)·a + alive(a)·b`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from dpai_jax.paths import values as v
from dpai_jax.paths.constants import evaluated, unknown
from dpai_jax.paths.interpreter import Interpreter, rules_for
from dpai_jax.paths.values import Flow, Independent, Known, Spread, Value, Weight, WeightSum
from dpai_jax.tools.jaxprs import dtype_of, is_real, shape_of

_PRODUCTS = "div mul mulhi pow"
_SUMS = ("add", "add_any", "complex", "sub")
_SAME = """
    copy copy_p device_put name optimization_barrier pvary reduce_precision reshard
    sharding_constraint stop_gradient
    """
_COMPARISONS = "eq eq_to ge gt is_finite le le_to lt lt_to ne"
_FUNCTIONS = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
    bessel_i1e cbrt ceil clamp clz complex conj cos cosh digamma erf erf_inv erfc exp
    exp2 expm1 floor igamma igammac imag integer_pow lgamma log log1p log2 logistic max
    min neg nextafter not one_minus_square or polygamma polynomial population_count
    real regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh
    xor zeta
    """


@rules_for(_SAME, carries_gains=True)
def _identity(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
    return args


@rules_for("convert_element_type", carries_gains=True)
def _convert(interpreter: Interpreter, eqn: JaxprEqn, x: Value) -> Value:
    # An integer made from a real number (an argmax, a code) has no path. A token id has one.
    return unknown(eqn)[0] if is_real(eqn.invars[0]) and not is_real(eqn.outvars[0]) else x


@rules_for(_COMPARISONS)
def _compare(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Value:
    # Comparing token ids makes a one-hot code. Any other comparison is a switch.
    if is_real(eqn.invars[0]):
        return Independent(shape_of(eqn.outvars[0]), at_zero=_at_zero(eqn, args))
    return _elementwise(interpreter, eqn, *args)


@rules_for(_FUNCTIONS, carries_gains=True)
def _function(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Value:
    return _elementwise(interpreter, eqn, *args)


def _elementwise(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Value:
    """An elementwise function; the paths of different units add up."""
    cases = args[1:] if eqn.primitive.name == "select_n" and _any_flow(args[1:]) else args
    return _combine(interpreter, eqn, cases, _at_zero(eqn, args), add)


@rules_for(_PRODUCTS, carries_gains=True)
def _product(interpreter: Interpreter, eqn: JaxprEqn, *args: Value) -> Value:
    """An elementwise product; a quotient is a product with a reciprocal."""
    if eqn.primitive.name == "mul" and any(
        isinstance(a, Independent) and a.scalar == 0 for a in args
    ):
        shape = shape_of(eqn.outvars[0])
        return Independent(shape, Known.of(np.zeros((1,) * len(shape), dtype_of(eqn.outvars[0]))))
    at_zero = _at_zero(eqn, args)
    divides = eqn.primitive.name == "div"
    return _combine(interpreter, eqn, args, at_zero, functools.partial(multiply, divides=divides))


def _any_flow(args: Sequence[Value]) -> bool:
    return any(isinstance(arg, Flow) for arg in args)


def _combine(
    interpreter: Interpreter, eqn: JaxprEqn, args: Sequence[Value], at_zero: float, join: Any
) -> Value:
    shape = shape_of(eqn.outvars[0])
    flows = [_reshaped(arg, shape) for arg in args if isinstance(arg, Flow)]
    if not flows:
        return _combine_weights(eqn, args)
    result = functools.reduce(functools.partial(join, interpreter), flows)
    return v.replace(result, at_zero=at_zero)


def _combine_weights(eqn: JaxprEqn, args: Sequence[Value]) -> Value:
    """A function of kernels: one kernel stays the same, a sum of kernels is a `WeightSum`."""
    weights = [arg for arg in args if isinstance(arg, Weight | WeightSum)]
    # A kernel combined with functions of itself is one term.
    terms = {id(term.array): term for weight in weights for term in weight.terms}
    first, *others = terms.values()
    if any(weight.shape != shape_of(eqn.outvars[0]) for weight in weights):
        return unknown(eqn)[0]
    if others and eqn.primitive.name in _SUMS:
        return WeightSum(tuple(terms.values()))
    if any(term.sources != first.sources for term in others):
        return unknown(eqn)[0]
    if eqn.primitive.name == "mul":
        # A constant that is zero in places (an autoregressive mask) removes weights.
        for arg in args:
            if isinstance(arg, Independent) and (present := nonzero(arg)) is not None:
                return v.replace(first, array=first.array * present)
    return first


def nonzero(value: Independent) -> np.ndarray | None:
    """One where a known constant is not zero, else zero; None if it is unknown or has no zero."""
    if value.known is None or value.known.traced:
        return None
    present = np.asarray(value.known.value) != 0
    return None if present.all() else present.astype(np.float32)


def _reshaped(flow: Flow, shape: v.Shape) -> Flow:
    """A flow reshaped to the rank of an operation's result, with new axes in front."""
    if flow.shape == shape:
        return flow
    new_axes = (1,) * (len(shape) - len(flow.shape))
    return v.replace(
        flow, mantissa=flow.mantissa.reshape(new_axes + flow.mantissa.shape), shape=shape
    )


def related(a: Flow, b: Flow) -> Flow | None:
    """The flow whose paths pass if one is a statistic of the other, or both are one unit."""
    if a.unit == b.unit or _normalises(b, a):
        return a
    return b if _normalises(a, b) else None


def _normalises(statistic: Flow, x: Flow) -> bool:
    """Whether `statistic` was derived from `x`, or from a flow that `x` is a rearrangement of."""
    # Two rearrangements of one unit (as in all pairwise differences) are not statistics.
    wholes = x.views & (statistic.ancestors - statistic.views)
    return x.unit in statistic.ancestors or bool(wholes)


def add(interpreter: Interpreter, a: Flow, b: Flow) -> Flow:
    """The sum of two flows of one shape."""
    base = related(a, b)
    if base is not None:
        return base
    (x, y), exponent = v.align([a, b])
    # All sums of the same two units are one unit: max(a, b) + log1p(exp(-|a - b|)) passes once.
    unit = interpreter.unit("sum", frozenset({a.unit, b.unit}))
    below = None if a.below is None or b.below is None else a.below + b.below
    return interpreter.flow(
        Spread(interpreter.counting.joined(x + y), a.shape, below),
        exponent,
        unit=unit,
        ancestors=a.lineage & b.lineage,
        filled=a.filled | b.filled,
    )


def multiply(interpreter: Interpreter, a: Flow, b: Flow, *, divides: bool = False) -> Flow:
    """The product of two flows of one shape, or their quotient."""
    base = related(a, b)
    if base is not None:
        return base
    terms = product_terms(interpreter, a, v.replace(b, at_zero=math.inf) if divides else b)
    (x, y), exponent = v.align(terms)
    alive = interpreter.counting.alive
    alive_a, alive_b = alive(a), jnp.ones(()) if divides else alive(b)
    spread = Spread(alive_b * x + alive_a * y, a.shape)
    return interpreter.flow(spread, exponent, ancestors=a.lineage & b.lineage)


def product_terms(interpreter: Interpreter, a: Flow, b: Flow) -> tuple[Flow, Flow]:
    """The two factors of a product, changed as `gates` asks.

    If only one factor is alive everywhere, it is a *gate*, which modulates the other, the signal.
    """
    if (
        a.always_alive == b.always_alive
        or interpreter.gates == "jacobian"
        or not interpreter.counting.gated
    ):
        return a, b
    if a.always_alive:
        signal, gate = product_terms(interpreter, b, a)
        return gate, signal
    if interpreter.gates == "signal":
        return a, v.replace(b, mantissa=jnp.zeros_like(b.mantissa), filled=np.False_)
    peaks = [jnp.max(lax.stop_gradient(flow.mantissa), initial=0.0) for flow in (a, b)]
    ratio = jnp.where(peaks[1] > 0, peaks[0] / jnp.where(peaks[1] > 0, peaks[1], 1.0), 1.0)
    mantissa = interpreter.counting.scaled(b.mantissa, ratio)
    return a, v.replace(b, mantissa=mantissa, exponent=a.exponent, below=None)


def joined_at_zero(numbers: Sequence[float]) -> float:
    """The value at zero of a unit that is any one of several: zero unless each is alive."""
    if all(number == numbers[0] for number in numbers):
        return numbers[0]
    return math.inf if all(numbers) else 0.0


def _at_zero(eqn: JaxprEqn, args: Sequence[Value]) -> float:
    """The value of the function where every flow is zero."""
    flows = [arg.at_zero for arg in args if isinstance(arg, Flow)]
    if not flows:
        return 0.0
    if eqn.primitive.name == "select_n":
        return _selected_at_zero(args[0], args[1:])
    numbers = [
        arg.at_zero if isinstance(arg, Flow) else getattr(arg, "scalar", None) for arg in args
    ]
    name = eqn.primitive.name
    if (name in ("mul", "div") and numbers[0] == 0) or (name == "mul" and numbers[1] == 0):
        return 0.0
    if None in numbers:
        # An unknown constant (a bias, a scale, a statistic) changes nothing at zero, unless it is
        # divided by the unit, which has a pole there.
        return math.inf if name == "div" and numbers[0] is None else joined_at_zero(flows)
    if any(math.isinf(number) for number in flows):
        return math.inf
    return _evaluate(eqn, numbers)


def _selected_at_zero(which: Value, cases: Sequence[Value]) -> float:
    """The value of a choice between cases where every flow is zero."""
    if (
        isinstance(which, Independent)
        and which.at_zero is not None
        and math.isfinite(which.at_zero)
    ):
        return at_zero_of(cases[int(which.at_zero)])
    flows = [case.at_zero for case in cases if isinstance(case, Flow)]
    return joined_at_zero(flows) if flows else 0.0


def at_zero_of(value: Value) -> float:
    """The value where no path reaches it; of one independent of the input, the value itself."""
    if isinstance(value, Flow):
        return value.at_zero
    number = value.scalar if isinstance(value, Independent) else None
    return math.inf if number is None or not math.isfinite(number) else number


def _evaluate(eqn: JaxprEqn, operands: Sequence[Any]) -> float:
    pairs = zip(operands, eqn.invars, strict=True)
    scalars = [np.asarray(x, dtype_of(var)) for x, var in pairs]
    with jax.ensure_compile_time_eval():
        (result, *_) = evaluated(eqn, scalars)
    value = float(np.asarray(result).real)
    return value if math.isfinite(value) else math.inf
