"""Which entries of every value of a program have to be computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpai_jax.compacting import shapes, sums  # noqa: F401  (registers their rules)
from dpai_jax.compacting.facts import Fact, Flags, Kept, block, flags, kept_of, rectangle
from dpai_jax.compacting.program import Program
from dpai_jax.compacting.rules import rule_of


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What the analysis needs to know of a leaf of the parameters.

    Attributes:
      filled: the weights that are not pruned, of full size where any is.
      zero: the entries whose number is zero now.
    """

    shape: tuple[int, ...]
    filled: Flags
    zero: Flags


def forward(
    program: Program, leaves: Sequence[Leaf], kept: Sequence[Kept | None], dense: bool = False
) -> list[Fact]:
    """What is known of every value, from the input on.

    Args:
      program: the network; its first inputs are the leaves.
      leaves: the leaves.
      kept: the block of each leaf that can change; None for none.
      dense: whether to count all weights as kept.

    Returns:
      The facts of each value, by its number.
    """
    facts: list[Fact | None] = [None] * len(program.shapes)
    for number, value in program.constants.items():
        shape = program.shapes[number]
        zero = hasattr(value, "dtype") and not _is_key(value) and not np.asarray(value).any()
        facts[number] = Fact(shape, flags(shape, False), flags(shape, not zero))
    for number, leaf, k in zip(program.inputs, leaves, kept, strict=False):
        filled = flags(leaf.shape, True) if dense else leaf.filled
        live = flags(leaf.shape, False) if k is None else block(k, leaf.shape) & filled
        facts[number] = Fact(leaf.shape, live, filled)
    for number in program.inputs[len(leaves) :]:
        shape = program.shapes[number]
        facts[number] = Fact(shape, flags(shape, True), flags(shape, True), activation=True)
    for step in program.steps:
        operands = [_known(facts[i]) for i in step.operands]
        if not step.results:
            continue
        for number, fact in zip(step.results, rule_of(step).facts(step, operands), strict=True):
            facts[number] = fact
    return [_known(fact) for fact in facts]


def _known(fact: Fact | None) -> Fact:
    assert fact is not None
    return fact


def _is_key(value: object) -> bool:
    import jax

    return bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended))  # type: ignore[attr-defined]


def backward(program: Program, facts: Sequence[Fact]) -> list[Flags]:
    """Which entries of every value the output is computed from.

    The entries of a value that can change are computed as one block. So where some entries are
    wanted, all of the block count as wanted.
    """
    wanted = [flags(shape, False) for shape in program.shapes]
    for number in program.outputs:
        wanted[number] = flags(program.shapes[number], True)
    for step in reversed(program.steps):
        results = [facts[i] for i in step.results]
        each = []
        for fact, i in zip(results, step.results, strict=True):
            w = wanted[i] & fact.live if fact.activation else wanted[i]
            w = rectangle(w)
            each.append(w & fact.live if fact.activation else w)
        if not any(w.any() for w in each):
            continue
        operands = [facts[i] for i in step.operands]
        found = rule_of(step).wants(step, operands, results, each)
        for i, w in zip(step.operands, found, strict=True):
            wanted[i] = wanted[i] | w
    return wanted


def blocks(program: Program, facts: Sequence[Fact], wanted: Sequence[Flags]) -> list[Kept | None]:
    """The block of every value that is computed; None where nothing of it is."""
    triples = zip(facts, wanted, program.shapes, strict=True)
    return [kept_of(fact.live & w, shape) for fact, w, shape in triples]


def leaf_blocks(program: Program, leaves: Sequence[Leaf]) -> tuple[list[Kept | None], list[Leaf]]:
    """The block of each leaf that stays, and the leaves with what counts as pruned besides.

    A number of a dead channel that is zero, such as a bias before training, counts as pruned if
    nothing else uses it: so what it would keep alive goes too.
    """
    leaves = list(leaves)
    none: list[Kept | None] = [None] * len(leaves)
    dense = forward(program, leaves, none, dense=True)
    while True:
        changed = False
        sparse = forward(program, leaves, none)
        facts = [
            dataclasses.replace(s, live=s.filled & ~(d.live & ~s.live), activation=d.activation)
            for s, d in zip(sparse, dense, strict=True)
        ]
        used = backward(program, facts)
        for k, (leaf, number) in enumerate(zip(leaves, program.inputs, strict=False)):
            idle = leaf.filled & leaf.zero & ~used[number]
            if idle.any():
                leaves[k] = dataclasses.replace(leaf, filled=leaf.filled & ~idle)
                changed = True
        if not changed:
            break
    activation = [fact.activation for fact in dense]
    kept = none
    while True:
        facts = with_activations(forward(program, leaves, kept), activation)
        wanted = backward(program, facts)
        found = [
            _joined(kept_of(wanted[number], leaf.shape), old, leaf.shape)
            for number, leaf, old in zip(program.inputs, leaves, kept, strict=False)
        ]
        if all(_same(a, b) for a, b in zip(found, kept, strict=True)):
            return kept, leaves
        kept = found


def with_activations(facts: Sequence[Fact], activation: Sequence[bool]) -> list[Fact]:
    """Facts that know which values depend on the input when nothing is pruned."""
    pairs = zip(facts, activation, strict=True)
    return [dataclasses.replace(fact, activation=flag) for fact, flag in pairs]


def _joined(a: Kept | None, b: Kept | None, shape: tuple[int, ...]) -> Kept | None:
    if a is None or b is None:
        return b if a is None else a
    each = []
    for x, y, size in zip(a, b, shape, strict=True):
        both = None if x is None or y is None else np.union1d(x, y)
        each.append(None if both is None or len(both) == size else both)
    return tuple(each)


def _same(a: Kept | None, b: Kept | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(
        (x is y) if x is None or y is None else np.array_equal(x, y)
        for x, y in zip(a, b, strict=True)
    )
