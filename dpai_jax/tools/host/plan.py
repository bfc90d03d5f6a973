"""A trace as a list of NumPy's calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from dpai_jax.tools.host.floats import as_xla
from dpai_jax.tools.jaxprs import open_jaxpr

# A NumPy array or scalar, and a function of some that returns one, or a list of several.
Value = Any
Run = Callable[..., Any]

# The abstract values of an equation's operands and of its results, and its parameters.
Avals = Sequence[Any]
Params = Mapping[str, Any]
Rule = Callable[[Avals, Avals, Params], Run]

RULES: dict[str, Rule] = {}

DTYPES = frozenset(map(np.dtype, (bool, np.int32, np.uint32, np.float32)))

# Equations that stand for those of another jaxpr, and the parameter that holds it.
CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}

# Equations that return what they take.
_SAME = {"stop_gradient", "copy", "copy_p", "optimization_barrier"}


class UnknownError(Exception):
    """What is traced can't be run here."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives of these names."""

    def register(make: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, make))
        return make

    return register


class Plan:
    """A jaxpr as a list of NumPy's calls.

    Args:
      closed: the jaxpr and its constants.

    Attributes:
      written: the abstract values that a call writes.
      rounds: whether it may add up floats in another order than XLA, and so round otherwise.

    Raises:
      UnknownError: if it contains what can't be run here.
    """

    def __init__(self, closed: core.ClosedJaxpr):
        self.written: list[Any] = []
        self.rounds = False
        self._slots: list[Value] = []
        self._constant: set[int] = set()
        self._flags: dict[int, int] = {}  # of flags made integers, where the flags are
        self._calls: list[tuple[Run, tuple[int, ...], int | tuple[int, ...]]] = []
        invars = open_jaxpr(closed)[0].invars
        for var in invars:
            _check(var.aval)
        args = [self._new() for _ in invars]
        with as_xla():
            self._results = self._inlined(closed, args)
        self._done = self._last_uses()

    def __call__(self, *args: Value) -> list[Value]:
        """The results, of arrays and scalars of NumPy; the caller has to be within `as_xla`."""
        slots = self._slots.copy()
        slots[: len(args)] = args
        for (run, ins, out), done in zip(self._calls, self._done, strict=True):
            found = run(*[slots[i] for i in ins])
            if isinstance(out, int):
                slots[out] = found
            else:
                for i, x in zip(out, found, strict=True):
                    slots[i] = x
            for i in done:
                slots[i] = None
        return [slots[i] for i in self._results]

    def _new(self, value: Value = None) -> int:
        self._slots.append(value)
        return len(self._slots) - 1

    def _known(self, value: Value) -> int:
        place = self._new(value)
        self._constant.add(place)
        return place

    def _inlined(self, closed: Any, args: Sequence[int]) -> list[int]:
        """Appends the calls of a jaxpr; the places of its results."""
        jaxpr, consts = open_jaxpr(closed)
        places: dict[Any, int] = dict(zip(jaxpr.invars, args, strict=True))

        def known(value: Any, aval: Any) -> int:
            _check(aval)
            return self._known(np.asarray(value, aval.dtype)[()])

        def read(atom: Any) -> int:
            return known(atom.val, atom.aval) if isinstance(atom, core.Literal) else places[atom]

        for var, value in zip(jaxpr.constvars, consts, strict=True):
            places[var] = known(value, var.aval)
        for eqn in jaxpr.eqns:
            ins, name = tuple(map(read, eqn.invars)), eqn.primitive.name
            if name in CALLS:
                outs = self._inlined(eqn.params[CALLS[name]], ins)
            elif name in _SAME:
                outs = list(ins)
            else:
                outs = self._called(eqn, ins)
            places.update(zip(eqn.outvars, outs, strict=True))
        return list(map(read, jaxpr.outvars))

    def _called(self, eqn: Any, ins: tuple[int, ...]) -> list[int]:
        """Appends the call of an equation, or makes it now if all it reads is known."""
        name = eqn.primitive.name
        for var in eqn.outvars:
            _check(var.aval)
        if name not in RULES:
            raise UnknownError(name)
        run = RULES[name]([v.aval for v in eqn.invars], [v.aval for v in eqn.outvars], eqn.params)
        if self._constant.issuperset(ins):
            found = run(*[self._slots[i] for i in ins])
            return list(map(self._known, found if eqn.primitive.multiple_results else [found]))
        if name in ("reduce", "reduce_sum"):  # flags are counted faster than integers are added
            ins = tuple(self._flags.get(i, i) for i in ins)
        outs = [self._new() for _ in eqn.outvars]
        if name == "convert_element_type" and eqn.invars[0].aval.dtype == bool:
            self._flags[outs[0]] = ins[0]
        self._calls.append((run, ins, tuple(outs) if eqn.primitive.multiple_results else outs[0]))
        self.written += [var.aval for var in eqn.outvars]
        self.rounds |= getattr(run, "rounds", False)
        for plan, times in getattr(run, "plans", ()):
            self.written += plan.written * times
        return outs

    def _last_uses(self) -> list[list[int]]:
        """For each call the places that no later one reads; drops calls that none reads."""
        read, calls, done = {*self._results}, [], []
        for call in reversed(self._calls):
            _, ins, out = call
            outs = (out,) if isinstance(out, int) else out
            if read.isdisjoint(outs):
                continue
            last = {*ins, *outs} - read - self._constant
            read |= last
            calls.append(call)
            done.append(list(last))
        self._calls = calls[::-1]
        return done[::-1]


def noted(run: Any, *plans: tuple[Plan, int], rounds: bool = False) -> Run:
    """A rule's function with what a plan has to know of it.

    Args:
      run: the function.
      *plans: other plans that it runs, each about so many times.
      rounds: whether it adds up floats in an order of its own.

    Returns:
      The function.
    """
    run.plans, run.rounds = plans, rounds or any(plan.rounds for plan, _ in plans)
    found: Run = run
    return found


def _check(aval: Any) -> None:
    if getattr(aval, "dtype", None) not in DTYPES:
        raise UnknownError(str(aval))
