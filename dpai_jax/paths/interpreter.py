"""The interpreter: evaluates a jaxpr in path semantics, equation by equation.

A rule says what a primitive does to the number of paths. It is a function
`rule(interpreter, eqn, *values)` that takes one `Value` for each operand and returns one for each
result. Rules are looked up by the primitive's name; `register_rule` adds one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import JaxprEqn, Literal, Primitive

from dpai_jax.paths import values as v
from dpai_jax.paths.constants import constant, fold, unknown
from dpai_jax.paths.counting import EXACT, Counting
from dpai_jax.paths.kernels import KernelUse
from dpai_jax.paths.values import Flow, Independent, Shape, Spread, Value, Weight, WeightSum
from dpai_jax.tools.jaxprs import open_jaxpr, source_line
from dpai_jax.tools.powers import power_of_two

GATES = ("balanced", "jacobian", "signal")

Rule = Callable[..., Value | Sequence[Value]]
_RULES: dict[str, Rule] = {}
# Primitives with inner equations, which are evaluated even if no operand is a flow.
_INLINED: set[str] = set()
# Primitives whose rules pass on the constants beside a flow themselves (see `Flow.constants`).
_CARRIERS: set[str] = set()
# Primitives whose rules apply or pass on the gains and the power of a kernel (see `Weight`).
_GAINED: set[str] = set()


@dataclasses.dataclass
class Interpreter:
    """One evaluation of a network.

    Attributes:
      gates: how a factor that is alive everywhere takes part in a product (`dpai_jax.trace`).
      counting: how counts are kept, added up and contracted.
      at_kernel: computes the counts behind a kernel from its use. Wrap `KernelUse.count` to record
        uses, or to change or shard the counts.
      start: the number of paths that start at each entry of the network's input, one or none.
    """

    gates: str
    counting: Counting = EXACT
    at_kernel: Callable[[KernelUse], Spread] = KernelUse.count
    start: Array | float = 1.0
    _units: dict[Any, object] = dataclasses.field(default_factory=dict)
    _callers: list[JaxprEqn] = dataclasses.field(default_factory=list)

    def unit(self, *origin: Hashable) -> object:
        """The unit of this origin: the same operation on the same units gives the same unit."""
        return self._units.setdefault(origin, object())

    def flow(
        self,
        spread: Spread,
        exponent: Array,
        *,
        unit: Any = None,
        ancestors: frozenset[Any] = frozenset(),
        at_zero: float = 0.0,
        filled: Any = None,
    ) -> Flow:
        """A flow of these counts, in normal form; a new unit unless one is given.

        Args:
          spread: the counts.
          exponent: int32 scalar, the power of two that they are multiples of.
          unit: its unit, if the result is one of the operands (an activation).
          ancestors: the units that it is a statistic or a view of.
          at_zero: its value where no path reaches it (see `Flow.at_zero`).
          filled: whether any count is not zero, if known. With a small known bound it saves the
            pass that finds the largest count.

        Returns:
          The flow.
        """
        unit = object() if unit is None else unit
        spread, exponent, filled = self.counting.normalize(spread, exponent, filled)
        return Flow(
            spread.array,
            exponent,
            spread.shape,
            unit,
            ancestors,
            at_zero,
            filled,
            below=spread.below,
        )

    def source(self, shape: Shape) -> Flow:
        """A flow that starts here, with `start` paths to every unit."""
        return self.flow(Spread(v.ones(shape).array * self.start, shape), jnp.int32(0))

    def input(self, aval: Any) -> Value:
        """What an input stands for: one path to each of its entries, none to a random key."""
        if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            return Independent(aval.shape)
        return self.source(aval.shape)

    def settled(self, value: Value) -> Value:
        """A value as it passes from one segment of a program to another, in normal form."""
        if not isinstance(value, Flow):
            return value
        if value.constants is not None:
            constants = cast(Flow, self.settled(value.constants))
            value = v.replace(value, constants=constants)
        if value.below == 1.0:
            return value
        flow = self.flow(Spread(value.mantissa, value.shape), value.exponent)
        names = ("mantissa", "exponent", "filled", "below")
        return v.replace(value, **{name: getattr(flow, name) for name in names})

    def origins(self) -> Iterable[tuple[object, Hashable]]:
        """The units that have an origin, each with it, in the order in which they were made."""
        return ((unit, origin) for origin, unit in self._units.items())

    def evaluate(self, jaxpr: Any, *args: Value) -> list[Value]:
        """The values of a jaxpr's results, from the values of its arguments."""
        opened, consts = open_jaxpr(jaxpr)
        environment: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                return constant(atom.val)
            return environment[atom]

        environment.update(zip(opened.constvars, map(constant, consts), strict=True))
        environment.update(zip(opened.invars, args, strict=True))
        for eqn in opened.eqns:
            self._callers.append(eqn)
            results = self.apply(eqn, *map(read, eqn.invars))
            self._callers.pop()
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in opened.outvars]

    def source_line(self) -> str:
        """The line of the user's program that is being evaluated."""
        # A function that a library compiled may have no line of the user's program; its caller has.
        lines = (source_line(eqn) for eqn in reversed(self._callers))
        return next((line for line in lines if line), "an unknown line")

    def apply(self, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
        """The results of one equation."""
        if not eqn.outvars:  # printing, checking
            return []
        name = eqn.primitive.name
        if all(isinstance(arg, Independent) for arg in args) and name not in _INLINED:
            return fold(eqn, *args)
        rule = _RULES.get(name)
        if rule is None:
            if any(isinstance(arg, Flow) for arg in args):
                raise NotImplementedError(
                    f"no path semantics for the primitive {name!r}, used at "
                    f"{self.source_line()}; give it one with dpai_jax.paths.register_rule"
                )
            return unknown(eqn)
        if name not in _GAINED:
            args = tuple(map(self.baked, args))
        kernels = [i for i, arg in enumerate(args) if isinstance(arg, Weight | WeightSum)]
        # A call or a loop may use its kernels several times, so its inner equations are split.
        if len(kernels) == 1 and isinstance(args[kernels[0]], WeightSum) and name not in _CARRIERS:
            return self._by_terms(eqn, args, kernels[0])
        results = _listed(rule(self, eqn, *args))
        if name in _CARRIERS or not any(getattr(arg, "constants", None) for arg in args):
            return results
        return self._beside(rule, eqn, args, results)

    def baked(self, value: Value) -> Value:
        """The same value; kernels are multiplied by their gains and powers of two."""
        if isinstance(value, WeightSum):
            return WeightSum(tuple(cast(Weight, self.baked(term)) for term in value.terms))
        if not isinstance(value, Weight) or (not value.gains and value.exponent is None):
            return value
        array = functools.reduce(self.counting.product, value.gains, value.array)
        if value.exponent is None:
            return v.replace(value, array=array, gains=())
        array = self.counting.scaled(array, power_of_two(value.exponent))
        return v.replace(value, array=array, below=None, gains=(), exponent=None)

    def _by_terms(self, eqn: JaxprEqn, args: Sequence[Value], i: int) -> Sequence[Value]:
        """The results of an equation with a sum of kernels as an operand, term by term."""
        terms = cast(WeightSum, args[i]).terms
        cases = [self.apply(eqn, *args[:i], term, *args[i + 1 :]) for term in terms]
        return [self._sum(case) for case in zip(*cases, strict=True)]

    def _sum(self, terms: Sequence[Value]) -> Value:
        if all(isinstance(term, Weight) for term in terms):
            return WeightSum(tuple(cast(Sequence[Weight], terms)))
        flows = [term for term in terms if isinstance(term, Flow)]
        if not flows or all(flow.unit == flows[0].unit for flow in flows):
            return terms[0]
        arrays, exponent = v.align(flows)
        array = functools.reduce(jnp.add, arrays)
        return self.flow(Spread(array, flows[0].shape), exponent, at_zero=flows[0].at_zero)

    def _beside(
        self, rule: Rule, eqn: JaxprEqn, args: Sequence[Value], results: Sequence[Value]
    ) -> list[Value]:
        """The results, with the rule also applied to the constants beside the operands."""
        beside = dataclasses.replace(self, at_kernel=KernelUse.count)
        constants = _listed(rule(beside, eqn, *map(_only_constants, args)))
        return [
            v.replace(
                result,
                constants=None if result.always_alive or not isinstance(c, Flow) else c,
            )
            if isinstance(result, Flow)
            else result
            for result, c in zip(results, constants, strict=True)
        ]


def _listed(results: Value | Sequence[Value]) -> Sequence[Value]:
    return [results] if isinstance(results, Value) else results


def _only_constants(value: Value) -> Value:
    """A value without paths from the input: of a flow only the paths from constants are left."""
    if not isinstance(value, Flow):
        return value
    none = jnp.zeros((1,) * len(value.shape), jnp.float32)
    return value.constants or v.replace(value, mantissa=none, filled=np.False_, constants=None)


def derived(
    interpreter: Interpreter, eqn: JaxprEqn, x: Flow, spread: Spread, at_zero: float, which: int = 0
) -> Flow:
    """The result of an operation without a kernel on one flow: a view or a statistic of it."""
    unit = derived_unit(interpreter, eqn, x, which)
    return interpreter.flow(spread, x.exponent, unit=unit, ancestors=x.lineage, at_zero=at_zero)


def derived_unit(interpreter: Interpreter, eqn: JaxprEqn, x: Flow, which: int = 0) -> object:
    """The unit of an operation's result; `which` tells several results apart."""
    try:
        return interpreter.unit(eqn.primitive, which, tuple(sorted(eqn.params.items())), x.unit)
    except TypeError:
        # The operation's parameters cannot be hashed.
        return object()


def register_rule(primitive: Primitive) -> Callable[[Rule], Rule]:
    """Gives a primitive its path semantics; a decorator.

    The rule is called as `rule(interpreter, eqn, *values)`, where at least one value is a `Flow` or
    a `Weight`. It returns one value for each of the equation's results; a single result need not
    be wrapped in a list. A rule registered later replaces the one before, for networks traced from
    then on.

    What a rule owes to the flows that it makes: an activation returns its operand (the same
    `unit`); anything else calls `interpreter.flow`, with `ancestors=x.lineage` if no kernel was
    passed, so that x minus its mean is known as normalisation, and with `at_zero` set to what the
    operation gives where all its operands give zero.

    Example:
      >>> from jax.extend.core import Primitive
      >>> from dpai_jax.paths import register_rule
      >>> swish_p = Primitive("my_swish")
      >>> @register_rule(swish_p)
      ... def swish(interpreter, eqn, x):  # an activation function: paths pass
      ...     return x

    Args:
      primitive: the primitive, for example of a Pallas kernel's wrapper.

    Returns:
      A decorator that returns the rule unchanged.

    Raises:
      TypeError: if `primitive` is not a JAX primitive.
    """
    if not isinstance(primitive, Primitive):
        raise TypeError(f"primitive must be a jax.extend.core.Primitive, got {primitive!r}")
    return rules_for(primitive.name)


def rules_for(
    names: str,
    *,
    inlined: bool = False,
    carries_constants: bool = False,
    carries_gains: bool = False,
) -> Callable[[Rule], Rule]:
    """Registers one rule for the primitives of these names, separated by spaces.

    Args:
      names: the primitives' names.
      inlined: whether the primitive has inner equations, which are evaluated even if no operand is
        a flow.
      carries_constants: whether the rule passes on `Flow.constants` itself.
      carries_gains: whether the rule applies or passes on what a `Weight` is multiplied by;
        otherwise it gets kernels that are multiplied already.

    Returns:
      A decorator that returns the rule unchanged.
    """

    def register(rule: Rule) -> Rule:
        for name in names.split():
            _RULES[name] = rule
            (_INLINED.add if inlined else _INLINED.discard)(name)
            (_CARRIERS.add if inlined or carries_constants else _CARRIERS.discard)(name)
            (_GAINED.add if inlined or carries_gains else _GAINED.discard)(name)
        return rule

    return register


def rules_in_force() -> tuple[Rule, ...]:
    """All current rules. A network that was traced under other rules is out of date."""
    return tuple(_RULES.values())
