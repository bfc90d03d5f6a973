"""DPaI: gradient ascent on scores that balances effective paths, nodes and kernels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dpai_jax import checks, counts, grouping
from dpai_jax.allocation import check_allocation, erk, global_threshold
from dpai_jax.methods import folded, noise
from dpai_jax.methods.ascending import Share, State, take_step
from dpai_jax.methods.balance import BALANCES, MEASURED, Objective, as_strengths
from dpai_jax.methods.base import Allocation, Problem, Pruned
from dpai_jax.methods.saliency import exponential
from dpai_jax.methods.selector import LargeSelector, Selector
from dpai_jax.paths import Network
from dpai_jax.selection import as_count
from dpai_jax.stages import chain_for
from dpai_jax.tools import meshes
from dpai_jax.tools.lanes import shares_of, side_by_side
from dpai_jax.tools.powers import largest_entry, power_of_two
from dpai_jax.tools.rows import ahead_by_groups, by_groups
from dpai_jax.tools.signatures import Alike

PyTree = Any

# By what a path counts: the product of this over its weights. Its scale matters where paths that
# pass a layer meet others that do not, as behind a shortcut.
_STRENGTHS: Mapping[str, Callable[[Array], Array] | None] = {
    "one": None,
    "magnitude": jnp.abs,
    "square": jnp.square,
}

# Strengths of layers whose largest is outside of this range are scaled to it.
_RANGE = 2.0**-60, 2.0**60

# Steps between two reports: reading a number waits for the device.
_REPORT_EVERY = 10


@dataclasses.dataclass(frozen=True)
class DPaI:
    """Differentiable Pruning at Initialization.

    Each of T steps keeps the weights of the highest scores, measures what each weight contributes
    to the balance of effective paths, nodes and kernels (see `ascent`), and moves the scores that
    way. By default paths are weighed by the magnitudes of their weights, the density falls from one
    to the one asked for, a score is the last contribution, and one threshold over all layers shares
    out the weights. `DPaI.published()` is the paper's Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((16, 32)), "out": jnp.ones((32, 4))}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 16)), 0.9, method=dpai.DPaI(steps=3))
      >>> result.topology.weights
      64

    Attributes:
      alpha: weight of effective nodes and kernels against paths, in [0, 1]; 0 optimises paths only.
      beta: weight of kernels against nodes, in [0, 1]; 0 leaves kernels out, and 1 nodes.
      balance: how nodes and kernels count, "even" or "indicator" (see `ascent`).
      gamma: how sharp the indicators of effective nodes and kernels are, positive (see `ascent`).
      strength: by what a path counts, the product over its weights of "one", of "magnitude" |θ|, or
        of "square" θ². In a layer whose weights are all zero each counts one.
      schedule: "falling", from dense to the density d asked for, step t keeping d^(t/T), where what
        a step has removed stays removed; or "constant", d at every step.
      counting: how paths are counted, "mean_field" or "exact" (see `dpai_jax.log_paths`).
      steps: the number of steps T.
      optimizer: moves the scores along the direction of `ascent`: any optax optimizer, such as
        `optax.sgd(η)`, the ascent of the paper's Algorithm 1. If None, the direction replaces them.
      normalize: whether the direction of each layer is first divided by its mean magnitude, so
        that `optax.sgd(0.01)` moves its scores by 0.01 a step on average.
      allocation: weights to keep, `allocation(net, sparsity)`: `dpai_jax.global_threshold` for one
        threshold over all layers, so that the ascent shares out the weights; `dpai_jax.erk`,
        `dpai_jax.uniform`, or any function that returns a pytree of the numbers for the layers.
      scores: pytree parallel to the parameters of the scores to start from. If not given, these are
        the weights' strengths, or drawn from N(0, 1) where the strength is "one".

    Raises:
      TypeError, ValueError: if a setting is of another type or out of its range.

    References:
      Xiang et al., DPaI: Differentiable Pruning at Initialization with Node-Path Balance
      Principle, ICLR 2025. Strengths and a falling density come from Tanaka et al., Pruning neural
      networks without any data by iteratively conserving synaptic flow, NeurIPS 2020.
    """

    alpha: float = 0.3
    beta: float = 0.5
    balance: str = "even"
    gamma: float = math.inf
    strength: str = "magnitude"
    schedule: str = "falling"
    counting: str = "mean_field"
    steps: int = 20
    optimizer: optax.GradientTransformation | None = None
    normalize: bool = False
    allocation: Allocation = global_threshold
    scores: PyTree = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            checks.number(name, getattr(self, name), *checks.FRACTION)
        checks.one_of("balance", self.balance, BALANCES)
        checks.number("gamma", self.gamma, *checks.POSITIVE)
        checks.one_of("strength", self.strength, _STRENGTHS)
        checks.one_of("schedule", self.schedule, _SCHEDULES)
        checks.one_of("counting", self.counting, counts.COUNTINGS)
        checks.whole("steps", self.steps, 1)
        if self.optimizer is not None:
            checks.optimizer("optimizer", self.optimizer)
        checks.flag("normalize", self.normalize)
        check_allocation(self.allocation)

    @classmethod
    def published(cls, **settings: Any) -> DPaI:
        """The published code's setting: ERK, exact counts, 3000 steps of Adam at 0.005.

        Args:
          **settings: what else to set, as the attributes.

        Returns:
          The method.
        """
        plain = {"alpha": 0.99, "balance": "indicator", "strength": "one", "schedule": "constant"}
        exact = {"counting": "exact", "allocation": erk}
        optimizer = {"optimizer": optax.adam(5e-3), "steps": 3000}
        return cls(**{**plain, **exact, **optimizer, **settings})

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network: Algorithm 1 (see `dpai_jax.prune`).

        Args:
          problem: the network and the sparsity.

        Returns:
          The masks and final scores; the history holds what was measured at the masks of each step.
        """
        net, keeps = problem.net, self._keeps(problem)
        parts = problem.granularity.parts(net)
        shapes = self._shapes(problem, jnp.float32)
        selector = self._selector(net, shapes, keeps[0], parts)
        if not self._is_one_number(parts):
            selector.compile_ahead(shapes, keeps[0], len(keeps))
        strengths, exponents = self._strengths(problem)
        scores = self._start(problem, strengths, exponents)
        weights, settings = self._weights(), self._settings(parts)
        steps, init = self._folded(net, scores, parts), self._init
        on_device = jax.device_put(weights)
        kept: list[Array] = []
        # Where the density falls the first number is that of all weights, if all can be effective.
        first = sum(map(np.sum, jax.device_get(jax.tree.leaves(keeps[0]))))
        everything = keeps[0] if first == net.size else None
        factors = [] if self._weighs_kept else strengths
        state = State(scores, init(scores) if steps is None else steps.memory(scores, init))

        def step(t: int) -> dict[str, Array]:
            nonlocal state, kept
            keep = keeps[t]
            if not self._weighs_kept:
                masks = selector.masks(state.scores, keep)
            elif keep is everything:
                masks = strengths
            else:
                kept = kept or by_groups(_copied, net, strengths)
                kept = masks = selector.weighed(kept, strengths, state.scores, keep)
            if steps is None:
                state, numbers = take_step(
                    net, state, masks, factors, exponents, weights, **settings
                )
            else:
                *after, numbers = steps(*state, masks, factors, exponents, on_device)
                state = State(*after)
            return numbers

        measured, reports = [], set(_reports(self.steps))
        for t in range(self.steps):
            measured.append(step(t))
            if t + 1 in reports:
                numbers = jax.tree.map(np.mean, jax.device_get(measured[-1]))
                problem.report(t + 1, self.steps, numbers)
        scores = state.scores
        del state  # what the optimizer remembers is as large as all the rest
        masks = selector.masks(scores, keeps[-1])
        found = jax.device_get(measured)
        history = {name: np.asarray([numbers[name] for numbers in found]) for name in MEASURED}
        return _pruned(scores, masks, history)

    @property
    def together(self) -> Hashable:
        """Methods of which this is equal can be run by one program (see `run_many`)."""
        if self.scores is not None or (self.optimizer is not None and _counts_steps(self._init)):
            return object()  # equal to nothing else
        functions = Alike(self.allocation), Alike(self._init)
        return functions, self.schedule, self.strength, self.steps, *self._settings().items()

    @staticmethod
    def run_many(methods: Sequence[DPaI], problems: Sequence[Problem]) -> list[Pruned]:
        """Prunes a network in several ways by one program (see `dpai_jax.prune_many`).

        Args:
          methods: a method for each problem, whose `together` is equal.
          problems: the problems, of one network on one device.

        Returns:
          What `run` returns for each.
        """
        method, net, steps = methods[0], problems[0].net, methods[0].steps
        strengths = method._strengths(problems[0])
        settings = method._settings(problems[0].granularity.parts(net))
        # Worked out once for problems of one sparsity.
        keeps = {s: method._keeps(p) for s, p in {p.sparsity: p for p in problems}.items()}
        shares = [
            Share(
                net,
                method._starts([problems[i] for i in own], *strengths),
                Alike(method._init),
                [keeps[problems[i].sparsity] for i in own],
                [methods[i]._weights() for i in own],
                *strengths,
                settings,
            )
            for own in shares_of(range(len(problems)), of_one_size=True)
        ]
        shares[0].compile_ahead()

        def show(last: int, each: list[dict[str, Array]]) -> None:
            found = jax.device_get(each)
            means = {name: np.mean([numbers[name] for numbers in found]) for name in MEASURED}
            problems[0].report(last, steps, means)

        before: list[Any] = []
        for last in _reports(steps):
            each = side_by_side(functools.partial(Share.ascend, last=last), shares)
            if before:  # shown while the steps after it are under way
                show(*before)
            before = [last, each]
        show(*before)
        ended = itertools.chain(*side_by_side(Share.ended, shares))
        return [_pruned(*found) for found in ended]

    def compile_ahead(self, problem: Problem) -> None:
        """Starts to compile what `run` needs."""
        net, shapes = problem.net, self._shapes(problem, jnp.float32)
        parts, init = problem.granularity.parts(net), self._init
        strength = _STRENGTHS[self.strength]
        strengths: list[Any] = shapes if strength else []
        if strength:
            given = net.leaves(problem.params)
            ahead_by_groups(_strengths_of, net, given, strength=strength)
        exponents = [jax.ShapeDtypeStruct((), jnp.int32) for _ in strengths]
        steps = self._folded(net, shapes, parts)
        start = init if steps is None else functools.partial(steps.memory, init=init)
        state = State(shapes, jax.eval_shape(start, shapes))
        masks, weights = self._shapes(problem, bool), self._weights()
        args = (shapes, [], exponents) if self._weighs_kept else (masks, strengths, exponents)
        if steps is None:
            settings = self._settings(parts)
            take_step.ahead(net, state, *args, weights, calls=self.steps, **settings)
        else:
            steps(*state, *args, weights, ahead=self.steps)
        number, is_one = as_count(0), self._is_one_number(parts)  # any number
        keep = number if is_one else [number] * len(shapes)
        selector = self._selector(net, shapes, keep, parts)
        if is_one:
            selector.compile_ahead(shapes, number, self.steps + 1)
        if self._weighs_kept:
            selector.weigh_ahead(shapes, self.steps)
        if self.scores is None and not strengths:
            noise.compile_ahead(net, problem.key, problem.params)

    @staticmethod
    def _selector(
        net: Network, scores: list[Any], keep: Any, parts: grouping.Parts
    ) -> Selector | LargeSelector:
        if LargeSelector.serves(net, scores, keep, parts):
            return LargeSelector(net)
        return Selector(net, scores, keep, parts)

    def _folded(
        self, net: Network, scores: list[Any], parts: grouping.Parts
    ) -> folded.Steps | None:
        """The steps block by block, if the network repeats itself and layers go each by itself."""
        calls = chain_for(net, scores, counts.COUNTINGS[self.counting], 1.0)
        by_array = self.optimizer is None or folded.goes_by_array(self.optimizer)
        if not calls or parts or not by_array:
            return None
        settings = self._settings()
        return folded.Steps(net, calls, settings["objective"], settings["update"])

    @staticmethod
    def _shapes(problem: Problem, dtype: Any) -> Any:
        """The layers' shapes, sharded like the weights."""
        return meshes.shapes_like(problem.net.leaves(problem.params), dtype)

    def _settings(self, parts: grouping.Parts = ()) -> dict[str, Any]:
        """What a step is compiled for."""
        falls, sharp = self.schedule == "falling", math.isinf(self.gamma)
        objective = Objective(self.balance, self.counting, self.normalize, sharp, falls)
        update = None if self.optimizer is None else Alike(self.optimizer.update)
        return {"objective": objective, "update": update, "parts": parts}

    def _is_one_number(self, parts: grouping.Parts) -> bool:
        """Whether the number to keep is one for all layers, as is known before it is worked out."""
        return self.allocation is global_threshold and not parts

    @property
    def _weighs_kept(self) -> bool:
        """Whether steps take the strengths of kept weights alone, as the others do not move."""
        return self.schedule == "falling" and _STRENGTHS[self.strength] is not None

    @property
    def _init(self) -> Callable[[Any], Any]:
        """From scores to what the optimizer remembers at the start; nothing without one."""
        return (self.optimizer or optax.identity()).init

    def _weights(self) -> tuple[Any, Any, Any]:
        return np.float32(self.alpha), np.float32(self.beta), np.float32(self.gamma)

    def _keeps(self, problem: Problem) -> list[Any]:
        """The numbers of weights to keep at each step, and at last."""
        sparsities = _SCHEDULES[self.schedule](problem.sparsity, self.steps)
        # A constant density is resolved once, not once a step.
        found = {s: jax.tree.map(as_count, problem.keep(self.allocation, s)) for s in {*sparsities}}
        return [found[s] for s in sparsities]

    def _strengths(self, problem: Problem) -> tuple[list[Array], list[Array]]:
        """By what weights multiply a path (see `balance.direction`); empty lists if by one."""
        strength = _STRENGTHS[self.strength]
        if strength is None:
            return [], []
        pairs = by_groups(_strengths_of, problem.net, problem.weights(), strength=strength)
        strengths, exponents = map(list, zip(*pairs, strict=True))
        return strengths, exponents

    def _start(
        self, problem: Problem, strengths: list[Array], exponents: list[Array]
    ) -> list[Array]:
        """The scores to start from; zero, the lowest magnitude, where no mask is effective.

        Those of a group are equal, and stay so.
        """
        net, parts = problem.net, problem.granularity.parts(problem.net)
        drawn = self.scores is None and not strengths
        if drawn:
            scores = noise.normal_scores(net, problem.key, problem.params)
        elif self.scores is None and self.optimizer is None and self._weighs_kept:
            scores = by_groups(_copied, net, strengths)  # all are kept, and signs alone matter
        elif self.scores is None:
            scores = by_groups(_products, net, strengths, exponents)
        else:
            scores = [jnp.array(s, jnp.float32) for s in checks.scores(net, self.scores)]
            scores = meshes.device_put_like(scores, net.leaves(problem.params))
        scores = counts.rank_last(net, scores, 0.0)
        return _together(net, scores, parts=parts, drawn=drawn) if parts else scores

    def _starts(
        self, problems: Sequence[Problem], strengths: list[Array], exponents: list[Array]
    ) -> list[Array]:
        """The scores that several problems start from, stacked and shared out."""
        net, number = problems[0].net, len(problems)
        if strengths:
            start = self._start(problems[0], strengths, exponents)
            return meshes.shared_out(_repeated(net, start, number=number), number)
        parts = problems[0].granularity.parts(net)
        scores = noise.normal_scores_of_many(net, [problem.key for problem in problems])
        scores = counts.rank_last(net, scores, 0.0)
        if parts:
            scores = _drawn_together_many(net, scores, parts=parts)
        return meshes.shared_out(scores, number)


@meshes.program(
    like=lambda weights: [(weight, None) for weight in weights],
    layers=lambda weights: weights,
    by_numpy="exactly",
)
def _strengths_of(
    _: Network | None, weights: list[Array], *, strength: Callable[[Array], Array]
) -> list[tuple[Array, Array]]:
    """The strengths of each layer's weights; one if all its weights are zero."""

    @jax.jit
    def strengths(weight: Array) -> tuple[Array, Array]:
        found = jnp.minimum(strength(weight.astype(jnp.float32)), np.finfo(np.float32).max)
        largest = largest_entry(found)
        most = jnp.where(largest > 0, jnp.clip(largest, *_RANGE), 1.0)
        scale = most / jnp.where(largest > 0, largest, 1.0)
        return as_strengths(jnp.where(largest > 0, found * scale, 1.0), most)

    return list(map(strengths, weights))


@meshes.program(like=lambda arrays: arrays, layers=lambda arrays: arrays, by_numpy="exactly")
def _copied(_: Network | None, arrays: list[Array]) -> list[Array]:
    """The same arrays in memory of their own."""
    return list(map(jnp.copy, arrays))


@meshes.program(
    like=lambda strengths, _: strengths, layers=lambda strengths, _: strengths, by_numpy="exactly"
)
def _products(_: Network | None, strengths: list[Array], exponents: list[Array]) -> list[Array]:
    """Strengths times powers of two."""
    return [x * power_of_two(n) for x, n in zip(strengths, exponents, strict=True)]


def _falling(sparsity: float, steps: int) -> list[float]:
    """The sparsities at each of T steps, from none on, and after the last."""
    return [0.0, *exponential(sparsity, steps)]


def _constant(sparsity: float, steps: int) -> list[float]:
    return [sparsity] * (steps + 1)


_SCHEDULES: Mapping[str, Callable[[float, int], list[float]]] = {
    "falling": _falling,
    "constant": _constant,
}


def _reports(steps: int) -> list[int]:
    """After how many steps progress is shown."""
    return sorted({*range(1, steps, _REPORT_EVERY), steps})


def _counts_steps(init: Callable[[Any], Any]) -> bool:
    """Whether an optimizer remembers a number of steps.

    What is worked out from it, such as Adam's corrections, XLA rounds otherwise for one problem
    than for many.
    """
    memory = jax.eval_shape(init, [jax.ShapeDtypeStruct((2,), jnp.float32)])
    return any(x.ndim == 0 for x in jax.tree.leaves(memory))


def _pruned(scores: list[Array], masks: list[Array], history: Mapping[str, np.ndarray]) -> Pruned:
    return Pruned(masks, scores, history, rank=lambda: [jnp.abs(s) for s in scores])


@meshes.program(like=lambda scores: scores, layers=lambda scores: scores)
def _together(
    _: Network, scores: list[Array], *, parts: grouping.Parts, drawn: bool
) -> list[Array]:
    """One score for each group."""
    return (grouping.drawn_together if drawn else grouping.together)(scores, parts)


@meshes.program()
def _drawn_together_many(_: Network, scores: list[Array], *, parts: grouping.Parts) -> Any:
    return jax.vmap(functools.partial(grouping.drawn_together, parts=parts))(scores)


@meshes.program()
def _repeated(_: Network, arrays: list[Array], *, number: int) -> list[Array]:
    return [jnp.broadcast_to(x, (number, *x.shape)) for x in arrays]
