"""Programs with their scans written out, so that what happens in each step stands for itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from dpai_jax.paths._jax import CALLS, called_jaxpr, open_jaxpr, scan_arity


def unrolled(jaxpr: Any) -> Any:
    """The same program without scans."""
    if not _has_scan(jaxpr):
        return jaxpr
    return jax.make_jaxpr(lambda *args: _run(jaxpr, args))(*jaxpr.in_avals)


def _has_scan(jaxpr: Any) -> bool:
    eqns = open_jaxpr(jaxpr)[0].eqns
    if any(eqn.primitive.name == "scan" for eqn in eqns):
        return True
    return any(_has_scan(called_jaxpr(eqn)) for eqn in eqns if eqn.primitive.name in CALLS)


def _run(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    opened, consts = open_jaxpr(jaxpr)
    values = dict(zip((*opened.constvars, *opened.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in opened.eqns:
        operands = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name == "scan":
            results = _steps(eqn, operands)
        elif name in CALLS:
            results = _run(called_jaxpr(eqn), operands)
        else:
            results = eqn.primitive.bind(*operands, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in opened.outvars]


def _steps(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    n_consts, n_carry = scan_arity(eqn.params)
    consts, carry = operands[:n_consts], list(operands[n_consts : n_consts + n_carry])
    xs, length = operands[n_consts + n_carry :], eqn.params["length"]
    outputs: list[list[Any]] = [[] for _ in eqn.outvars[n_carry:]]
    steps = range(length)
    for t in reversed(steps) if eqn.params["reverse"] else steps:
        results = _run(
            eqn.params["jaxpr"],
            [*consts, *carry, *(lax.index_in_dim(x, t, keepdims=False) for x in xs)],
        )
        carry = results[:n_carry]
        for output, y in zip(outputs, results[n_carry:], strict=True):
            output.append(y)
    if eqn.params["reverse"]:
        outputs = [output[::-1] for output in outputs]
    return [*carry, *(jnp.stack(output) for output in outputs)]
