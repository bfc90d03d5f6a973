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
from dpai_jax.compacting.facts import Kept
from dpai_jax.compacting.program import Program
from dpai_jax.compacting.rules import Rule, rule_of
from dpai_jax.tools.jaxprs import bind, source_line


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
        self.kept = blocks(program, self.facts, backward(program, self.facts))
        self._frozen = frozen
        for number, k in zip(program.inputs, kept, strict=False):
            self.kept[number] = k
        self._producer = {i: step for step in program.steps for i in step.results}
        self._numbers: dict[int, Any] = {}
        self._folded: dict[int, Any] | None = None

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
        return Cut(
            self.facts[number], dtype, kept, array, lambda: self._number(number), self._folded
        )

    def prepare(self, params: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Computes the frozen entries that `run` asks for, all in one program."""
        jax.eval_shape(self.run, list(params), list(inputs))
        asked = list(self._numbers)
        with jax.ensure_compile_time_eval():
            leaves = [jnp.asarray(frozen.whole()) for frozen in self._frozen]
            arrays = jax.jit(lambda leaves: self._compute(asked, leaves))(leaves)
        self._numbers = dict(zip(asked, map(_compressed, arrays), strict=True))
        self._folded = {}

    def _number(self, number: int) -> Any:
        """The frozen entries of a value; zeros at all that can change."""
        if self._folded is None:
            shape, dtype = self.program.shapes[number], self.program.dtypes[number]
            whole = shape if _is_key(dtype) else (1,) * len(shape)
            self._numbers[number] = _zeros(whole, dtype)
        return self._numbers[number]

    def _compute(self, asked: Sequence[int], leaves: Sequence[Any]) -> list[Any]:
        """The frozen entries of these values, from those of the leaves."""
        program, needed, stack = self.program, set[int](), list(asked)
        while stack:
            i = stack.pop()
            if i not in needed and self._has_numbers(i) and i in self._producer:
                stack += self._producer[i].operands
            needed.add(i)
        given = dict(zip(program.inputs, leaves, strict=False)) | program.constants
        values = {
            i: given[i] if i in given else _zeros(program.shapes[i], program.dtypes[i])
            for i in needed
            if i in given or i not in self._producer or not self._has_numbers(i)
        }
        for step in program.steps:
            if any(i in needed and i not in values for i in step.results):
                results = bind(step.eqn, *(values[i] for i in step.operands))
                values.update(map(self._still, step.results, results))
        return [values[i] for i in asked]

    def _still(self, number: int, array: Any) -> tuple[int, Any]:
        """An array with zeros at all that can change, which may be anything here, also NaN."""
        if _is_key(array.dtype):
            return number, array
        return number, jnp.where(self.facts[number].live, jnp.zeros((), array.dtype), array)

    def _has_numbers(self, number: int) -> bool:
        fact = self.facts[number]
        return bool(np.any(fact.filled & ~fact.live)) or _is_key(self.program.dtypes[number])


def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    if _is_key(dtype):
        return jax.random.split(jax.random.key(0, impl=dtype), shape)
    return np.zeros(shape, dtype)


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
