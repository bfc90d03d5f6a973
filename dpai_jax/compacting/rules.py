"""What cutting does to each primitive: what is known of its results, wants, and computes.

Primitives are grouped by what they mean, and a rule is a class with three functions. `facts` gives
what is known of the results, from what is known of the operands. `wants` gives which entries of
the operands the wanted entries of the results are computed from. `evaluate` computes the results'
blocks from cut operands. What has no rule is computed whole, from whole operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpai_jax.compacting import program as p
from dpai_jax.compacting.cuts import Cut, narrow
from dpai_jax.compacting.facts import Fact, Flags, Kept, Shape, any_of, block, flags, within
from dpai_jax.compacting.program import Step
from dpai_jax.tools.jaxprs import bind, shape_of

_RULES: dict[str, type[Rule]] = {}


class Rule:
    """The rule of what has none: whole results from whole operands."""

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """What is known of the results."""
        live = any(bool(x.live.any()) for x in operands)
        activation = any(x.activation for x in operands)
        shapes = [shape_of(var) for var in step.eqn.outvars]
        return [Fact(s, flags(s, live), flags(s, True), activation) for s in shapes]

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """The entries of the operands that the wanted entries of the results are made from."""
        return [flags(x.shape, True) for x in operands]

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """The results' blocks at the indices to keep."""
        whole = [x.at((None,) * len(x.shape)) for x in operands]
        results = bind(step.eqn, *whole)
        return [
            None if k is None else narrow(y, (None,) * y.ndim, k, y.shape)
            for y, k in zip(results, kept, strict=True)
        ]


def rule_of(step: Step) -> type[Rule]:
    """The rule of an operation."""
    return _RULES.get(step.kind, Rule)


def rule_for(names: str) -> Callable[[type[Rule]], type[Rule]]:
    """Registers a rule for the primitives of these names."""

    def register(rule: type[Rule]) -> type[Rule]:
        _RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


@rule_for(" ".join((*p.POINTWISE, "pointwise_call")))
class Pointwise(Rule):
    """Functions of each entry by itself."""

    _PRODUCTS = ("mul", "and")
    _KEEP_ZERO = frozenset(
        """
        abs add add_any and asin asinh atan atanh cbrt ceil conj convert_element_type copy copy_p
        div erf erf_inv expm1 floor imag log1p max min mul neg or pvary real reduce_precision
        round select_n sign sin sinh sqrt square stop_gradient sub tan tanh
        """.split()
    )

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """See `Rule`."""
        shape = shape_of(step.eqn.outvars[0])
        live = functools.reduce(np.logical_or, [x.live for x in operands], flags(shape, False))
        cases = operands[1:] if step.kind == "select_n" else operands
        filled = functools.reduce(np.logical_or, [x.filled for x in cases], flags(shape, False))
        if step.kind in Pointwise._PRODUCTS:
            a, b = operands
            live = (a.live & b.filled) | (a.filled & b.live)
            filled = (a.filled & b.filled) | flags(shape, False)
        elif step.kind == "div":
            a, b = operands
            live = a.live | (a.filled & b.live) | flags(shape, False)
            filled = a.filled | flags(shape, False)
        elif not _keeps_zero(step):
            filled = flags(shape, True)
        live = live & filled | flags(shape, False)
        activation = any(x.activation for x in operands)
        return [Fact(shape, live, filled, activation)] * len(step.results)

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """See `Rule`."""
        whole = functools.reduce(np.logical_or, wanted)
        each = [whole] * len(operands)
        if step.kind in Pointwise._PRODUCTS:
            pairs = (operands, operands[::-1])
            each = [whole & matters(results[0], a, b) for a, b in pairs]
        shape = results[0].shape
        return [_unbroadcast(w, x.shape, shape) for w, x in zip(each, operands, strict=True)]

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """See `Rule`."""
        target = next(k for k in kept if k is not None)
        shape = shape_of(step.eqn.outvars[0])
        targets = [_for_operand(target, x.shape, shape) for x in operands]
        at = [x.at(t) for x, t in zip(operands, targets, strict=True)]
        if step.kind == "pointwise_call":
            return p.pointwise_call(step.eqn, at, jnp.shape(at[0]))
        if step.kind == "div" and operands[1].shape:
            # Where the divisor is not wanted it is zero, and so is what it divides.
            x = operands[1]
            missing = x.fact.live & ~block(x.own, x.shape)
            if missing.any():
                at[1] = jnp.where(within(missing, targets[1]), jnp.ones((), x.dtype), at[1])
        return bind(step.eqn, *at)


def _unbroadcast(wanted: Flags, shape: Shape, result: Shape) -> Flags:
    """Flags of the result for an operand, which may have size one or no axes at all."""
    if not shape:
        return np.asarray(wanted.any())
    once = tuple(i for i, (n, m) in enumerate(zip(shape, result, strict=True)) if n < m)
    return any_of(wanted, once, keepdims=True)


def _for_operand(target: Kept, shape: Shape, result: Shape) -> Kept:
    return tuple(k if n == m else None for k, n, m in zip(target, shape, result, strict=False))


def matters(result: Fact, a: Fact, b: Fact) -> Flags:
    """Where the factor `a` of a product with `b`, entry by entry, has to be there.

    What can change has to be where the other factor may be other than zero. What is frozen has to
    be only where the other can change: else the product is a frozen number.
    """
    if not result.activation:
        return b.filled
    where: Flags = np.where(a.live, b.filled, b.live)
    return where


def _keeps_zero(step: Step) -> bool:
    if step.kind == "integer_pow":
        return bool(step.params["y"] > 0)
    if step.kind == "pointwise_call":
        return p.keeps_zero(step.eqn)
    return step.kind in Pointwise._KEEP_ZERO
