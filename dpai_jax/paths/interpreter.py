"""The evaluator: a jaxpr, equation by equation, in path semantics.

A rule says what a primitive does to the number of paths. It is a function
`rule(interpreter, eqn, *values)` that takes one `Value` for each operand and returns one for each
result. Rules are looked up by primitive; `register_rule` adds one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import JaxprEqn, Literal, Primitive
from jax.sharding import NamedSharding

from dpai_jax.paths import values as v
from dpai_jax.paths._jax import find_primitives, open_jaxpr, source_line
from dpai_jax.paths.constants import constant, fold, unknown
from dpai_jax.paths.values import Flow, Free, Shape, Spread, Value, Weight

GATES = ("balanced", "jacobian", "signal")
COUNTINGS = ("exact", "mean_field")

Rule = Callable[..., Value | Sequence[Value]]
_RULES: dict[Primitive, Rule] = {}
# Primitives that hold equations of their own, which may be computed from constants alone.
_INLINED: set[Primitive] = set()


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a kernel as the weight of a contraction.

    Attributes:
      leaf: the kernel's index among the leaves of the parameters.
      inputs, outputs, taps: its axes over input features, output features, and filter positions.
      groups: into how many groups the contraction splits its features.
    """

    leaf: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[int, ...]
    groups: int


@dataclasses.dataclass
class Interpreter:
    """How one evaluation counts.

    Attributes:
      gates: how a factor that is alive everywhere takes part in a product (`dpai_jax.trace`).
      saturating: whether counts clip to {0, 1}, forward and backward: which units a path reaches,
        free of rounding, instead of how many paths do.
      entering: whether the gradient of a kernel is the number of paths that enter at each of its
        weights (of largest one at each use), instead of the derivative of what is counted.
      mean_field: whether counts that are uniform along an axis stay so: where padding would break
        that, their mean stands for all. Sums then do not hang on the order of their terms.
      shardings: how kernels lie on a mesh, by their indices among the leaves of the parameters.
        What meets a kernel is split like it, so that the kernel itself stays where it is.
      uses: every use of a kernel in a contraction, in the order of evaluation.
    """

    gates: str
    saturating: bool = False
    entering: bool = False
    mean_field: bool = False
    shardings: Mapping[int, NamedSharding] = dataclasses.field(default_factory=dict)
    uses: list[Use] = dataclasses.field(default_factory=list)
    _units: dict[Any, object] = dataclasses.field(default_factory=dict)
    _callers: list[JaxprEqn] = dataclasses.field(default_factory=list)

    def unit(self, *origin: Hashable) -> object:
        """The unit of this origin: the same one for the same operation on the same units."""
        return self._units.setdefault(origin, object())

    def flow(
        self,
        spread: Spread,
        exponent: Array,
        *,
        unit: Any = None,
        ancestors: frozenset[Any] = frozenset(),
        rest: float = 0.0,
        filled: Any = None,
    ) -> Flow:
        """A flow of these counts, in normal form; a new unit unless one is given.

        Where it is known whether the counts are `filled`, and they are near their normal form, the
        pass over them that finds the largest is spared.
        """
        if self.saturating:
            mantissa, filled = v.saturate(spread.array), np.True_
        elif filled is None:
            mantissa, exponent, filled = v.normalise(spread.array, exponent)
        else:
            mantissa = spread.array
        unit = object() if unit is None else unit
        return Flow(mantissa, exponent, spread.shape, unit, ancestors, rest, filled)

    def source(self, shape: Shape) -> Flow:
        """A flow that starts here: one path to every unit."""
        return self.flow(v.ones(shape), jnp.int32(0))

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
        # A library's compiled function may know no line of the user's; its caller does.
        lines = (source_line(eqn) for eqn in reversed(self._callers))
        return next((line for line in lines if line), "an unknown line")

    def apply(self, eqn: JaxprEqn, *args: Value) -> Sequence[Value]:
        """The results of one equation."""
        if not eqn.outvars:  # printing, checking
            return []
        rule = _RULES.get(eqn.primitive)
        if all(isinstance(arg, Free) for arg in args) and eqn.primitive not in _INLINED:
            return fold(eqn, *args)
        if rule is None:
            if any(isinstance(arg, Flow) for arg in args):
                raise NotImplementedError(
                    f"no path semantics for the primitive {eqn.primitive.name!r}, used at "
                    f"{self.source_line()}; give it one with dpai_jax.paths.register_rule"
                )
            return unknown(eqn)
        results = rule(self, eqn, *args)
        return [results] if isinstance(results, Free | Weight | Flow) else results


def derived(
    interpreter: Interpreter, eqn: JaxprEqn, x: Flow, spread: Spread, rest: float, which: int = 0
) -> Flow:
    """What an operation without a kernel makes of one flow: a view or a statistic of it."""
    unit = derived_unit(interpreter, eqn, x, which)
    return interpreter.flow(spread, x.exponent, unit=unit, ancestors=x.lineage, rest=rest)


def derived_unit(interpreter: Interpreter, eqn: JaxprEqn, x: Flow, which: int = 0) -> object:
    """The unit that is an operation's result, or one of them."""
    try:
        return interpreter.unit(eqn.primitive, which, tuple(sorted(eqn.params.items())), x.unit)
    except TypeError:
        # The operation's parameters can't be compared.
        return object()


def register_rule(primitive: Primitive) -> Callable[[Rule], Rule]:
    """Gives a primitive its path semantics; a decorator.

    The rule is called as `rule(interpreter, eqn, *values)`, where at least one value is a `Flow` or
    a `Weight`, and returns one value for each of the equation's results (a lone one as it is).
    A rule registered later takes the place of the one before.

    Example:
      >>> from jax.extend.core import Primitive
      >>> from dpai_jax.paths import Free, register_rule
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

    def register(rule: Rule) -> Rule:
        _RULES[primitive] = rule
        return rule

    return register


def rules_for(names: str) -> Callable[[Rule], Rule]:
    """Registers one rule for the primitives of these names."""

    def register(rule: Rule) -> Rule:
        for primitive in find_primitives(names):
            register_rule(primitive)(rule)
        return rule

    return register


def inlined(names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives that hold a jaxpr of their own."""
    _INLINED.update(find_primitives(names))
    return rules_for(names)
