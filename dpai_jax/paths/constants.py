"""Constant folding: values that are computed from constants alone are kept.

Path semantics need index tables, loop counters and literal numbers (a gather needs its indices).
They are followed through the trace, but computed only when a rule asks for them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from dpai_jax.paths.values import Independent, Known, Value
from dpai_jax.tools.jaxprs import shape_of

_LOOPS = frozenset(("scan", "while", "cond"))
_BROADCAST = "broadcast_in_dim"
_ENTRYWISE = """
    add and convert_element_type copy div eq exp ge gt integer_pow le log lt max min mul ne neg
    not or pow rsqrt select_n sqrt square stop_gradient sub
    """.split()


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
        return _bind(eqn, operands, eqn.params)

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
        return _bind(eqn, operands, params)[0]

    if any(item.traced for item in known):
        return Independent(shape, Known.of(compute()))
    return Independent(shape, Known(compute, single, traced=False))


def _bind(eqn: JaxprEqn, operands: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    results = eqn.primitive.bind(*operands, **params)
    return results if eqn.primitive.multiple_results else [results]
