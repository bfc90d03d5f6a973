"""Jaxprs and their equations: the few lines that differ between JAX releases (0.10 to 0.12)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax.numpy as jnp
from jax.extend import source_info_util


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr's equations and its constants; open and closed jaxprs are one type from 0.11 on."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


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
