"""A step of DPaI by the chain of a network's stages: one program for a block and its repeats.

A layer's step is taken where the gradient of its mask is done: as the first stage that uses the
kernel is pulled back. So no gradient is written out, unless a kernel is used in several stages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.extend.core import Literal

from dpai_jax.methods.balance import Objective, directions_of, moved
from dpai_jax.paths import Layer, Network
from dpai_jax.paths.folding import Call, Stage, pulled_back
from dpai_jax.stages import backward, forward, multiplied
from dpai_jax.tools import meshes
from dpai_jax.tools.jaxprs import open_jaxpr
from dpai_jax.tools.powers import SMALL
from dpai_jax.tools.signatures import Alike


class Steps:
    """Lines 6 to 8 of Algorithm 1 by a chain of stages (see `DPaI`).

    Args:
      net: the traced network.
      calls: its chain.
      objective: what to ascend.
      update: the optimizer's update, of each array by itself, if there is one.
    """

    def __init__(
        self, net: Network, calls: Sequence[Call], objective: Objective, update: Alike | None
    ):
        self.net, self.calls = net, calls
        self._own = [_own(call, len(net.layers)) for call in calls]
        ways = []
        for call, own in zip(calls, self._own, strict=True):
            # Layers of other names take the same step.
            layers = (dataclasses.replace(net.layers[slot], name="", index=0) for _, slot in own)
            pairs = tuple(zip((place for place, _ in own), layers, strict=True))
            shares = tuple(
                objective.shares(net.layers[slot]) if slot < len(net.layers) else ()
                for slot in call.inputs
            )
            ways.append(_Way(call.stage, pairs, objective, update, _largest_small(net), shares))
        # The same objects at each call, so that programs are found without a comparison.
        self._ways = [net.programs.setdefault((_Way, way), way) for way in ways]
        self._begun = _begun(calls, len(net.layers))
        # Of each kernel that several stages use the gradient of the step before. Its memory is lent
        # to the next: new memory takes a CPU longer than all that is done with it.
        self._lent: dict[int, Array] = {}

    def memory(self, scores: Sequence[Any], init: Callable[[list[Any]], Any]) -> list[Any]:
        """What an optimizer remembers at the start, of the layers of each stage."""
        return [init([scores[slot] for _, slot in own]) for own in self._own]

    def __call__(
        self,
        scores: Sequence[Any],
        memory: Sequence[Any],
        masks: Sequence[Any],
        strengths: Sequence[Any],
        exponents: Sequence[Any],
        weights: tuple[Any, Any, Any],
        *,
        ahead: int = 0,
    ) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """Takes a step.

        Args:
          scores: the layers' scores, whose memory is lent to the results.
          memory: what the optimizer remembers, of the layers of each stage.
          masks: the masks of the scores.
          strengths: as for `direction`.
          exponents: as for `direction`.
          weights: α, β and γ.
          ahead: if not zero, only starts to compile, for so many steps.

        Returns:
          The scores and the memory after the step, and what was measured.
        """
        after, remembered = list(scores), list(memory)
        totals: dict[str, Any] = {name: np.zeros((), np.uint32) for name in ("nodes", "kernels")}
        of_slots = [dict(enumerate(own)) for own in (strengths, exponents)]
        numbers = iter(reversed(range(len(self.calls))))

        def pull(call: Call, *pulled: list[Any]) -> Sequence[Any]:
            nonlocal totals
            i = next(numbers)
            lent = [self._lend(scores[slot], slot, bool(ahead)) for slot in self._begun[i]]
            state = [after[slot] for _, slot in self._own[i]], remembered[i], lent
            factors, powers = ([own.get(slot) for slot in call.inputs] for own in of_slots)
            args = (self.net, state, *pulled, factors, powers, totals, weights)
            if ahead:
                _step_behind.ahead(*args, calls=ahead, way=self._ways[i])
                return self._ways[i].pulled
            (moved_scores, remembered[i]), totals, found = _step_behind(*args, way=self._ways[i])
            *_, so_far = pulled
            for (place, slot), x in zip(self._own[i], moved_scores, strict=True):
                after[slot] = x
                if so_far[place] is not None:
                    self._lent[slot] = jax.tree.leaves(so_far[place])[0]
            return found

        slots = forward(self.net, self.calls, masks, strengths, exponents, ahead=ahead)
        backward(self.calls, slots, pull)
        return after, remembered, {"log_paths": slots[self.calls[-1].outputs[0]], **totals}

    def _lend(self, score: Any, slot: int, ahead: bool) -> Any:
        """Memory for the gradient of a layer, whose scores are given; or its shape."""
        if ahead:
            return score
        return self._lent.pop(slot) if slot in self._lent else jnp.zeros_like(score)


class _Way:
    """How a step is taken behind a stage; hashed once.

    Args:
      stage: the stage.
      layers: the layers whose gradients are done there, and their places among its arguments.
      objective: what to ascend.
      update: the optimizer's update, if there is one.
      largest: see `rows.sums_of`.
      shares: for each argument that is a mask the shapes of what passes its features.
    """

    def __init__(
        self,
        stage: Stage,
        layers: tuple[tuple[int, Layer], ...],
        objective: Objective,
        update: Alike | None,
        largest: int,
        shares: tuple[tuple[tuple[int, ...], ...], ...],
    ):
        self.stage, self.layers, self.objective = stage, layers, objective
        self.update, self.largest, self.shares = update, largest, shares
        self.fingerprint = stage, layers, objective, update, largest, shares
        self._hash = hash(self.fingerprint)

    @property
    def pulled(self) -> list[Any]:
        """The shapes of what is pulled back to the stage's arguments."""
        like = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
        pairs = zip(self.stage.arguments, self.shares, strict=True)
        return [(x, tuple(map(like, own))) if own else x for x, own in pairs]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Way) and self.fingerprint == other.fingerprint)

    def __hash__(self) -> int:
        return self._hash


def _own(call: Call, n_layers: int) -> list[tuple[int, int]]:
    """The masks whose gradients are done behind a stage: place among its arguments, and slot."""
    pairs = enumerate(zip(call.inputs, call.is_first, strict=True))
    return [(i, slot) for i, (slot, is_first) in pairs if is_first and slot < n_layers]


def _begun(calls: Sequence[Call], n_layers: int) -> list[list[int]]:
    """For each stage the slots of masks whose gradients begin there, and are done elsewhere."""
    last = {slot: i for i, call in enumerate(calls) for slot in call.inputs}
    return [
        [
            slot
            for slot, is_first in zip(call.inputs, call.is_first, strict=True)
            if slot < n_layers and last[slot] == i and not is_first
        ]
        for i, call in enumerate(calls)
    ]


def _largest_small(net: Network) -> int:
    """The most terms that a sum over a small layer's kernels has."""
    layers = [layer for layer in net.layers if not layer.stack and layer.size <= SMALL]
    return max((layer.size // layer.size_of(layer.taps) for layer in layers), default=1)


@meshes.program(donate=(0,), by_numpy="exactly")
def _step_behind(
    _: Network,
    state: tuple[list[Array], Any, list[Array]],
    arrays: list[Array],
    cotangents: list[Array],
    so_far: list[Any],
    factors: list[Array | None],
    exponents: list[Array | None],
    totals: dict[str, Array],
    weights: tuple[Any, Any, Any],
    *,
    way: _Way,
) -> tuple[Any, dict[str, Array], list[Any]]:
    """The step of the layers whose gradients are done behind a stage.

    The state's memory is lent to the results; nothing else is made of its last part.
    """
    gains = [tuple(jnp.ones(size, jnp.float32) for size in sizes) for sizes in way.shares]
    values = multiplied(arrays, factors)
    found = pulled_back(way.stage, values, cotangents, so_far, gains, exponents)
    scores, memory = state[:2]
    if not way.layers:
        return (scores, memory), totals, found
    taken = [_taken(found, place, factors[place]) for place, _ in way.layers]
    gradients, shares = zip(*taken, strict=True)
    directions, measured = directions_of(
        [layer for _, layer in way.layers],
        way.objective,
        weights,
        scores,
        [arrays[place] for place, _ in way.layers],
        gradients,
        shares,
        way.largest,
    )
    totals = {name: total + measured[name] for name, total in totals.items()}
    return moved(directions, scores, memory, way.update), totals, found


def _taken(found: list[Any], place: int, factor: Array | None) -> tuple[Array, tuple[Array, ...]]:
    """The gradient of a mask, and the shares of all paths that pass its features."""
    pulled, found[place] = found[place], None
    gradient, shares = pulled if isinstance(pulled, tuple) else (pulled, ())
    return gradient if factor is None else gradient * factor, shares


def goes_by_array(optimizer: optax.GradientTransformation) -> bool:
    """Whether an optimizer treats each array by itself, so that stages can be updated alone."""
    like = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2, 3)]
    try:
        memory = jax.eval_shape(optimizer.init, like)
        with jax.numpy_dtype_promotion("standard"):
            opened, _ = open_jaxpr(jax.make_jaxpr(optimizer.update)(like, memory, like))
    except Exception:  # noqa: BLE001  (it may be made for the layers of one network alone)
        return False
    sources = _sources(opened, [{x.aval.shape} - {()} for x in opened.invars])
    pairs = zip(opened.outvars, sources, strict=True)
    return all(shapes <= {x.aval.shape} - {()} for x, shapes in pairs)


def _sources(opened: Any, of_arguments: Sequence[set[Any]]) -> list[set[Any]]:
    """The shapes of the arrays that each of a jaxpr's results is made of."""
    sources = dict(zip(opened.invars, of_arguments, strict=True))

    def read(x: Any) -> set[Any]:
        return set() if isinstance(x, Literal) else sources.get(x, set())

    for eqn in opened.eqns:
        of_operands = [read(x) for x in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            found = _sources(open_jaxpr(eqn.params["jaxpr"])[0], of_operands)
        else:
            found = [set().union(*of_operands)] * len(eqn.outvars)
        sources.update(zip(eqn.outvars, found, strict=True))
    return [read(x) for x in opened.outvars]
