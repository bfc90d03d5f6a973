"""Tells whether two jaxprs are the same program, so that equal networks share compiled code."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from dpai_jax.paths.rewriting import CALLS, called_jaxpr
from dpai_jax.tools.jaxprs import open_jaxpr
from dpai_jax.tools.signatures import signature


class ComparableJaxpr:
    """A jaxpr that is equal to others with the same equations.

    For a call only the called program matters, not its custom derivatives. An equation whose
    parameters cannot be hashed is equal only to itself.
    """

    def __init__(self, jaxpr: Any):
        self.jaxpr, self._signature = jaxpr, _of_jaxpr(jaxpr)
        self._hash = hash(self._signature)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ComparableJaxpr) and self._signature == other._signature

    def __hash__(self) -> int:
        return self._hash


def _of_jaxpr(jaxpr: Any) -> Hashable:
    opened, consts = open_jaxpr(jaxpr)
    number: dict[Any, int] = {}

    def name(variable: Any) -> tuple[int, Any]:
        return number.setdefault(variable, len(number)), variable.aval

    def atom(x: Any) -> Hashable:
        return ("literal", x.aval, _of_value(x.val)) if isinstance(x, Literal) else number[x]

    arguments = tuple(name(v) for v in (*opened.constvars, *opened.invars))
    equations: list[Hashable] = []
    for eqn in opened.eqns:
        operands = tuple(atom(x) for x in eqn.invars)
        written = tuple(name(v) for v in eqn.outvars)
        equations.append((eqn.primitive, operands, _of_params(eqn), written))
    results = tuple(atom(x) for x in opened.outvars)
    return arguments, tuple(map(_of_value, consts)), tuple(equations), results


def _of_params(eqn: JaxprEqn) -> Hashable:
    kind = eqn.primitive.name
    if kind in CALLS and kind != "shard_map":
        return _of_jaxpr(called_jaxpr(eqn))
    return tuple((key, _of_value(value)) for key, value in sorted(eqn.params.items()))


def kind_of(eqn: JaxprEqn) -> Hashable:
    """What an equation does, whatever it reads: equal for equations that do the same."""
    operands: tuple[Any, ...] = tuple(
        ("literal", x.aval, _of_value(x.val)) if isinstance(x, Literal) else x.aval
        for x in eqn.invars
    )
    return eqn.primitive, operands, _of_params(eqn), tuple(v.aval for v in eqn.outvars)


def _of_value(value: Any) -> Hashable:
    """A hashable stand-in for a parameter, a constant or a literal."""
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return _of_jaxpr(value)
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_of_value, value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        is_array = not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
        if not is_array or not getattr(value, "is_fully_addressable", True):
            return signature(value)
        array = np.asarray(value)
        return array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()
    return signature(value)
