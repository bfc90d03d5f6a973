"""A network at one shape of its input, ready to be computed from cut parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpai_jax.compacting.analysis import Leaf, backward, blocks, forward, with_activations
from dpai_jax.compacting.cuts import Cut
from dpai_jax.compacting.facts import Fact, Kept
from dpai_jax.compacting.program import Program, Step
from dpai_jax.compacting.rules import Rule, rule_of
from dpai_jax.paths._jax import bind, source_line


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The entries of a leaf that were cut out and are not zero.

    Attributes:
      shape, dtype: of the whole leaf.
      places: where they are, in C order.
      values: what they are.
    """

    shape: tuple[int, ...]
    dtype: Any
    places: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, leaf: Any, kept: Kept | None) -> Frozen:
        """What a block leaves of a leaf."""
        if kept is not None and all(k is None for k in kept):
            return cls(leaf.shape, leaf.dtype, np.zeros(0, int), np.zeros(0))
        whole = np.asarray(leaf)
        rest = whole.copy()
        if kept is not None:
            rest[np.ix_(*_written_out(kept, rest.shape))] = 0
        places = np.flatnonzero(rest)
        return cls(whole.shape, whole.dtype, places, rest.ravel()[places])

    def whole(self) -> np.ndarray:
        """The leaf with zeros at the block."""
        array = np.zeros(self.shape, self.dtype)
        array.reshape(-1)[self.places] = self.values
        return array


def _written_out(kept: Kept, shape: tuple[int, ...]) -> list[np.ndarray]:
    return [np.arange(n) if k is None else k for k, n in zip(kept, shape, strict=True)]


class Plan:
    """How to compute a program from cut parameters."""

    def __init__(
        self,
        program: Program,
        leaves: Sequence[Leaf],
        kept: Sequence[Kept | None],
        frozen: Sequence[Frozen],
    ):
        none: list[Kept | None] = [None] * len(leaves)
        dense = forward(program, leaves, none, dense=True)
        facts = forward(program, leaves, kept)
        self.program = program
        self.facts = with_activations(facts, [fact.activation for fact in dense])
        self.wanted = backward(program, self.facts)
        self.kept = blocks(program, self.facts, self.wanted)
        self._frozen = frozen
        for number, k in zip(program.inputs, kept, strict=False):
            self.kept[number] = k
        self._producer = {i: step for step in program.steps for i in step.results}
        self._numbers: dict[int, Any] = {}
        self._whole: dict[int, Any] = {}

    def run(self, params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The outputs, from the blocks of the leaves and the whole inputs."""
        program, values = self.program, {}
        for number, array in zip(program.inputs, (*params, *inputs), strict=True):
            kept = self.kept[number]
            if number in program.inputs[len(params) :]:
                kept = (None,) * len(program.shapes[number])
            values[number] = self._cut(number, array, kept)
        for number in program.constants:
            values[number] = self._cut(number, None, None)
        for step in program.steps:
            kept_ = [self.kept[i] for i in step.results]
            arrays: Sequence[Any] = [None] * len(kept_)
            if any(k is not None for k in kept_):
                arrays = rule_of(step).evaluate(step, [values[i] for i in step.operands], kept_)
            for i, array, k in zip(step.results, arrays, kept_, strict=True):
                values[i] = self._cut(i, array, k)
        self._whole.clear()
        return [values[i].at((None,) * len(program.shapes[i])) for i in program.outputs]

    def remarks(self) -> list[str]:
        """What is computed whole, and why."""
        found: dict[str, None] = {}
        for step in self.program.steps:
            touched = any(self.facts[i].activation for i in step.operands)
            is_used = any(self.kept[i] is not None for i in step.results)
            if touched and is_used and rule_of(step) is Rule:
                line = source_line(step.eqn) or "an unknown line"
                found[f"{step.kind} at {line} is computed whole: it has no rule to cut it"] = None
        return list(found)

    def _cut(self, number: int, array: Any, kept: Kept | None) -> Cut:
        dtype = self.program.dtypes[number]
        return Cut(self.facts[number], dtype, kept, array, lambda: self._number(number))

    def _number(self, number: int) -> Any:
        """The frozen entries of a value; zeros at all that can change."""
        if number not in self._numbers:
            with jax.ensure_compile_time_eval():
                self._compute(number)
                self._numbers[number] = _compressed(self._whole[number])
        return self._numbers[number]

    def _compute(self, number: int) -> None:
        """Computes the frozen entries of a value, and of all that they are made of."""
        needed: dict[int, None] = {}
        stack = [number]
        while stack:
            i = stack.pop()
            if i in needed or i in self._whole:
                continue
            needed[i] = None
            if self._has_numbers(i) and i in self._producer:
                stack += self._producer[i].operands
        for i in (*self.program.inputs, *self.program.constants):
            if i in needed:
                self._whole[i] = self._given(i)
        for i in needed:
            if i not in self._whole and not self._has_numbers(i):
                self._whole[i] = jnp.zeros(self.program.shapes[i], self.program.dtypes[i])
        for step in self.program.steps:
            if any(i in needed and i not in self._whole for i in step.results):
                self._step(step)

    def _has_numbers(self, number: int) -> bool:
        fact = self.facts[number]
        return bool(np.any(fact.filled & ~fact.live)) or _is_key(self.program.dtypes[number])

    def _given(self, number: int) -> Any:
        if number in self.program.constants:
            return self.program.constants[number]
        place = self.program.inputs.index(number)
        if place < len(self._frozen):
            return jnp.asarray(self._frozen[place].whole(), self.program.dtypes[number])
        return jnp.zeros(self.program.shapes[number], self.program.dtypes[number])

    def _step(self, step: Step) -> None:
        results = bind(step.eqn, *(self._whole[i] for i in step.operands))
        for i, array in zip(step.results, results, strict=True):
            if not _is_key(array.dtype):
                # What can change may be anything here, also NaN.
                array = jnp.where(self.facts[i].live, jnp.zeros((), array.dtype), array)
            self._whole[i] = array


def _is_key(dtype: Any) -> bool:
    return bool(jax.dtypes.issubdtype(dtype, jax.dtypes.extended))


def _compressed(array: Any) -> Any:
    """The array with size one along axes on which all entries are equal."""
    if _is_key(array.dtype):
        return array
    array = np.asarray(array)
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] else array
        if array.shape[axis] and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array


