"""The few lines that differ between JAX releases (0.10 to 0.12)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import source_info_util


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr's equations and its constants; open and closed jaxprs are one type from 0.11 on."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


# Primitives that call a jaxpr of their own, by name.
CALLS = """
    call checkpoint closed_call custom_jvp_call custom_lin custom_vjp_call jit remat2
    """.split()


def called_jaxpr(eqn: Any) -> Any:
    """The jaxpr that one of `CALLS` holds."""
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
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
    """Whether a variable holds real (or complex) numbers, rather than integers or truth values."""
    return bool(jnp.issubdtype(var.aval.dtype, jnp.inexact))


def source_line(eqn: Any) -> str:
    """The line of the user's program that an equation comes from."""
    return str(source_info_util.summarize(eqn.source_info))
