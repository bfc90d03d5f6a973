"""Jaxprs and their equations: the few lines that differ between JAX releases (0.10 to 0.12)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr's equations and its constants; open and closed jaxprs are one type from 0.11 on."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def printed(jaxpr: Any) -> str | None:
    """A text that only jaxprs that do the same have, in any process; None if there is none."""
    with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
        text = str(jaxpr)
    digests = [
        f"{x.dtype}{x.shape}{hashlib.sha256(x.tobytes()).hexdigest()}"
        for x in map(np.asarray, _constants(jaxpr))
    ]
    # A function within shows where it lies in memory.
    return None if " at 0x" in text else "\n".join((text, *digests))


def _constants(jaxpr: Any) -> Iterator[Any]:
    """The constants of a jaxpr and of those within it."""
    opened, consts = open_jaxpr(jaxpr)
    yield from consts
    for eqn in opened.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from _constants(value)


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """The number of a scan's operands that are constants, and that are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def shape_of(var: Any) -> tuple[int, ...]:
    """The shape of a variable of a jaxpr."""
    return tuple(getattr(var.aval, "shape", ()))


def dtype_of(var: Any) -> Any:
    """The dtype of a variable of a jaxpr."""
    return var.aval.dtype


def is_real(var: Any) -> bool:
    """Whether a variable holds real or complex numbers, not integers or booleans."""
    return bool(jnp.issubdtype(var.aval.dtype, jnp.inexact))


def bind(eqn: Any, *operands: Any) -> list[Any]:
    """The results of an equation; a call with a derivative of its own keeps it."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def source_line(eqn: Any) -> str:
    """The line of the user's program that an equation comes from."""
    return str(source_info_util.summarize(eqn.source_info))


def at_source(eqn: Any) -> AbstractContextManager[None]:
    """A context in which new equations get the source line of this one."""
    context: AbstractContextManager[None] = source_info_util.user_context(
        eqn.source_info.traceback, name_stack=eqn.source_info.name_stack
    )
    return context
