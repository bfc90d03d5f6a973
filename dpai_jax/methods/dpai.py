"""DPaI: gradient ascent on scores that balances effective paths, nodes and kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dpai_jax import checks, counts, selection
from dpai_jax.allocation import check_allocation, erk, keep_of_layers
from dpai_jax.methods import noise
from dpai_jax.methods.base import Allocation, Problem, Pruned, Report
from dpai_jax.methods.saliency import exponential
from dpai_jax.paths import Network
from dpai_jax.selection import as_count
from dpai_jax.tools import meshes
from dpai_jax.tools.rows import Group, are_small, groups_of, in_order, sums_of
from dpai_jax.tools.signatures import Alike
from dpai_jax.tools.sums import sum_over, sum_taps, written_out
from dpai_jax.tools.switches import usual_switches

PyTree = Any

# A score becomes the direction itself, s ← s + (d − s): weights are scored anew at each step.
RESCORE = optax.chain(optax.add_decayed_weights(1.0), optax.sgd(1.0))

# By what a path counts: the product of this over its weights.
_STRENGTHS: Mapping[str, Callable[[Array], Array] | None] = {
    "one": None,
    "magnitude": jnp.abs,
    "square": jnp.square,
}

# Steps between two reports: reading a number waits for the device.
_REPORT_EVERY = 10


@usual_switches()
def ascent(
    net: Network,
    scores: PyTree,
    keep: PyTree | int,
    alpha: float = 0.99,
    beta: float = 0.5,
    gamma: float = math.inf,
    counting: str = "exact",
) -> PyTree:
    """The direction in which one step of DPaI moves the scores.

    With m = top-k(|s|) in each layer and g = ∂ log R_P/∂m · sign(s), the straight-through gradient,

        d = (1 − α)·g + α·((1 − β)·g·[node ineffective] + β·g·[kernel ineffective]).

    A node is effective by the indicator tanh(γ·N) of N = Σ m·∂ log R_P/∂m over its incoming
    weights, the share of all paths that pass it, and a kernel by that over its taps. The bracket is
    the indicator's slope up to the factor γ, 1 − tanh²(γ·N); for γ → ∞ one where N = 0, else zero.
    Pure, and jittable with `net` static.

    Args:
      net: the traced network.
      scores: pytree of scores parallel to the parameters.
      keep: pytree of the number of weights to keep per layer (see `dpai_jax.erk`), or one number
        for all layers together.
      alpha: weight of nodes and kernels against paths, in [0, 1].
      beta: weight of kernels against nodes, in [0, 1].
      gamma: how sharp the indicators are, positive.
      counting: "exact" or "mean_field" (see `dpai_jax.log_paths`).

    Returns:
      Pytree like `scores`; zero where nothing can be pruned.

    Raises:
      ValueError: if the scores or `keep` do not fit the network, or `counting` is unknown.

    References:
      DPaI (ICLR 2025), Algorithm 1, lines 5 to 8.
    """
    leaves = checks.scores(net, scores)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, jax.core.Tracer):
            checks.number(name, value, *checks.FRACTION)
    if not isinstance(gamma, jax.core.Tracer):
        checks.number("gamma", gamma, *checks.POSITIVE)
    checks.one_of("counting", counting, counts.COUNTINGS)
    weights: tuple[Any, Any, Any] = (alpha, beta, gamma)
    sharp = not isinstance(weights[2], jax.core.Tracer) and math.isinf(gamma)
    objective = Objective(counting, normalize=False, sharp=sharp)

    def run(scores: list[Array], keep: list[Array] | Array) -> list[Array]:
        masks, _ = selection.select(scores, keep, magnitude=True)
        return direction(net, objective, weights, scores, masks)[0]

    numbers = keep_of_layers(net, keep)
    directions = meshes.auto_sharded(run, leaves, numbers, like=leaves)
    return net.tree(directions, lambda: np.float32(0))


class Objective(NamedTuple):
    """What the scores ascend (see `ascent`).

    Attributes:
      counting: as in `ascent`.
      normalize: whether the direction of each layer is divided by its mean magnitude.
      sharp: whether γ is infinite, and so the indicators only tell what has any path.
      falls: whether only weights that are kept are moved, as the density falls.
    """

    counting: str
    normalize: bool
    sharp: bool
    falls: bool = False


def direction(
    net: Network,
    objective: Objective,
    weights: tuple[Any, Any, Any],
    scores: list[Array],
    masks: list[Array],
    strengths: Sequence[Array] = (),
) -> tuple[list[Array], dict[str, Array]]:
    """Algorithm 1, lines 6 to 8: the direction d at the masks of the scores (see `ascent`).

    Args:
      net: the traced network.
      objective: what to ascend.
      weights: α, β and γ.
      scores: a float32 array of each layer's shape.
      masks: the boolean masks of the scores.
      strengths: by what each weight multiplies a path, in [0, 1]; by one if not given.

    Returns:
      The layers' directions, and what was measured: `log_paths`, `nodes` and `kernels`.
    """
    counting, normalize, sharp, falls = objective

    def count(floats: list[Array]) -> Array:
        if strengths:
            floats = [m * s for m, s in zip(floats, strengths, strict=True)]
        return counts.log_count(net, floats, counting, below=1.0)

    log_paths, gradients = jax.value_and_grad(count)([m.astype(jnp.float32) for m in masks])
    if falls:  # what was removed stays removed
        gradients = [jnp.where(m, g, 0.0) for m, g in zip(masks, gradients, strict=True)]
    slopes, sizes, open_kernels = zip(
        *(
            _slopes((layer.inputs, layer.taps), sharp, weights, m, g)
            for layer, m, g in zip(net.layers, masks, gradients, strict=True)
        ),
        strict=True,
    )
    if normalize:
        slopes = tuple(
            slope * jnp.where(mean > 0, 1 / mean, 0.0)
            for slope, mean in zip(slopes, _means(net, masks, sizes), strict=True)
        )
    directions = [
        slope * g * jnp.sign(s) for slope, g, s in zip(slopes, gradients, scores, strict=True)
    ]
    kernels = jnp.concatenate([x.ravel() for x in open_kernels]).astype(jnp.uint32)
    measured = {
        "log_paths": log_paths,
        "nodes": jnp.sum(kernels > 0, dtype=jnp.uint32),
        "kernels": jnp.sum(kernels, dtype=jnp.uint32),
    }
    return directions, measured


# Traced once for layers of one shape.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _slopes(
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    sharp: bool,
    weights: tuple[Any, Any, Any],
    mask: Array,
    gradient: Array,
) -> tuple[Array, Array, Array]:
    """By what a layer's gradient is multiplied, its products summed over taps, and open kernels.

    Args:
      axes: those of the input features and of the taps.
      sharp: see `Objective`.
      weights: α, β and γ.
      mask: the layer's mask.
      gradient: ∂ log R_P/∂m.

    Returns:
      The factors, and the sums, of which the taps have size one; and of the effective kernels of
      each node the number, of which the input features have size one, too.
    """
    (alpha, beta, gamma), (inputs, taps) = weights, axes
    kernel = sum_taps(jnp.where(mask, gradient, 0.0), taps)
    # Sums over taps are read more than once; where there are none, they cost nothing.
    kernel, again = written_out(kernel) if taps else (kernel, kernel)
    open_kernels = jnp.sum((kernel > 0).astype(jnp.float32), inputs, keepdims=True)
    if sharp:
        of_node, of_kernel = (jnp.where(x > 0, 0.0, 1.0) for x in (open_kernels, again))
    else:
        node = jnp.sum(kernel, inputs, keepdims=True)
        of_node, of_kernel = (1 - jnp.square(jnp.tanh(gamma * x)) for x in (node, again))
    slope = (1 - alpha) + alpha * ((1 - beta) * of_node + beta * of_kernel)
    return slope, slope * sum_taps(gradient, taps), open_kernels


def _means(net: Network, masks: list[Array], sizes: Sequence[Array]) -> list[Array]:
    """The mean magnitude of each layer's direction, of each copy of it, from sums over taps."""
    small = are_small(masks)
    plain = [i for i, layer in enumerate(net.layers) if not layer.stack]
    sums = sums_of([sizes[i] for i in plain], [small[i] for i in plain])
    totals = dict(zip(plain, sums, strict=True))
    means = []
    for i, (layer, x) in enumerate(zip(net.layers, sizes, strict=True)):
        copy = tuple(axis for axis in range(x.ndim) if axis not in layer.stack)
        total = totals[i] if i in totals else sum_over(x, copy)
        means.append(total * (layer.copies / layer.size))
    return means


class _State(NamedTuple):
    """What the scores' steps hand on, a list over the layers each."""

    scores: list[Array]
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class DPaI:
    """Differentiable Pruning at Initialization.

    Each of T steps keeps the weights of the highest scores, measures what each weight contributes
    to the balance of effective paths, nodes and kernels (see `ascent`), and moves the scores that
    way. By default paths are weighed by the magnitudes of their weights, the density falls from one
    to the one asked for, and a score is the last contribution. `DPaI.published()` is the paper's
    Algorithm 1.

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
      gamma: how sharp the indicators of effective nodes and kernels are, positive (see `ascent`).
      strength: by what a path counts, the product over its weights of "one", of "magnitude" |θ|, or
        of "square" θ². In a layer whose weights are all zero each counts one.
      schedule: "falling", from dense to the density d asked for, step t keeping d^(t/T), where what
        a step has removed stays removed; or "constant", d at every step.
      counting: how paths are counted, "mean_field" or "exact" (see `dpai_jax.log_paths`).
      steps: the number of steps T.
      optimizer: moves the scores along the direction of `ascent`: any optax optimizer. The default
        replaces them by it. `optax.sgd(η)` is the ascent of the paper's Algorithm 1.
      normalize: whether the direction of each layer is first divided by its mean magnitude, so
        that `optax.sgd(0.01)` moves its scores by 0.01 a step on average.
      allocation: weights to keep, `allocation(net, sparsity)`: `dpai_jax.erk`, `dpai_jax.uniform`,
        any function that returns a pytree of the numbers for the layers, or
        `dpai_jax.global_threshold` for one threshold over all layers.
      scores: pytree parallel to the parameters of the scores to start from. If not given, these are
        the weights' strengths, or drawn from N(0, 1) where the strength is "one".

    Raises:
      TypeError, ValueError: if a setting is of another type or out of its range.

    References:
      Xiang et al., DPaI: Differentiable Pruning at Initialization with Node-Path Balance
      Principle, ICLR 2025. Strengths and a falling density come from Tanaka et al., Pruning neural
      networks without any data by iteratively conserving synaptic flow, NeurIPS 2020.
    """

    alpha: float = 0.99
    beta: float = 0.5
    gamma: float = math.inf
    strength: str = "magnitude"
    schedule: str = "falling"
    counting: str = "mean_field"
    steps: int = 100
    optimizer: optax.GradientTransformation = RESCORE
    normalize: bool = False
    allocation: Allocation = erk
    scores: PyTree = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            checks.number(name, getattr(self, name), *checks.FRACTION)
        checks.number("gamma", self.gamma, *checks.POSITIVE)
        checks.one_of("strength", self.strength, _STRENGTHS)
        checks.one_of("schedule", self.schedule, _SCHEDULES)
        checks.one_of("counting", self.counting, counts.COUNTINGS)
        checks.whole("steps", self.steps, 1)
        checks.optimizer("optimizer", self.optimizer)
        checks.flag("normalize", self.normalize)
        check_allocation(self.allocation)

    @classmethod
    def published(cls, **settings: Any) -> DPaI:
        """The published code's setting: exact counts, 3000 steps of Adam at 0.005.

        Args:
          **settings: what else to set, as the attributes.

        Returns:
          The method.
        """
        plain = {"strength": "one", "schedule": "constant", "counting": "exact"}
        return cls(**{**plain, "optimizer": optax.adam(5e-3), "steps": 3000, **settings})

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network: Algorithm 1 (see `dpai_jax.prune`).

        Args:
          problem: the network and the sparsity.

        Returns:
          The masks and final scores; the history holds what was measured at the masks of each step.
        """
        net, keeps = problem.net, self._keeps(problem)
        selector = _Selector(net, self._shapes(problem, jnp.float32), keeps[0])
        strengths = self._strengths(problem)
        scores = self._start(problem, strengths)
        weights, settings = self._weights(), self._settings()
        state = _State(scores, self.optimizer.init(scores))
        state, masks, history = _ascend(
            lambda state, masks: _step(net, state, masks, strengths, weights, **settings),
            state,
            selector,
            keeps,
            problem.report,
        )
        return _pruned(state.scores, masks, history)

    @property
    def together(self) -> Hashable:
        """Methods of which this is equal can be run by one program (see `run_many`)."""
        memory = jax.eval_shape(self.optimizer.init, [jax.ShapeDtypeStruct((2,), jnp.float32)])
        # What is worked out from a number of steps, such as Adam's corrections, XLA rounds
        # otherwise for one problem than for many.
        if self.scores is not None or any(x.ndim == 0 for x in jax.tree.leaves(memory)):
            return object()  # equal to nothing else
        functions = Alike(self.allocation), Alike(self.optimizer.init)
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
        method, first, number = methods[0], problems[0], len(problems)
        net, many = first.net, (number,)
        each = [m._keeps(problem) for m, problem in zip(methods, problems, strict=True)]
        keeps = [jax.tree.map(lambda *xs: np.stack(xs), *now) for now in zip(*each, strict=True)]
        weights = tuple(map(np.stack, zip(*(m._weights() for m in methods), strict=True)))
        settings, init = method._settings(), Alike(method.optimizer.init)
        strengths = method._strengths(first)
        if strengths:
            scores = [
                jnp.broadcast_to(s, (number, *s.shape)) for s in method._start(first, strengths)
            ]
        else:
            scores = noise.normal_scores_of_many(net, [problem.key for problem in problems])
            scores = counts.rank_last(net, scores, 0.0)
        scores = meshes.shared_out(scores, number)
        state, masks, history = _ascend(
            lambda state, masks: _step_many(net, state, masks, strengths, weights, **settings),
            _State(scores, _init_many(net, scores, init=init)),
            _Selector(net, scores, keeps[0], many),
            keeps,
            first.report,
        )
        found = meshes.on_one_device([state.scores, masks])
        return [
            _pruned(*_taken(net, found, i), {name: x[:, i] for name, x in history.items()})
            for i in range(number)
        ]

    def compile_ahead(self, problem: Problem) -> None:
        """Starts to compile what `run` needs."""
        net, shapes = problem.net, self._shapes(problem, jnp.float32)
        state = _State(shapes, jax.eval_shape(self.optimizer.init, shapes))
        masks = self._shapes(problem, bool)
        strengths = shapes if _STRENGTHS[self.strength] else []
        _step.ahead(net, state, masks, strengths, self._weights(), **self._settings())
        if self.scores is None and not strengths:
            noise.compile_ahead(net, problem.key, problem.params)

    @staticmethod
    def _shapes(problem: Problem, dtype: Any) -> Any:
        """The layers' shapes, sharded like the weights."""
        return meshes.shapes_like(problem.net.leaves(problem.params), dtype)

    def _settings(self) -> dict[str, Any]:
        """What a step is compiled for."""
        falls = self.schedule == "falling"
        objective = Objective(self.counting, self.normalize, math.isinf(self.gamma), falls)
        return {"objective": objective, "update": Alike(self.optimizer.update)}

    def _weights(self) -> tuple[Any, Any, Any]:
        return np.float32(self.alpha), np.float32(self.beta), np.float32(self.gamma)

    def _keeps(self, problem: Problem) -> list[Any]:
        """The numbers of weights to keep at each step, and at last."""
        sparsities = _SCHEDULES[self.schedule](problem.sparsity, self.steps)
        return [jax.tree.map(as_count, problem.keep(self.allocation, s)) for s in sparsities]

    def _strengths(self, problem: Problem) -> list[Array]:
        """By what each weight multiplies a path, at most one; an empty list if by one."""
        strength = _STRENGTHS[self.strength]
        return [] if strength is None else [_strength(strength, w) for w in problem.weights()]

    def _start(self, problem: Problem, strengths: list[Array]) -> list[Array]:
        """The scores to start from; zero, the lowest magnitude, where no mask is effective."""
        net = problem.net
        if self.scores is not None:
            scores = [jnp.array(s, jnp.float32) for s in checks.scores(net, self.scores)]
            scores = meshes.device_put_like(scores, net.leaves(problem.params))
        elif strengths:
            scores = list(map(jnp.copy, strengths))  # a step takes the memory of its scores
        else:
            scores = noise.normal_scores(net, problem.key, problem.params)
        return counts.rank_last(net, scores, 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _strength(strength: Callable[[Array], Array], weight: Array) -> Array:
    """The strengths of a layer's weights, the largest of them one."""
    found = strength(weight.astype(jnp.float32))
    largest = jnp.max(found)
    return jnp.where(largest > 0, found / jnp.where(largest > 0, largest, 1.0), 1.0)


def _falling(sparsity: float, steps: int) -> list[float]:
    """The sparsities at each of T steps, from none on, and after the last."""
    return [0.0, *exponential(sparsity, steps)]


def _constant(sparsity: float, steps: int) -> list[float]:
    return [sparsity] * (steps + 1)


_SCHEDULES: Mapping[str, Callable[[float, int], list[float]]] = {
    "falling": _falling,
    "constant": _constant,
}


def _ascend(
    step: Callable[[_State, list[Array]], tuple[_State, dict[str, Array]]],
    state: _State,
    selector: _Selector,
    keeps: list[Any],
    report: Report,
) -> tuple[_State, list[Array], dict[str, np.ndarray]]:
    """Algorithm 1, lines 4 to 8, of one problem or of many side by side: masks and history."""
    measured: list[dict[str, Any]] = []
    steps = len(keeps) - 1
    for t, keep in enumerate(keeps[:-1]):
        masks = selector.masks(state.scores, keep)
        state, numbers = step(state, masks)
        del masks  # before there are new ones
        measured.append(numbers)
        if t % _REPORT_EVERY == 0 or t == steps - 1:
            report(t + 1, steps, jax.tree.map(np.mean, jax.device_get(numbers)))
    state = _State(state.scores, None)  # what the optimizer remembers is as large as all the rest
    masks = selector.masks(state.scores, keeps[-1])
    history = jax.tree.map(lambda *xs: np.asarray(xs), *jax.device_get(measured))
    return state, masks, history


def _pruned(scores: list[Array], masks: list[Array], history: dict[str, np.ndarray]) -> Pruned:
    return Pruned(masks, scores, history, lambda: [jnp.abs(s) for s in scores])


class _Selector:
    """Line 5 of Algorithm 1: selects the weights of the highest magnitudes, again and again.

    Args:
      net: the traced network.
      scores: the layers' scores, or their shapes.
      keep: numbers to keep, of the structure of all that come.
      many: the number of problems side by side, if there are several.
    """

    def __init__(
        self, net: Network, scores: list[Any], keep: list[Array] | Array, many: tuple[int, ...] = ()
    ):
        self.many = many
        # One threshold for all layers is found in all of them.
        together = many or not isinstance(keep, list)
        everything = [Group(net, list(range(len(scores))))]
        self._groups = everything if together else groups_of(net, scores)
        numbers = self._numbers(keep)
        sizes = [sum(map(np.size, jax.tree.leaves(each))) for each in numbers]
        self._thresholds = [
            jnp.zeros((*many, 2, size // math.prod(many)), jnp.uint32) for size in sizes
        ]
        if not many:
            for group, *args in zip(self._groups, numbers, self._thresholds, strict=True):
                _select.ahead(group.owner, group.of(scores), *args)

    def _numbers(self, keep: Any) -> list[Any]:
        return [g.of(keep) if isinstance(keep, list) else keep for g in self._groups]

    def masks(self, scores: list[Array], keep: Any) -> list[Array]:
        """The masks of the scores."""
        select, found = _select_many if self.many else _select, []
        for i, (group, numbers) in enumerate(zip(self._groups, self._numbers(keep), strict=True)):
            masks, self._thresholds[i] = select(
                group.owner, group.of(scores), numbers, self._thresholds[i]
            )
            found.append(masks)
        return in_order(self._groups, found)


@meshes.program(like=lambda scores, *_: (scores, None), layers=lambda scores, *_: scores)
def _select(
    _: Network | None, scores: list[Array], keep: list[Array] | Array, thresholds: Array
) -> tuple[list[Array], Array]:
    """The masks of the scores, and the last two thresholds."""
    # Extrapolate linearly from the last two thresholds.
    before, near = thresholds[:1], thresholds[1:]
    masks, found = selection.select(scores, keep, near + (near - before), magnitude=True)
    return masks, jnp.concatenate([near, found])


@meshes.program(
    like=lambda state, *_: (state, None), layers=lambda state, *_: state.scores, donate=(0,)
)
def _step(
    net: Network,
    state: _State,
    masks: list[Array],
    strengths: list[Array],
    weights: tuple[Any, Any, Any],
    *,
    objective: Objective,
    update: Alike,
) -> tuple[_State, dict[str, Array]]:
    """Lines 6 to 8 of Algorithm 1."""
    directions, measured = direction(net, objective, weights, state.scores, masks, strengths)
    descent = jax.tree.map(jnp.negative, directions)
    # Some of optax's optimizers mix dtypes, which a user's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, memory = update(descent, state.optimizer, state.scores)
    return _State(optax.apply_updates(state.scores, updates), memory), measured


@meshes.program()
def _select_many(
    net: Network | None, scores: list[Array], keep: list[Array] | Array, thresholds: Array
) -> Any:
    return jax.vmap(functools.partial(_select.fn, net))(scores, keep, thresholds)


@meshes.program(donate=(0,))
def _step_many(
    net: Network,
    state: _State,
    masks: list[Array],
    strengths: list[Array],
    weights: Any,
    **settings: Any,
) -> Any:
    step = functools.partial(_step.fn, net, **settings)
    return jax.vmap(step, in_axes=(0, 0, None, 0))(state, masks, strengths, weights)


@meshes.program()
def _init_many(_: Network, scores: list[Array], *, init: Alike) -> Any:
    return jax.vmap(init)(scores)


@meshes.program()
def _taken(_: Network, arrays: Any, i: Array) -> Any:
    """One of the problems' arrays."""
    return jax.tree.map(lambda x: x[i], arrays)
