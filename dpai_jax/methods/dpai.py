"""DPaI: gradient ascent on scores that balances effective paths, nodes and kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dpai_jax import checks, counts, grouping, selection
from dpai_jax.allocation import check_allocation, erk, keep_of_layers
from dpai_jax.methods import noise
from dpai_jax.methods.base import Allocation, Problem, Pruned, Report
from dpai_jax.paths import Network
from dpai_jax.selection import as_count
from dpai_jax.tools import meshes
from dpai_jax.tools.rows import Group, are_small, groups_of, in_order, sums_of
from dpai_jax.tools.signatures import Alike
from dpai_jax.tools.sums import sum_over, sum_taps, written_out
from dpai_jax.tools.switches import usual_switches

PyTree = Any

_ASCENT = optax.sgd(0.01)

# Steps between two looks at the numbers: reading one waits for the device.
_READ_EVERY = 10


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
    """

    counting: str
    normalize: bool
    sharp: bool


def direction(
    net: Network,
    objective: Objective,
    weights: tuple[Any, Any, Any],
    scores: list[Array],
    masks: list[Array],
) -> tuple[list[Array], dict[str, Array]]:
    """Algorithm 1, lines 6 to 8: the direction d at the masks of the scores (see `ascent`).

    Args:
      net: the traced network.
      objective: what to ascend.
      weights: α, β and γ.
      scores: a float32 array of each layer's shape.
      masks: the boolean masks of the scores.

    Returns:
      The layers' directions, and what was measured: `log_paths`, `nodes` and `kernels`.
    """
    counting, normalize, sharp = objective
    count = functools.partial(counts.log_count, net, counting=counting, below=1.0)
    floats = [m.astype(jnp.float32) for m in masks]
    log_paths, gradients = jax.value_and_grad(count)(floats)
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


@dataclasses.dataclass
class _Ascended:
    """Where the ascent of one problem, or of several, has ended.

    Attributes:
      scores, masks: lists over the layers.
      history: what was measured at each step.
      n_steps: after how many it ended.
      stopped: why before the last.
    """

    scores: list[Array]
    masks: list[Array]
    history: dict[str, np.ndarray]
    n_steps: np.ndarray
    stopped: np.ndarray

    def pruned(self, which: tuple[int, ...], scores: list[Array], masks: list[Array]) -> Pruned:
        """What comes of one of the problems."""
        n_steps = int(self.n_steps[which])
        history = {
            name: np.moveaxis(x, 0, -1)[which][..., :n_steps] for name, x in self.history.items()
        }
        return Pruned(
            masks, scores, history, self.stopped[which], lambda: [jnp.abs(s) for s in scores]
        )


@dataclasses.dataclass(frozen=True)
class DPaI:
    """Differentiable Pruning at Initialization.

    Attributes:
      alpha: weight of effective nodes and kernels against paths, in [0, 1]; 0 optimises paths only.
      beta: weight of kernels against nodes, in [0, 1]; 0 leaves kernels out, and 1 nodes.
      gamma: how sharp the indicators of effective nodes and kernels are, positive (see `ascent`).
      counting: how paths are counted, "mean_field" or "exact" (see `dpai_jax.log_paths`).
      steps: the largest number of steps T.
      optimizer: makes the scores follow the direction of `ascent`: any optax optimizer.
      normalize: whether the direction of each layer is first divided by its mean magnitude, so
        that the default optimizer, `optax.sgd(0.01)`, moves its scores by 0.01 a step on average.
        Without, `optax.sgd(η)` is the ascent of the paper's Algorithm 1.
      allocation: weights to keep, `allocation(net, sparsity)`: `dpai_jax.erk`, `dpai_jax.uniform`,
        any function that returns a pytree of the numbers for the layers, or
        `dpai_jax.global_threshold` for one threshold over all layers.
      tolerance: ends early, when ten steps have raised log R_P by less than this fraction of it;
        −inf never does.
      scores: pytree parallel to the parameters of the scores to start from; drawn from N(0, 1) if
        not given.

    Raises:
      TypeError, ValueError: if a setting is of another type or out of its range.

    References:
      Xiang et al., DPaI: Differentiable Pruning at Initialization with Node-Path Balance
      Principle, ICLR 2025.
    """

    alpha: float = 0.99
    beta: float = 0.5
    gamma: float = math.inf
    counting: str = "mean_field"
    steps: int = 100
    optimizer: optax.GradientTransformation = _ASCENT
    normalize: bool = True
    allocation: Allocation = erk
    tolerance: float = 0.01
    scores: PyTree = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            checks.number(name, getattr(self, name), *checks.FRACTION)
        checks.number("gamma", self.gamma, *checks.POSITIVE)
        checks.one_of("counting", self.counting, counts.COUNTINGS)
        checks.whole("steps", self.steps, 1)
        checks.number("tolerance", self.tolerance)
        checks.optimizer("optimizer", self.optimizer)
        check_allocation(self.allocation)

    @classmethod
    def published(cls, **settings: Any) -> DPaI:
        """The published code's setting: exact counts, 3000 steps of Adam at 0.005.

        Args:
          **settings: what else to set, as the attributes.

        Returns:
          The method.
        """
        adam = optax.adam(5e-3)
        published = {"optimizer": adam, "normalize": False, "steps": 3000, "tolerance": -math.inf}
        return cls(**{**published, "counting": "exact", **settings})

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network: Algorithm 1 (see `dpai_jax.prune`).

        Args:
          problem: the network and the sparsity.

        Returns:
          The masks and final scores; the history holds what was measured at the masks of each step.
        """
        net = problem.net
        keep = jax.tree.map(as_count, problem.keep(self.allocation))
        parts = problem.granularity.parts(net)
        selector = _Selector(net, self._shapes(problem, jnp.float32), keep, parts)
        scores = self._start(problem)
        weights, settings = self._weights(), self._settings(parts)
        state = _State(scores, self.optimizer.init(scores))
        ascended = self._ascend(
            net,
            problem.report,
            selector,
            lambda state, masks: _step(net, state, masks, weights, **settings),
            state,
        )
        return ascended.pruned((), ascended.scores, ascended.masks)

    @property
    def together(self) -> Hashable:
        """Methods of which this is equal can be run by one program (see `run_many`)."""
        memory = jax.eval_shape(self.optimizer.init, [jax.ShapeDtypeStruct((2,), jnp.float32)])
        # What is worked out from a number of steps, such as Adam's corrections, XLA rounds
        # otherwise for one problem than for many.
        if self.scores is not None or any(x.ndim == 0 for x in jax.tree.leaves(memory)):
            return object()  # equal to nothing else
        functions = Alike(self.allocation), Alike(self.optimizer.init)
        return functions, self.steps, self.tolerance, tuple(self._settings().items())

    @staticmethod
    def run_many(methods: Sequence[DPaI], problems: Sequence[Problem]) -> list[Pruned]:
        """Prunes a network in several ways by one program (see `dpai_jax.prune_many`).

        Args:
          methods: a method for each problem, whose `together` is equal.
          problems: the problems, of one network on one device.

        Returns:
          What `run` returns for each.
        """
        method, net = methods[0], problems[0].net
        pairs = list(zip(methods, problems, strict=True))
        keeps = [jax.tree.map(as_count, p.keep(m.allocation)) for m, p in pairs]
        keep = jax.tree.map(lambda *xs: np.stack(xs), *keeps)
        weights = tuple(map(np.stack, zip(*(m._weights() for m in methods), strict=True)))
        parts = problems[0].granularity.parts(net)
        settings, init = method._settings(parts), Alike(method.optimizer.init)
        scores = noise.normal_scores_of_many(net, [p.key for p in problems])
        scores = meshes.shared_out(counts.rank_last(net, scores, 0.0), len(problems))
        if parts:
            scores = _drawn_together_many(net, scores, parts=parts)
        ascended = method._ascend(
            net,
            problems[0].report,
            _Selector(net, scores, keep, parts, many=(len(problems),)),
            lambda state, masks: _step_many(net, state, masks, weights, **settings),
            _State(scores, _init_many(net, scores, init=init)),
        )
        found = meshes.on_one_device([ascended.scores, ascended.masks])
        return [ascended.pruned((i,), *_taken(net, found, i)) for i in range(len(problems))]

    def _ascend(
        self,
        net: Network,
        report: Report,
        selector: _Selector,
        step: Callable[[_State, list[Array]], tuple[_State, dict[str, Array]]],
        state: _State,
    ) -> _Ascended:
        """Algorithm 1, lines 4 to 8, of one problem or of many that go side by side."""
        measured: list[dict[str, Any]] = []
        many = selector.many
        stopped, n_steps = np.full(many, "", object), np.full(many, self.steps)
        is_over, paths = np.zeros(many, bool), np.full(many, -math.inf)
        over: list[Array] | None = None
        for t in range(self.steps):
            masks = selector.masks(state.scores)
            state, numbers = step(state, masks)
            del masks  # before there are new ones
            measured.append(numbers)
            is_last = t == self.steps - 1
            if t % _READ_EVERY and not is_last:
                continue
            numbers = jax.device_get(numbers)
            report(t + 1, self.steps, jax.tree.map(np.mean, numbers))
            before, paths = paths, np.asarray(numbers["log_paths"], np.float64)
            with np.errstate(invalid="ignore"):  # no path before, and none now
                stops = ~is_over & (paths - before < self.tolerance * abs(paths))
            for i in map(tuple, np.argwhere(stops & (t % _READ_EVERY == 0))):
                grown = f"log-paths grew by {paths[i] - before[i]:.2g} in {_READ_EVERY} steps"
                stopped[i], n_steps[i] = grown, t + 1
            ends = ~is_over & ((n_steps == t + 1) | is_last)
            if np.any(ends):
                now = state.scores
                over = (
                    now if np.all(ends) else _merged(net, now if over is None else over, now, ends)
                )
            is_over |= ends
            if np.all(is_over):
                break
        del state  # what the optimizer remembers is as large as all the rest
        assert over is not None
        masks = selector.masks(over)
        history = jax.tree.map(lambda *xs: np.asarray(xs), *jax.device_get(measured))
        return _Ascended(over, masks, history, n_steps, stopped)

    def compile_ahead(self, problem: Problem) -> None:
        """Starts to compile what `run` needs."""
        net, shapes = problem.net, self._shapes(problem, jnp.float32)
        state = _State(shapes, jax.eval_shape(self.optimizer.init, shapes))
        masks = self._shapes(problem, bool)
        settings = self._settings(problem.granularity.parts(net))
        _step.ahead(net, state, masks, self._weights(), **settings)
        if self.scores is None:
            noise.compile_ahead(net, problem.key, problem.params)

    @staticmethod
    def _shapes(problem: Problem, dtype: Any) -> Any:
        """The layers' shapes, sharded like the weights."""
        return meshes.shapes_like(problem.net.leaves(problem.params), dtype)

    def _settings(self, parts: grouping.Parts = ()) -> dict[str, Any]:
        """What a step is compiled for."""
        objective = Objective(self.counting, self.normalize, math.isinf(self.gamma))
        return {"objective": objective, "update": Alike(self.optimizer.update), "parts": parts}

    def _weights(self) -> tuple[Any, Any, Any]:
        return np.float32(self.alpha), np.float32(self.beta), np.float32(self.gamma)

    def _start(self, problem: Problem) -> list[Array]:
        """The scores to start from; zero, the lowest magnitude, where no mask is effective.

        Those of a group are equal, and stay so.
        """
        net, parts = problem.net, problem.granularity.parts(problem.net)
        if self.scores is None:
            scores = noise.normal_scores(net, problem.key, problem.params)
        else:
            scores = [jnp.array(s, jnp.float32) for s in checks.scores(net, self.scores)]
            scores = meshes.device_put_like(scores, net.leaves(problem.params))
        scores = counts.rank_last(net, scores, 0.0)
        return _together(net, scores, parts=parts, drawn=self.scores is None) if parts else scores


class _Selector:
    """Line 5 of Algorithm 1: selects the weights of the highest magnitudes, again and again.

    Args:
      net: the traced network.
      scores: the layers' scores, or their shapes.
      keep: the numbers to keep.
      parts: which weights stand or fall together.
      many: the number of problems side by side, if there are several.
    """

    def __init__(
        self,
        net: Network,
        scores: list[Any],
        keep: list[Array] | Array,
        parts: grouping.Parts = (),
        many: tuple[int, ...] = (),
    ):
        self.many = many
        # One threshold for all layers is found in all of them.
        together = many or not isinstance(keep, list)
        everything = [Group(net, list(range(len(scores))))]
        self._groups = everything if together else groups_of(net, scores)
        self._keep = [g.of(keep) if isinstance(keep, list) else keep for g in self._groups]
        self._parts = [tuple(g.of(parts)) if parts else () for g in self._groups]
        sizes = [sum(map(np.size, jax.tree.leaves(numbers))) for numbers in self._keep]
        self._thresholds = [
            jnp.zeros((*many, 2, size // math.prod(many)), jnp.uint32) for size in sizes
        ]
        if not many:
            each = zip(self._groups, self._keep, self._thresholds, self._parts, strict=True)
            for group, *args, own in each:
                _select.ahead(group.owner, group.of(scores), *args, parts=own)

    def masks(self, scores: list[Array]) -> list[Array]:
        """The masks of the scores."""
        select, found = _select_many if self.many else _select, []
        for i, group in enumerate(self._groups):
            masks, self._thresholds[i] = select(
                group.owner,
                group.of(scores),
                self._keep[i],
                self._thresholds[i],
                parts=self._parts[i],
            )
            found.append(masks)
        return in_order(self._groups, found)


@meshes.program(like=lambda scores, *_: (scores, None), layers=lambda scores, *_: scores)
def _select(
    _: Network | None,
    scores: list[Array],
    keep: list[Array] | Array,
    thresholds: Array,
    *,
    parts: grouping.Parts = (),
) -> tuple[list[Array], Array]:
    """The masks of the scores, and the last two thresholds."""
    # Extrapolate linearly from the last two thresholds.
    before, near = thresholds[:1], thresholds[1:]
    nearby = near + (near - before)
    masks, found = grouping.select(scores, keep, nearby, magnitude=True, parts=parts)
    return masks, jnp.concatenate([near, found])


@meshes.program(
    like=lambda state, *_: (state, None), layers=lambda state, *_: state.scores, donate=(0,)
)
def _step(
    net: Network,
    state: _State,
    masks: list[Array],
    weights: tuple[Any, Any, Any],
    *,
    objective: Objective,
    update: Alike,
    parts: grouping.Parts = (),
) -> tuple[_State, dict[str, Array]]:
    """Lines 6 to 8 of Algorithm 1."""
    directions, measured = direction(net, objective, weights, state.scores, masks)
    directions = grouping.together(directions, parts)
    descent = jax.tree.map(jnp.negative, directions)
    # Some of optax's optimizers mix dtypes, which a user's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, memory = update(descent, state.optimizer, state.scores)
    return _State(optax.apply_updates(state.scores, updates), memory), measured


@meshes.program()
def _select_many(
    net: Network | None,
    scores: list[Array],
    keep: list[Array] | Array,
    thresholds: Array,
    *,
    parts: grouping.Parts = (),
) -> Any:
    return jax.vmap(functools.partial(_select.fn, net, parts=parts))(scores, keep, thresholds)


@meshes.program(like=lambda scores: scores, layers=lambda scores: scores)
def _together(
    _: Network, scores: list[Array], *, parts: grouping.Parts, drawn: bool
) -> list[Array]:
    """One score for each group."""
    return (grouping.drawn_together if drawn else grouping.together)(scores, parts)


@meshes.program()
def _drawn_together_many(_: Network, scores: list[Array], *, parts: grouping.Parts) -> Any:
    return jax.vmap(functools.partial(grouping.drawn_together, parts=parts))(scores)


@meshes.program(donate=(0,))
def _step_many(
    net: Network, state: _State, masks: list[Array], weights: Any, **settings: Any
) -> Any:
    return jax.vmap(functools.partial(_step.fn, net, **settings))(state, masks, weights)


@meshes.program()
def _init_many(_: Network, scores: list[Array], *, init: Alike) -> Any:
    return jax.vmap(init)(scores)


@meshes.program()
def _merged(_: Network, over: list[Array], scores: list[Array], ends: Array) -> list[Array]:
    """The scores of the problems that end now, beside those that were over before."""
    return [
        jnp.where(ends.reshape(-1, *(1,) * (s.ndim - 1)), s, before)
        for s, before in zip(scores, over, strict=True)
    ]


@meshes.program()
def _taken(_: Network, arrays: Any, i: Array) -> Any:
    """One of the problems' arrays."""
    return jax.tree.map(lambda x: x[i], arrays)
