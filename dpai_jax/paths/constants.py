"""Constant folding: values that are computed from constants alone are kept.

Path semantics need index tables, loop counters and literal numbers (a gather needs its indices).
They are followed through the trace, but computed only when a rule asks for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import JaxprEqn

from dpai_jax.paths.values import Independent, Known, Value
from dpai_jax.tools.jaxprs import dtype_of, shape_of

_LOOPS = frozenset(("scan", "while", "cond"))
_BROADCAST = "broadcast_in_dim"
_ENTRYWISE = """
    add and convert_element_type copy div eq exp ge gt integer_pow le log lt max min mul ne neg
    not or pow rsqrt select_n sqrt square stop_gradient sub
    """.split()


# Common functions of numbers. For each of JAX's that is run by itself XLA compiles a program.
_IN_NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "div": np.divide,
    "eq": np.equal,
    "exp": np.exp,
    "ge": np.greater_equal,
    "gt": np.greater,
    "integer_pow": lambda x, y: x**y,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tanh": np.tanh,
}
_NUMBERS = frozenset(map(np.dtype, (np.int32, np.float16, np.float32, np.float64)))


def constant(value: Any) -> Independent:
    """A constant of the program."""
    return Independent(np.shape(value), Known.of(value))


def unknown(eqn: JaxprEqn) -> list[Value]:
    """Independent results with unknown values."""
    return [Independent(shape_of(var)) for var in eqn.outvars]


def fold(eqn: JaxprEqn, *args: Value) -> list[Value]:
    """The results of an equation without flows or weights: constants if all operands are."""
    known = [arg.known for arg in args if isinstance(arg, Independent) and arg.known is not None]
    if len(known) < len(args) or eqn.primitive.name in _LOOPS:
        return unknown(eqn)
    single = bool(known) and all(item.shape == (1,) * len(item.shape) for item in known)
    if single and (eqn.primitive.name in {*_ENTRYWISE, _BROADCAST}):
        return [_folded_number(eqn, known)]

    @functools.cache
    def compute() -> Sequence[Any]:
        shapes = [arg.shape for arg in args]
        operands = [jnp.broadcast_to(k.value, s) for k, s in zip(known, shapes, strict=True)]
        return evaluated(eqn, operands)

    if any(item.traced for item in known):
        return [constant(result) for result in compute()]

    def result(i: int) -> Value:
        shape = shape_of(eqn.outvars[i])
        return Independent(shape, Known(lambda: compute()[i], shape, traced=False))

    return [result(i) for i in range(len(eqn.outvars))]


def _folded_number(eqn: JaxprEqn, known: Sequence[Known]) -> Independent:
    """A result whose entries are all the same number."""
    shape = shape_of(eqn.outvars[0])
    single = (1,) * len(shape)
    params = eqn.params
    if eqn.primitive.name == _BROADCAST:
        params = params | {"shape": single}

    def compute() -> Any:
        operands = [item.value for item in known]
        if eqn.primitive.name != _BROADCAST:
            operands = [jnp.broadcast_to(operand, single) for operand in operands]
        return evaluated(eqn, operands, params)[0]

    if any(item.traced for item in known):
        return Independent(shape, Known.of(compute()))
    return Independent(shape, Known(compute, single, traced=False))


def evaluated(
    eqn: JaxprEqn, operands: Sequence[Any], params: dict[str, Any] | None = None
) -> Sequence[Any]:
    """The results of an equation for operands that are known.

    Args:
      eqn: the equation.
      operands: arrays.
      params: its parameters, if others than its own.

    Returns:
      Arrays of JAX, or of NumPy.
    """
    params = eqn.params if params is None else params
    name = eqn.primitive.name
    dtypes = {dtype_of(x) for x in eqn.invars}
    # Integers are divided otherwise.
    is_plain = dtypes <= _NUMBERS and not (name == "div" and np.dtype(np.int32) in dtypes)
    if name not in _IN_NUMPY or not is_plain or any(isinstance(x, Tracer) for x in operands):
        results = eqn.primitive.bind(*operands, **params)
        return results if eqn.primitive.multiple_results else [results]
    numbers = [np.asarray(x) for x in operands]
    if name == "integer_pow":
        numbers.append(params["y"])
    with np.errstate(all="ignore"):
        return [np.asarray(_IN_NUMPY[name](*numbers), dtype_of(eqn.outvars[0]))]
