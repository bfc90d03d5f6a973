"""The steps of DPaI's ascent: of one problem, and of several in one program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax

from dpai_jax import checks, grouping
from dpai_jax.methods.balance import MEASURED, Objective, direction, moved
from dpai_jax.methods.selector import (
    Selected,
    masks_of,
    masks_of_many,
    nothing_selected,
    select_many,
)
from dpai_jax.paths import Network
from dpai_jax.selection import Cut
from dpai_jax.tools import meshes
from dpai_jax.tools.signatures import Alike

PyTree = Any


class State(NamedTuple):
    """What the scores' steps hand on, a list over the layers each."""

    scores: list[Array]
    optimizer: Any


@meshes.program(
    like=lambda state, *_: (state, None),
    layers=lambda state, *_: state.scores,
    donate=(0,),
    by_numpy="exactly",
)
def take_step(
    net: Network,
    state: State,
    masks: list[Array],
    strengths: list[Array],
    exponents: list[Array],
    weights: tuple[Any, Any, Any],
    *,
    objective: Objective,
    update: Alike | None,
    parts: grouping.Parts = (),
) -> tuple[State, dict[str, Array]]:
    """Lines 6 to 8 of Algorithm 1: the state after a step, and what was measured at its masks."""
    directions, measured = direction(
        net, objective, weights, state.scores, masks, strengths, exponents
    )
    directions = grouping.together(directions, parts)
    return State(*moved(directions, state.scores, state.optimizer, update)), measured


class Share:
    """Problems of one network whose ascent is one program.

    Args:
      net: the traced network.
      scores: the layers' scores to start from, stacked; on one device or shared out.
      init: from scores to what the optimizer remembers at the start.
      keeps: for each problem the numbers to keep at each step, and at last.
      weights: for each problem α, β and γ.
      strengths, exponents: see `direction`, the same for all.
      settings: the others of `take_step`.
    """

    def __init__(
        self,
        net: Network,
        scores: list[Array],
        init: Alike,
        keeps: Sequence[list[Any]],
        weights: Sequence[tuple[Any, Any, Any]],
        strengths: list[Array],
        exponents: list[Array],
        settings: dict[str, Any],
    ):
        number, steps = len(keeps), len(keeps[0]) - 1
        self._net, self._settings, self._taken = net, settings, 0
        self._given = strengths, exponents, _stacked(weights)
        self._keeps = _stacked([_stacked(now) for now in zip(*keeps, strict=True)])
        keep, parts = jax.tree.map(lambda x: x[0], self._keeps), settings["parts"]
        kept = nothing_selected(number, keep, parts)
        # One number for all layers may be that of all weights, which need no search.
        if not isinstance(kept.found, Cut) or np.any(keep != net.size):
            kept = select_many(net, scores, keep, kept, parts=parts)
        measured: Any = {name: np.zeros((steps, number), of) for name, of in MEASURED.items()}
        self._now = _Ascent(State(scores, _init_many(net, scores, init=init)), kept, measured)

    def compile_ahead(self) -> None:
        """Starts to compile what `ascend` needs."""
        if not any(meshes.shardings_of(self._now.state.scores)):
            _ascend_many.ahead(self._net, *self._arguments(1), **self._settings)

    def ascend(self, last: int) -> dict[str, Array]:
        """Takes the steps until so many are taken.

        Returns:
          What was measured at the last step, of each problem.
        """
        self._now, numbers = _ascend_many(self._net, *self._arguments(last), **self._settings)
        self._taken = last
        return numbers

    def _arguments(self, last: int) -> tuple[Any, ...]:
        return self._now, self._keeps, np.int32(self._taken), np.int32(last), *self._given

    def ended(self) -> list[tuple[list[Array], list[Array], dict[str, np.ndarray]]]:
        """For each problem scores, masks and history; afterwards the share is of no use any more.

        Raises:
          ValueError: if scores are NaN.
        """
        (scores, _), (found, _), measured = self._now
        del self._now  # what the optimizer remembers is as large as all the rest
        masks = masks_of_many(self._net, scores, found) if isinstance(found, Cut) else found
        arrays = meshes.on_one_device((scores, masks))
        each = [_one_of(self._net, arrays, i) for i in range(len(scores[0]))]
        checks.not_diverged(self._net, arrays[0])
        history = jax.device_get(measured)
        histories = ({name: xs[:, i] for name, xs in history.items()} for i in range(len(each)))
        return [(*own, numbers) for own, numbers in zip(each, histories, strict=True)]


class _Ascent(NamedTuple):
    """What the steps of several problems hand on, stacked.

    Attributes:
      state: the scores, and what the optimizer remembers.
      kept: what is kept at the next step.
      measured: the history, zero where steps are still to come; (step, problem) each.
    """

    state: State
    kept: Selected
    measured: dict[str, Array]


@meshes.program(donate=(0,))
def _ascend_many(
    net: Network,
    ascent: _Ascent,
    keeps: Any,
    first: Array,
    last: Array,
    strengths: list[Array],
    exponents: list[Array],
    weights: Any,
    **settings: Any,
) -> tuple[_Ascent, dict[str, Array]]:
    """Takes the steps of several problems from `first` until before `last`; see `Share`."""

    def step(state: State, found: list[Array] | Cut, weights: Any) -> Any:
        masks = masks_of(net, state.scores, found)
        return take_step.fn(net, state, masks, strengths, exponents, weights, **settings)

    def after_a_step(now: tuple[Array, _Ascent]) -> tuple[Array, _Ascent]:
        t, (state, kept, measured) = now
        state, numbers = jax.vmap(step)(state, kept.found, weights)
        measured = {name: xs.at[t].set(numbers[name]) for name, xs in measured.items()}
        keep = jax.tree.map(lambda x: x[t + 1], keeps)
        kept = select_many.fn(net, state.scores, keep, kept, parts=settings["parts"])
        return t + 1, _Ascent(state, kept, measured)

    _, ascent = lax.while_loop(lambda now: now[0] < last, after_a_step, (first, ascent))
    return ascent, {name: xs[last - 1] for name, xs in ascent.measured.items()}


@meshes.program()
def _init_many(_: Network, scores: list[Array], *, init: Alike) -> Any:
    return jax.vmap(init)(scores)


@meshes.program()
def _one_of(_: Network, arrays: Any, i: Array) -> Any:
    """The arrays of one problem."""
    return jax.tree.map(lambda x: x[i], arrays)


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)
