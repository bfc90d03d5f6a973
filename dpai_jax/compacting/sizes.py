"""How large a network is: its weights, its bytes, and its multiply-adds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from dpai_jax.paths.rewriting import CALLS, called_jaxpr
from dpai_jax.tools.jaxprs import open_jaxpr, shape_of

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a network.

    Attributes:
      weights: the entries of all its parameters.
      bytes: the bytes of all its parameters.
      multiply_adds: those of its contractions and convolutions, for the whole batch.
    """

    weights: int
    bytes: int
    multiply_adds: int


def size_of(fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, x: PyTree) -> Size:
    """The size of a network, for an input like `x`."""
    leaves = jax.tree.leaves(params)
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return Size(
        sum(leaf.size for leaf in leaves), n_bytes, multiply_adds(jax.make_jaxpr(fn)(params, x))
    )


def multiply_adds(jaxpr: Any) -> int:
    """The multiply-adds of a jaxpr's contractions and convolutions.

    The body of a scan counts once for each step, that of another loop once, and of branches the
    largest counts.
    """
    total = 0
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = shape_of(eqn.invars[0])
            total += _entries(eqn) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = shape_of(eqn.invars[1])
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += _entries(eqn) * math.prod(kernel) // max(outputs, 1)
        elif name == "scan":
            total += params["length"] * multiply_adds(params["jaxpr"])
        elif name == "while":
            total += multiply_adds(params["body_jaxpr"])
        elif name == "cond":
            total += max(map(multiply_adds, params["branches"]))
        elif name in CALLS:
            total += multiply_adds(called_jaxpr(eqn))
    return total


def _entries(eqn: Any) -> int:
    return math.prod(shape_of(eqn.outvars[0]))
