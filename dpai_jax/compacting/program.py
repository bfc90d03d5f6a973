"""A jaxpr as a flat list of steps: calls are written out, and every value has a number."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal, jaxpr_as_fun

from dpai_jax.paths.rewriting import CALLS, called_jaxpr
from dpai_jax.tools.jaxprs import bind, dtype_of, open_jaxpr, shape_of

# Calls whose derivative is the user's own. They stay calls, so that it is kept.
_OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call", "custom_lin")

# Functions of JAX's own with a derivative that is only a faster form of the usual one.
_USUAL_DERIVATIVE = ("_softmax", "softmax", "logsumexp")

POINTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p logistic
    lt max min mul ne neg nextafter not or polygamma population_count pow pvary real
    reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan
    tanh xor zeta
    """.split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One operation: the primitive with its parameters, and the numbers of its values."""

    eqn: JaxprEqn
    kind: str
    operands: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's parameters."""
        return self.eqn.params


@dataclasses.dataclass
class Program:
    """A function without calls.

    Attributes:
      steps: its operations, in order.
      shapes, dtypes: of each value, by its number.
      constants: the values that are known, by number.
      inputs, outputs: the numbers of the arguments and of the results.
    """

    steps: list[Step] = dataclasses.field(default_factory=list)
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    dtypes: list[Any] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    inputs: list[int] = dataclasses.field(default_factory=list)
    outputs: list[int] = dataclasses.field(default_factory=list)

    def new(self, var: Any) -> int:
        """The number of a new value like a variable of a jaxpr."""
        self.shapes.append(shape_of(var))
        self.dtypes.append(dtype_of(var))
        return len(self.shapes) - 1


def flat(jaxpr: Any) -> Program:
    """The program of a closed jaxpr."""
    program = Program()
    program.inputs = [program.new(var) for var in open_jaxpr(jaxpr)[0].invars]
    program.outputs = _inline(program, jaxpr, program.inputs)
    return program


def _inline(program: Program, jaxpr: Any, arguments: Sequence[int]) -> list[int]:
    opened, consts = open_jaxpr(jaxpr)
    numbers: dict[Any, int] = dict(zip(opened.invars, arguments, strict=True))
    for var, value in zip(opened.constvars, consts, strict=True):
        numbers[var] = program.new(var)
        program.constants[numbers[var]] = value

    def read(atom: Any) -> int:
        if not isinstance(atom, Literal):
            return numbers[atom]
        number = program.new(atom)
        program.constants[number] = np.asarray(atom.val, dtype_of(atom))
        return number

    for eqn in opened.eqns:
        operands = [read(atom) for atom in eqn.invars]
        kind = _kind(eqn)
        if kind == "inlined":
            body = _simpler(eqn) if _has_simpler(eqn) else called_jaxpr(eqn)
            results = _inline(program, body, operands)
        else:
            results = [program.new(var) for var in eqn.outvars]
            program.steps.append(Step(eqn, kind, tuple(operands), tuple(results)))
        numbers.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in opened.outvars]


def _kind(eqn: JaxprEqn) -> str:
    name = eqn.primitive.name
    if name in _OWN_DERIVATIVE:
        body = called_jaxpr(eqn)
        if getattr(open_jaxpr(body)[0].debug_info, "func_name", "") in _USUAL_DERIVATIVE:
            return "inlined"
        floats = all(jnp.issubdtype(dtype_of(v), jnp.floating) for v in (*eqn.invars, *eqn.outvars))
        if name == "custom_jvp_call" and floats and _is_pointwise(body, eqn):
            return "pointwise_call"
        return name
    return "inlined" if name in CALLS or _has_simpler(eqn) else name


def _has_simpler(eqn: JaxprEqn) -> bool:
    name = eqn.primitive.name
    return name in _SIMPLER and (name != "reshape" or eqn.params["dimensions"] is not None)


def _simpler(eqn: JaxprEqn) -> Any:
    """An operation as a jaxpr of simpler ones."""
    avals = [jax.ShapeDtypeStruct(shape_of(var), dtype_of(var)) for var in eqn.invars]
    return jax.make_jaxpr(functools.partial(_SIMPLER[eqn.primitive.name], eqn.params))(*avals)


def _stack(params: dict[str, Any], *parts: Any) -> Any:
    axis = params["axis"]
    return lax.concatenate([lax.expand_dims(part, [axis]) for part in parts], axis)


def _unstack(params: dict[str, Any], x: Any) -> list[Any]:
    axis = params["axis"]
    return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]


def _tile(params: dict[str, Any], x: Any) -> Any:
    for axis, repeats in enumerate(params["reps"]):
        x = lax.concatenate([x] * repeats, axis)
    return x


def _permuted_reshape(params: dict[str, Any], x: Any) -> Any:
    return lax.reshape(lax.transpose(x, params["dimensions"]), params["new_sizes"])


_SIMPLER = {"stack": _stack, "unstack": _unstack, "tile": _tile, "reshape": _permuted_reshape}


def _is_pointwise(jaxpr: Any, call: JaxprEqn) -> bool:
    """Whether each entry of the results comes from the same entry of the arguments alone."""
    shape = shape_of(call.outvars[0])
    opened, consts = open_jaxpr(jaxpr)

    def fits(eqn: JaxprEqn) -> bool:
        if any(shape_of(var) not in ((), shape) for var in (*eqn.invars, *eqn.outvars)):
            return False
        if eqn.primitive.name in CALLS:
            return _is_pointwise(called_jaxpr(eqn), call)
        if eqn.primitive.name == "broadcast_in_dim":
            return shape_of(eqn.invars[0]) == ()
        return eqn.primitive.name in POINTWISE

    if any(jnp.ndim(const) for const in consts) or any(shape_of(v) != shape for v in call.outvars):
        return False
    return all(map(fits, opened.eqns))


def pointwise_call(eqn: JaxprEqn, operands: Sequence[Any], shape: tuple[int, ...]) -> list[Any]:
    """A call that acts on each entry, on arrays of another shape, with its own derivative."""
    body = called_jaxpr(eqn)
    tangents = [jax.ShapeDtypeStruct(shape_of(v), dtype_of(v)) for v in eqn.invars]
    derivative = jax.make_jaxpr(lambda p, t: jax.jvp(functools.partial(bind, eqn), p, t))(
        tangents, tangents
    )

    @jax.custom_jvp
    def call(*args: Any) -> list[Any]:
        return _at_shape(body, args, shape)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        run = _at_shape if _is_pointwise(derivative, eqn) else _padded
        results = run(derivative, (*primals, *tangents), shape)
        return results[: len(eqn.outvars)], results[len(eqn.outvars) :]

    return list(call(*operands))


def keeps_zero(eqn: JaxprEqn) -> bool:
    """Whether a call that acts on each entry makes zeros of zeros."""
    with jax.ensure_compile_time_eval():
        zeros = [np.zeros((), dtype_of(var)) for var in eqn.invars]
        return all(float(y) == 0 for y in _at_shape(called_jaxpr(eqn), zeros, ()))


def _padded(jaxpr: Any, args: Sequence[Any], shape: tuple[int, ...]) -> list[Any]:
    """The same from the jaxpr as it stands, on arrays that are filled up to the size it needs."""
    sizes = [v.aval.shape for v in open_jaxpr(jaxpr)[0].invars]
    short = math.prod(shape)
    filled = [
        a if a.shape == s else jnp.pad(a.ravel(), (0, math.prod(s) - short)).reshape(s)
        for a, s in zip(args, sizes, strict=True)
    ]
    return [y.ravel()[:short].reshape(shape) for y in jaxpr_as_fun(jaxpr)(*filled)]


def _at_shape(jaxpr: Any, args: Sequence[Any], shape: tuple[int, ...]) -> list[Any]:
    """The results of a pointwise jaxpr for arrays of this shape."""
    opened, consts = open_jaxpr(jaxpr)
    values = dict(zip((*opened.constvars, *opened.invars), (*consts, *args), strict=True))
    for eqn in opened.eqns:
        operands = [a.val if isinstance(a, Literal) else values[a] for a in eqn.invars]
        if eqn.primitive.name in CALLS:
            results = _at_shape(called_jaxpr(eqn), operands, shape)
        elif eqn.primitive.name == "broadcast_in_dim":
            results = [jnp.broadcast_to(operands[0], shape)]
        else:
            results = bind(eqn, *operands)
        values.update(zip(eqn.outvars, results, strict=True))
    return [a.val if isinstance(a, Literal) else values[a] for a in opened.outvars]
