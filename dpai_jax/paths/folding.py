"""A network as a chain of stages, of which those that do the same are one function of arrays.

A stage is a segment of the network's program (`repeats`) in path semantics, on operands of one
form. A form is all that is known of the operands but the numbers: of a flow its shape, its unit and
the units that it comes from. Units are renamed by the part that they take in the operands, so the
blocks of a deep network have one form, and one stage is compiled for all of them. Outside, the
units of a stage's results get their own names again; so a chain counts as the whole program does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax.paths import values as v
from dpai_jax.paths.counting import Counting
from dpai_jax.paths.interpreter import Interpreter
from dpai_jax.paths.kernels import AxesOfLeaf, KernelUse
from dpai_jax.paths.repeats import Segment
from dpai_jax.paths.values import Flow, Shape, Spread, Value, Weight, WeightSum

# For each argument of a stage its gains, and its exponent, if it is a kernel's mask that has some
# (see `Weight`).
Gains = Sequence[tuple[Array, ...]]
Exponents = Sequence[Array | None]

# What is made of the flows at the network's outputs.
End = Callable[[Counting, list[Flow]], Array]


@dataclasses.dataclass(frozen=True)
class _Array:
    """What stands for an array while a chain is made."""

    place: int
    shape: Shape
    dtype: Any


class Slot(_Array):
    """An array that passes from one stage to others; the layers' masks are the first."""


class Given(_Array):
    """An array among the arguments of a stage."""


class Made(_Array):
    """An array among the results of a stage that is not one of its arguments."""


class _Unit(NamedTuple):
    """The name of a unit among a stage's operands, or among the constants beside them."""

    world: str
    number: int


class Stage:
    """A segment in path semantics as a function of arrays, equal to others that do the same.

    Args:
      segment: its equations.
      gates, counting: see `Interpreter`.
      leaves, treedef: its operands: `Given` for each array.
      sources: the shapes and dtypes of the network's inputs, if they start here.
      end: what is made of the results, at the end of the chain.
      fingerprint: what only this stage of a network has, in any process.
    """

    def __init__(
        self,
        segment: Segment,
        gates: str,
        counting: Counting,
        leaves: Sequence[Any],
        treedef: Any,
        sources: tuple[Any, ...],
        end: End | None,
        fingerprint: tuple[str, int],
    ):
        self.fingerprint = fingerprint
        self._segment, self._gates, self._counting = segment, gates, counting
        self._leaves, self._treedef, self._sources, self._end = leaves, treedef, sources, end
        given = {leaf.place: leaf for leaf in leaves if isinstance(leaf, Given)}
        self.arguments = [
            jax.ShapeDtypeStruct(given[i].shape, given[i].dtype) for i in range(len(given))
        ]
        # Traced once, for the results' form, for the program and for its derivative.
        self._jitted = jax.jit(self._run)
        self._key = segment.program, gates, counting, tuple(leaves), treedef, sources, end
        self._hash = hash(self._key)
        self._outcome: _Outcome | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Stage) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    def __call__(
        self, arrays: Sequence[Array], gains: Gains = (), exponents: Exponents = ()
    ) -> list[Array]:
        """The arrays among its results that it does not just hand on."""
        found: list[Array] = self._jitted(list(arrays), list(gains), list(exponents))
        return found

    @property
    def outcome(self) -> _Outcome:
        """What its results are but for their numbers."""
        if self._outcome is None:
            jax.eval_shape(self._jitted, self.arguments, [], [])
            assert self._outcome is not None
        return self._outcome

    @property
    def results(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes of the arrays that it returns."""
        made = {x.place: x for x in self.outcome.leaves if isinstance(x, Made)}
        return [jax.ShapeDtypeStruct(made[i].shape, made[i].dtype) for i in range(len(made))]

    def _run(
        self,
        arrays: list[Array],
        gains: list[tuple[Array, ...]],
        exponents: list[Array | None],
    ) -> list[Array]:
        filled = [arrays[x.place] if isinstance(x, Given) else x for x in self._leaves]
        operands = self._treedef.unflatten(filled)
        pairs = itertools.zip_longest(gains or [()] * len(arrays), exponents)
        own = {id(x): pair for x, pair in zip(arrays, pairs, strict=True) if pair != ((), None)}
        operands = [_multiplied(x, own) for x in operands]
        uses: list[AxesOfLeaf] = []

        def record(use: KernelUse) -> Spread:
            if not use.is_lookup:
                uses.extend(use.axes_of_leaves())
            return use.count()

        interpreter = Interpreter(self._gates, self._counting, record)
        sources = [interpreter.input(aval) for aval in self._sources]
        results = interpreter.evaluate(self._segment, *operands, *sources)
        if self._end is not None:
            ended = self._end(self._counting, flows_of(results))
            self._outcome = _Outcome([_marked(Made, 0, ended)], None, {}, uses)
            return [ended]
        # A mask that is handed on is multiplied in the next stage.
        plain = [interpreter.baked(_multiplied(x, dict.fromkeys(own, ((), None)))) for x in results]
        leaves, treedef = jax.tree.flatten([interpreter.settled(x) for x in plain])
        mark = {id(x): _marked(Given, i, x) for i, x in enumerate(arrays)}
        found: list[Array] = []
        for leaf in leaves:
            if isinstance(leaf, jax.Array) and id(leaf) not in mark:
                mark[id(leaf)] = _marked(Made, len(found), leaf)
                found.append(leaf)
        origins = dict(interpreter.origins())
        marked = [mark.get(id(leaf), leaf) for leaf in leaves]
        self._outcome = _Outcome(marked, treedef, origins, uses)
        return found


def _multiplied(value: Value, by: Mapping[int, tuple[tuple[Array, ...], Array | None]]) -> Value:
    """A value with the gains and the exponent that are given for its mask, by the array's `id`."""
    if isinstance(value, WeightSum):
        return WeightSum(tuple(cast(Weight, _multiplied(term, by)) for term in value.terms))
    if not isinstance(value, Weight) or id(value.array) not in by:
        return value
    gains, exponent = by[id(value.array)]
    return v.replace(value, gains=gains, exponent=exponent)


def _marked(kind: type[_Array], place: int, x: Any) -> _Array:
    return kind(place, x.shape, np.dtype(x.dtype))


class _Outcome(NamedTuple):
    """The results of a stage, `Given` or `Made` for each array.

    Attributes:
      leaves: the results.
      treedef: their structure.
      origins: where its units come from.
      uses: what its operands' kernels are to it.
    """

    leaves: list[Any]
    treedef: Any
    origins: dict[object, Hashable]
    uses: list[AxesOfLeaf]


class Call(NamedTuple):
    """A stage's place in a chain.

    Attributes:
      stage: the stage.
      inputs: the slots that it reads.
      outputs: the slots that it writes.
      is_first: for each slot that it reads, whether no stage before reads it.
      uses: the uses of kernels as weights, by their numbers among the parameters.
    """

    stage: Stage
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_first: tuple[bool, ...]
    uses: tuple[AxesOfLeaf, ...]


def chain_of(
    segments: Sequence[Segment],
    variables: Iterable[tuple[Any, Value]],
    sources: tuple[Any, ...],
    gates: str,
    counting: Counting,
    end: End,
    n_slots: int,
    title: str = "",
) -> list[Call]:
    """A network's evaluation as calls of stages.

    Args:
      segments: the network's program.
      variables: its constants and parameters with what they stand for, masks being slots.
      sources: the shapes and dtypes of its inputs.
      gates: see `Interpreter`.
      counting: see `Interpreter`.
      end: makes the result, one array, of the flows at the outputs.
      n_slots: the number of slots so far.
      title: what only this chain of the network is called.

    Returns:
      The calls. The last writes the result alone.
    """
    environment = dict(variables)
    interpreter = Interpreter(gates, counting)
    stages: dict[Stage, Stage] = {}
    seen: set[int] = set()
    calls = []
    for i, segment in enumerate(segments):
        started = sources if i == 0 else ()
        read = segment.invars[: len(segment.invars) - len(started)]
        operands = [environment[x] for x in read]
        names = _Names(operands)
        leaves, treedef = jax.tree.flatten([names.given(x) for x in operands])
        slots = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Slot)))
        place = {slot: _marked(Given, j, slot) for j, slot in enumerate(slots)}
        form = [place[leaf] if isinstance(leaf, Slot) else leaf for leaf in leaves]
        ended = end if i == len(segments) - 1 else None
        stage = Stage(segment, gates, counting, form, treedef, started, ended, (title, i))
        stage = stages.setdefault(stage, stage)
        made = {x.place: x for x in stage.outcome.leaves if isinstance(x, Made)}
        new = [_marked(Slot, n_slots + j, made[j]) for j in range(len(made))]
        n_slots += len(new)
        inputs = tuple(slot.place for slot in slots)
        outputs = tuple(slot.place for slot in new)
        is_first = tuple(n not in seen for n in inputs)
        calls.append(Call(stage, inputs, outputs, is_first, names.used(stage.outcome.uses)))
        seen.update(inputs)
        if ended is None:
            results = _results(stage.outcome, slots, new, names, interpreter)
            environment.update(zip(segment.outvars, results, strict=True))
    return calls


def _results(
    outcome: _Outcome,
    slots: Sequence[_Array],
    new: Sequence[_Array],
    names: _Names,
    interpreter: Interpreter,
) -> list[Value]:
    """The results of a stage as the chain has them."""
    arrays = {Given: slots, Made: new}
    leaves = [arrays[type(x)][x.place] if isinstance(x, _Array) else x for x in outcome.leaves]
    return names.taken_back(outcome.treedef.unflatten(leaves), outcome.origins, interpreter)


def flows_of(values: Iterable[Value]) -> list[Flow]:
    """The flows among a network's outputs."""
    flows = [value for value in values if isinstance(value, Flow)]
    if not flows:
        raise ValueError("fn's output does not depend on x through any path of real numbers")
    return flows


class _Names:
    """Names of the units and numbers of the kernels among a stage's operands.

    They are equal for operands whose units have equal parts in them. The constants beside flows are
    never combined with these, and have names of their own. Where all operands are one unit, what it
    comes from makes no difference within the stage, and is left out.
    """

    def __init__(self, operands: Sequence[Value]):
        flows = [x for x in operands if isinstance(x, Flow)]
        constants = [x.constants for x in flows if x.constants is not None]
        self._units, self._beside = _named(flows, "flow"), _named(constants, "constants")
        weights = [x for x in operands if isinstance(x, Weight | WeightSum)]
        leaves = [source[0] for x in weights for term in x.terms for source in term.sources]
        self._kernels = {leaf: i for i, leaf in enumerate(dict.fromkeys(leaves))}
        self._sources = {x.unit: (x.ancestors, x.views) for x in (*flows, *constants)}

    def given(self, value: Value) -> Value:
        """An operand as the stage has it."""

        def rename(flow: Flow, names: dict[Any, _Unit]) -> Flow:
            ancestors = frozenset(names[unit] for unit in flow.ancestors if unit in names)
            views = frozenset(names[unit] for unit in flow.views if unit in names)
            return v.replace(flow, unit=names[flow.unit], ancestors=ancestors, views=views)

        def renamed(flow: Flow) -> Flow:
            beside = flow.constants and rename(flow.constants, self._beside)
            return v.replace(rename(flow, self._units), constants=beside)

        return _mapped(value, renamed, self._kernels)

    def taken_back(
        self, results: Sequence[Value], origins: dict[Any, Hashable], interpreter: Interpreter
    ) -> list[Value]:
        """The stage's results as the interpreter has them, which evaluates all stages."""
        pairs = (*self._units.items(), *self._beside.items())
        units = _Fresh((name, unit) for unit, name in pairs)
        for unit, origin in origins.items():
            units[unit] = interpreter.unit(*_translated(origin, units))

        def restored(flow: Flow) -> Flow:
            unit = units[flow.unit]
            ancestors, views = ({units[x] for x in own} for own in (flow.ancestors, flow.views))
            for x, (before, whole) in self._sources.items():
                if x == unit or x in ancestors:
                    ancestors |= before
                if x == unit or x in views:
                    views |= whole
            return v.replace(
                flow,
                unit=unit,
                ancestors=frozenset(ancestors),
                views=frozenset(views),
                constants=flow.constants and restored(flow.constants),
            )

        numbers = {number: leaf for leaf, number in self._kernels.items()}
        return [_mapped(x, restored, numbers) for x in results]

    def used(self, uses: Sequence[AxesOfLeaf]) -> tuple[AxesOfLeaf, ...]:
        """Uses of kernels by the kernels' own numbers."""
        leaves = list(self._kernels)
        return tuple(use._replace(leaf=leaves[use.leaf]) for use in uses)


class _Fresh(dict[Any, Any]):
    """Units by their names; what has none gets one that is new."""

    def __missing__(self, name: Any) -> Any:
        return self.setdefault(name, object())


def _named(flows: Sequence[Flow], world: str) -> dict[Any, _Unit]:
    """Names for the units of flows, and for those that these come from."""
    if len({flow.unit for flow in flows}) == 1:
        return {flows[0].unit: _Unit(world, 0)}
    parts: dict[Any, list[tuple[int, int]]] = {}
    for i, flow in enumerate(flows):
        for kind, units in enumerate(({flow.unit}, flow.ancestors, flow.views)):
            for unit in units:
                parts.setdefault(unit, []).append((i, kind))
    order = sorted(parts, key=parts.__getitem__)
    return {unit: _Unit(world, i) for i, unit in enumerate(order)}


def _mapped(value: Value, of_flow: Callable[[Flow], Flow], kernels: dict[int, int]) -> Value:
    """A value with its flow and the numbers of its kernels replaced."""
    if isinstance(value, Flow):
        return of_flow(value)
    if isinstance(value, Weight):
        return v.replace(value, sources=tuple((kernels[n], axes) for n, axes in value.sources))
    if isinstance(value, WeightSum):
        terms = (_mapped(term, of_flow, kernels) for term in value.terms)
        return WeightSum(tuple(cast(Weight, term) for term in terms))
    return value


def _translated(origin: Any, units: dict[Any, Any]) -> Any:
    """Where a unit comes from, with the units in it by other names."""
    if origin in units:
        return units[origin]
    if type(origin) is tuple:
        return tuple(_translated(x, units) for x in origin)
    if type(origin) is frozenset:
        return frozenset(_translated(x, units) for x in origin)
    return origin


def pulled_back(
    stage: Stage,
    arrays: Sequence[Array],
    cotangents: Sequence[Array],
    so_far: Sequence[Any],
    gains: Gains = (),
    exponents: Exponents = (),
) -> list[Any]:
    """The cotangents of a stage's arguments, from those of its results.

    Args:
      stage: the stage.
      arrays: its arguments; masks may be boolean.
      cotangents: those of its real results.
      so_far: for each argument the cotangent that later stages gave.
      gains: for each argument what a mask is multiplied by (see `Weight`).
      exponents: likewise.

    Returns:
      The sums, None for arguments that are not real. That of a mask with gains is a pair: its own
      and those of its gains.
    """
    cast = in_dtypes(stage, arrays)
    real = [i for i, x in enumerate(cast) if is_real(x)]

    def results(numbers: list[Array], gains: list[tuple[Array, ...]]) -> list[Array]:
        whole = list(cast)
        for i, x in zip(real, numbers, strict=True):
            whole[i] = x
        return [x for x in stage(whole, gains, exponents) if is_real(x)]

    _, pull = jax.vjp(results, [cast[i] for i in real], list(gains))
    of_arrays, of_gains = pull(list(cotangents))
    found: list[Any] = [None] * len(cast)
    for i, cotangent in zip(real, of_arrays, strict=True):
        own = (cotangent, of_gains[i]) if gains and gains[i] else cotangent
        found[i] = own if so_far[i] is None else jax.tree.map(jnp.add, so_far[i], own)
    return found


def in_dtypes(stage: Stage, arrays: Sequence[Array]) -> list[Array]:
    """A stage's arguments in the dtypes that it takes; those of masks may be boolean."""
    return [x.astype(a.dtype) for x, a in zip(arrays, stage.arguments, strict=True)]


def is_real(x: Any) -> bool:
    """Whether an array has a cotangent."""
    return bool(jnp.issubdtype(x.dtype, np.floating))
