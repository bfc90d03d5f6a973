"""The balance of effective paths, nodes and kernels, and the direction that improves it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dpai_jax import checks, counts, selection
from dpai_jax.allocation import keep_of_layers
from dpai_jax.paths import Layer, Network
from dpai_jax.tools import meshes
from dpai_jax.tools.powers import largest_entry, rounded, scaling
from dpai_jax.tools.rows import Copies, are_small, sums_of
from dpai_jax.tools.signatures import Alike
from dpai_jax.tools.sums import (
    digits_of,
    from_digits,
    sum_over,
    sum_taps,
    totals,
    written_out,
)
from dpai_jax.tools.switches import usual_switches

PyTree = Any

# How nodes and kernels enter the balance (see `ascent`).
BALANCES = ("even", "indicator")

# A smaller share of all paths counts as none: its inverse would overflow.
_LEAST = 2.0**-100

# Hardly a layer has more features.
_FEATURES = 2**20


@usual_switches()
def ascent(
    net: Network,
    scores: PyTree,
    keep: PyTree | int,
    alpha: float = 0.99,
    beta: float = 0.5,
    gamma: float = math.inf,
    counting: str = "exact",
    balance: str = "indicator",
    strengths: PyTree = None,
) -> PyTree:
    """The direction in which one step of DPaI moves the scores.

    With m = top-k(|s|) in each layer and g = ∂ log R_P/∂m · sign(s), the straight-through gradient,
    the balance "indicator" is the paper's::

        d = (1 − α)·g + α·((1 − β)·g·[node ineffective] + β·g·[kernel ineffective]).

    A node is effective by the indicator tanh(γ·N) of N = Σ m·∂ log R_P/∂m over its incoming
    weights, the share of all paths that pass it, and a kernel by that over its taps, K. The bracket
    is the indicator's slope up to the factor γ, 1 − tanh²(γ·N); for γ → ∞ one where N = 0, else
    zero.

    The balance "even" ascends the mean logarithm of the shares of nodes and of kernels in place of
    the indicators. It is largest where all nodes carry as many paths, and has a slope everywhere::

        d = (1 − α)·g + α·P·((1 − β)·g·⟨1/N⟩ + β·g·⟨1/K⟩),

    where ⟨1/N⟩ is one over the number of the layer's nodes and the share N of the weight's own,
    half for the node it leads to and half for the one it comes from, and ⟨1/K⟩ likewise. (Where
    features are split into groups, only for the node it leads to.) P is the sum of the layer's
    shares: one if all paths pass it, and less beside others, as in the branch of a residual block.
    It is the sum of d, too. Pure, and jittable with `net` static.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> net = dpai.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)))
      >>> scores = {"w": jnp.array([[4.0, 3.0], [2.0, 1.0]])}
      >>> dpai.ascent(net, scores, {"w": 4}, alpha=0.0)["w"].tolist()
      [[0.25, 0.25], [0.25, 0.25]]

    Args:
      net: the traced network.
      scores: pytree of scores parallel to the parameters.
      keep: pytree of the number of weights to keep per layer (see `dpai_jax.erk`), or one number
        for all layers together.
      alpha: weight of nodes and kernels against paths, in [0, 1].
      beta: weight of kernels against nodes, in [0, 1].
      gamma: how sharp the indicators are, positive.
      counting: "exact" or "mean_field" (see `dpai_jax.log_paths`).
      balance: "indicator" or "even".
      strengths: pytree parallel to the parameters of what each weight multiplies a path by, not
        negative; one if not given.

    Returns:
      Pytree like `scores`; zero where nothing can be pruned.

    Raises:
      ValueError: if the scores, `strengths` or `keep` do not fit the network, or `counting` or
        `balance` is unknown.

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
    checks.one_of("balance", balance, BALANCES)
    given = [] if strengths is None else checks.weighted_masks(net, strengths)
    pairs = [as_strengths(x, largest_entry(x)) for x in given]
    own, exponents = ([pair[i] for pair in pairs] for i in range(2))
    weights: tuple[Any, Any, Any] = (alpha, beta, gamma)
    sharp = not isinstance(weights[2], jax.core.Tracer) and math.isinf(gamma)
    objective = Objective(balance, counting, normalize=False, sharp=sharp)

    def run(scores: list[Array], keep: list[Array] | Array) -> list[Array]:
        masks, _ = selection.select(scores, keep, magnitude=True)
        return direction(net, objective, weights, scores, masks, own, exponents)[0]

    numbers = keep_of_layers(net, keep)
    directions = meshes.auto_sharded(run, leaves, numbers, like=leaves)
    return net.tree(directions, lambda: np.float32(0))


# What `direction` measures.
MEASURED = {"log_paths": np.float32, "nodes": np.uint32, "kernels": np.uint32}


class Objective(NamedTuple):
    """What the scores ascend (see `ascent`).

    Attributes:
      balance: as in `ascent`.
      counting: as in `ascent`.
      normalize: whether the direction of each layer is divided by its mean magnitude.
      sharp: whether γ is infinite, and so the indicators only tell what has any path.
      falls: whether only weights that are kept are moved, as the density falls.
    """

    balance: str
    counting: str
    normalize: bool
    sharp: bool
    falls: bool = False

    def shares(self, layer: Layer) -> tuple[tuple[int, ...], ...]:
        """The shapes of the shares of all paths that pass a layer's features.

        Those of output features come first, then those of input features, if features are not split
        into groups. Each is the gradient of log R_P by a gain of the feature (see `Weight.gains`),
        as N = Σ m·∂ log R_P/∂m over the weights of one feature. The indicators need none.
        """
        axes = _axes(layer)
        others = [axes.inputs, axes.outputs] if axes.outputs else [axes.inputs]
        return tuple(
            tuple(1 if i in (*own, *axes.taps) else size for i, size in enumerate(layer.shape))
            for own in others
            if self.balance == "even"
        )


def direction(
    net: Network,
    objective: Objective,
    weights: tuple[Any, Any, Any],
    scores: list[Array],
    masks: list[Array],
    strengths: Sequence[Array] = (),
    exponents: Sequence[Array] = (),
) -> tuple[list[Array], dict[str, Array]]:
    """Algorithm 1, lines 6 to 8: the direction d at the masks of the scores (see `ascent`).

    Args:
      net: the traced network.
      objective: what to ascend.
      weights: α, β and γ.
      scores: a float32 array of each layer's shape.
      masks: the boolean masks of the scores; or, where only weights that are kept are moved, by
        what each of these multiplies a path, float32 and at most one, zero for the others.
      strengths: by what each weight multiplies a path, in [0, 1]; by one if not given.
      exponents: of the powers of two by which all weights of a layer multiply a path, too, int32.

    Returns:
      The layers' directions, and what was measured: `log_paths`, `nodes` and `kernels`.
    """
    if strengths and objective.falls:  # then only what is kept moves
        masks = [jnp.where(m, s, 0.0) for m, s in zip(masks, strengths, strict=True)]
        strengths = ()

    def count(floats: list[Array], gains: list[tuple[Array, ...]]) -> Array:
        if strengths:
            floats = [m * s for m, s in zip(floats, strengths, strict=True)]
        return counts.log_count(net, floats, objective.counting, 1.0, gains, exponents)

    floats = [m.astype(jnp.float32) for m in masks]
    gains = [
        tuple(jnp.ones(size, jnp.float32) for size in objective.shares(layer))
        for layer in net.layers
    ]
    log_paths, found = jax.value_and_grad(count, (0, 1))(floats, gains)
    directions, measured = directions_of(net.layers, objective, weights, scores, masks, *found)
    return directions, {"log_paths": log_paths, **measured}


def as_strengths(array: Array, largest: Array) -> tuple[Array, Array]:
    """Numbers not below zero as multiples, in [0, 1], of a power of two, and its exponent.

    Their largest need not be known but for a rounding error.
    """
    _, inverse, exponent = scaling(largest)
    return array * inverse, exponent


def directions_of(
    layers: Sequence[Layer],
    objective: Objective,
    weights: tuple[Any, Any, Any],
    scores: Sequence[Array],
    masks: Sequence[Array],
    gradients: Sequence[Array],
    shares: Sequence[tuple[Array, ...]],
    largest: int | None = None,
) -> tuple[list[Array], dict[str, Array]]:
    """`direction` from the gradients, of some of a network's layers.

    Args:
      layers: the layers.
      objective: as for `direction`.
      weights: as for `direction`.
      scores: of these layers.
      masks: of these layers.
      gradients: of log R_P, by the masks as they are given.
      shares: those of all paths that pass features (see `Objective.shares`).
      largest: see `rows.sums_of`.

    Returns:
      The layers' directions, and their `nodes` and `kernels`.
    """
    balance, _, normalize, sharp, falls = objective
    kept = list(map(_of_kept, masks, gradients))
    moving = kept if falls else gradients  # what was removed stays removed
    if balance == "even":
        slopes, sizes, measured = _even(layers, weights, masks, gradients, moving, shares)
    else:
        of_layers = [
            _slopes((layer.inputs, layer.taps), sharp, weights, own, g)
            for layer, own, g in zip(layers, kept, moving, strict=True)
        ]
        slopes, sizes, open_kernels = map(list, zip(*of_layers, strict=True))
        kernels = jnp.concatenate([x.ravel() for x in open_kernels]).astype(jnp.uint32)
        measured = {
            "nodes": jnp.sum(kernels > 0, dtype=jnp.uint32),
            "kernels": jnp.sum(kernels, dtype=jnp.uint32),
        }
    if normalize:
        slopes = [
            slope * jnp.where(mean > 0, 1 / mean, 0.0)
            for slope, mean in zip(slopes, _means(layers, masks, sizes, largest), strict=True)
        ]
    slopes = _written_out(layers, slopes)
    directions = [
        _direction(slope, gradient, score, mask if falls else None)
        for slope, gradient, score, mask in zip(slopes, gradients, scores, masks, strict=True)
    ]
    return directions, measured


def _direction(slope: Array, gradient: Array, score: Array, mask: Array | None) -> Array:
    """A layer's direction; zero for weights that are not kept, if there is a mask."""
    sign = jnp.sign(score)
    if mask is None:
        return slope * (gradient * sign)
    if mask.dtype == bool:
        return jnp.where(mask, slope * (gradient * sign), 0.0)
    # Not by what `_of_kept` gives, which XLA would write out for both of its readers.
    return slope * (gradient * (mask * sign))


def moved(
    directions: Sequence[Array], scores: Sequence[Array], memory: Any, update: Alike | None
) -> tuple[list[Array], Any]:
    """Scores and an optimizer's memory after an update that follows the directions.

    Without an update the directions are the scores.
    """
    if update is None:
        return list(directions), memory
    descent = jax.tree.map(jnp.negative, list(directions))
    # Some of optax's optimizers mix dtypes, which a user's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, memory = update(descent, memory, list(scores))
    after: list[Array] = optax.apply_updates(list(scores), updates)
    return after, memory


def _of_kept(mask: Array, gradient: Array) -> Array:
    """The share of all paths that passes each weight that is kept; zero for the others."""
    return jnp.where(mask, gradient, 0.0) if mask.dtype == bool else rounded(mask * gradient)


# Traced once for layers of one shape.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _slopes(
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    sharp: bool,
    weights: tuple[Any, Any, Any],
    kept: Array,
    gradient: Array,
) -> tuple[Array, Array, Array]:
    """By what a layer's gradient is multiplied, its products summed over taps, and open kernels.

    Args:
      axes: those of the input features and of the taps.
      sharp: see `Objective`.
      weights: α, β and γ.
      kept: see `_of_kept`.
      gradient: ∂ log R_P/∂m.

    Returns:
      The factors, and the sums, of which the taps have size one; and of the effective kernels of
      each node the number, of which the input features have size one, too.
    """
    (alpha, beta, gamma), (inputs, taps) = weights, axes
    kernel = sum_taps(kept, taps)
    kernel = written_out(kernel) if taps else kernel  # where there are none, it costs nothing
    open_kernels = jnp.sum((kernel > 0).astype(jnp.float32), inputs, keepdims=True)
    if sharp:
        of_node, of_kernel = (jnp.where(x > 0, 0.0, 1.0) for x in (open_kernels, kernel))
    else:
        node = jnp.sum(kernel, inputs, keepdims=True)
        of_node, of_kernel = (1 - jnp.square(jnp.tanh(gamma * x)) for x in (node, kernel))
    slope = _mixed(alpha, alpha, beta, of_node, of_kernel)
    return slope, slope * sum_taps(gradient, taps), open_kernels


class _Axes(NamedTuple):
    """The axes of a layer that sums go over.

    Attributes:
      inputs: those of the input features.
      outputs: those of the output features; none where features are split into groups, so that an
        output feature is not joined to all input features.
      taps: those of the taps.
      all: all but those along which layers are stacked.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[int, ...]
    all: tuple[int, ...]


def _axes(layer: Layer) -> _Axes:
    every = tuple(i for i in range(len(layer.shape)) if i not in layer.stack)
    return _Axes(layer.inputs, layer.outputs if layer.groups == 1 else (), layer.taps, every)


def _even(
    layers: Sequence[Layer],
    weights: tuple[Any, Any, Any],
    masks: Sequence[Array],
    gradients: Sequence[Array],
    moving: Sequence[Array],
    shares: Sequence[tuple[Array, ...]],
) -> tuple[list[Array], list[Array], dict[str, Array]]:
    """What `_slopes` gives for each layer, for the balance "even", and what is measured.

    What is worked out of vectors is worked out in a row of those of all layers, as each kernel that
    XLA writes takes long to compile.
    """
    of_nodes, of_all, n_nodes = _of_features(layers, shares)
    of_kernels, n_kernels = _of_kernels(layers, masks, gradients)
    slopes = [_even_slope(weights, *own) for own in zip(of_all, of_nodes, of_kernels, strict=True)]
    sizes = [
        slope * sum_taps(g, layer.taps)
        for layer, slope, g in zip(layers, slopes, moving, strict=True)
    ]
    return slopes, sizes, {"nodes": n_nodes, "kernels": n_kernels}


def _of_features(
    layers: Sequence[Layer], shares: Sequence[tuple[Array, ...]]
) -> tuple[list[list[Array]], list[Array], Array]:
    """Of each layer the evenness of its features, and the sum P of its shares; and effective nodes.

    Args:
      layers: the layers.
      shares: see `Objective.shares`.

    Returns:
      For each layer an array for each of its shares; for each layer the sum, of each of its copies;
      and the number of effective nodes of all layers.
    """
    flat = [x for own in shares for x in own]
    pairs = zip(layers, shares, strict=True)
    copies = Copies([x.shape for x in flat], [layer.stack for layer, own in pairs for _ in own])
    row, blocks = copies.row, copies.blocks(flat)
    scale, inverse, _ = scaling(row.largest(blocks))
    # The same for some of a network's layers as for all.
    most = max(_FEATURES, *(x.size for x in flat))
    digits, base = digits_of(blocks * row.spread(inverse), most)
    flags = [(blocks >= _LEAST).astype(jnp.int32), (blocks > 0).astype(jnp.int32)]
    *sums, numbers, n_open = row.sums([*digits, *flags])
    even = written_out(_evenness(blocks, row.spread(numbers)).ravel())
    # Or else the row is split over devices, and handed around as a whole.
    found = iter(copies.arrays(meshes.on_each_device(even)))
    firsts = np.cumsum([0, *map(len, shares)])[:-1]  # those of output features
    totals_of, opened = copies.numbers(from_digits(sums, base) * scale), copies.numbers(n_open)
    n_nodes = jnp.sum(jnp.concatenate([opened[i].ravel() for i in firsts])).astype(jnp.uint32)
    return [[next(found) for _ in own] for own in shares], [totals_of[i] for i in firsts], n_nodes


def _of_kernels(
    layers: Sequence[Layer], masks: Sequence[Array], gradients: Sequence[Array]
) -> tuple[list[Array], Array]:
    """The evenness of each layer's kernels, and the number of effective kernels of all layers."""
    triples = list(zip(layers, masks, gradients, strict=True))
    kernels = _written_out(
        layers, [sum_taps(_of_kept(mask, g), layer.taps) for layer, mask, g in triples]
    )
    lines = [
        totals([kernel > 0, kernel >= _LEAST], _last(kernel.shape, _axes(layer).all))
        for layer, kernel in zip(layers, kernels, strict=True)
    ]
    copies = Copies([x.shape for x, _ in lines], [layer.stack for layer in layers])
    n_open, numbers = copies.row.sums([copies.blocks(own) for own in zip(*lines, strict=True)])
    found = [
        _evenness(kernel, number) if layer.taps else _evenness_of_weights(mask, g, number)
        for (layer, mask, g), kernel, number in zip(
            triples, kernels, copies.numbers(numbers), strict=True
        )
    ]
    return found, jnp.sum(n_open, dtype=jnp.uint32)


def _written_out(layers: Sequence[Layer], kernels: Sequence[Array]) -> list[Array]:
    """Numbers of layers' kernels, written out where a kernel has several taps, which read them."""
    pairs = zip(layers, kernels, strict=True)
    return [written_out(x) if layer.taps else x for layer, x in pairs]


def _last(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The last of some axes along which there is more than one entry."""
    return tuple(i for i in axes if shape[i] > 1)[-1:] or axes[-1:]


# Traced once for layers of one shape.
@jax.jit
def _even_slope(
    weights: tuple[Any, Any, Any], total: Array, of_nodes: list[Array], of_kernels: Array
) -> Array:
    """By what a layer's gradient is multiplied; its node's slope is the mean of those given."""
    alpha, beta, _ = weights
    of_node = functools.reduce(jnp.add, of_nodes) / len(of_nodes)
    return _mixed(alpha, alpha * total, beta, of_node, of_kernels)


def _mixed(alpha: Array, weight: Array, beta: Array, of_nodes: Array, of_kernels: Array) -> Array:
    """The slopes of paths, and of nodes and kernels together by a weight."""
    bracket = rounded((1 - beta) * of_nodes) + rounded(beta * of_kernels)
    return (1 - alpha) + rounded(weight * bracket)


def _evenness(shares: Array, number: Array) -> Array:
    """The slope of the mean logarithm of the shares that are not zero, whose number is given."""
    is_any = shares >= _LEAST
    products = shares * number.astype(jnp.float32)
    return jnp.where(is_any, 1 / jnp.where(is_any, products, 1.0), 0.0)


def _evenness_of_weights(mask: Array, gradient: Array, number: Array) -> Array:
    """`_evenness` of the shares of weights that are kernels by themselves.

    Multiplied in another order, as XLA would write out the shares for both of their readers.
    """
    number = number.astype(jnp.float32)
    if mask.dtype == bool:
        products = jnp.where(mask, gradient * number, 0.0)
    else:
        products = gradient * (mask * number)
    is_any = products >= jnp.maximum(number, 1.0) * _LEAST
    return jnp.where(is_any, 1 / jnp.where(is_any, products, 1.0), 0.0)


def _means(
    layers: Sequence[Layer], masks: Sequence[Array], sizes: Sequence[Array], largest: int | None
) -> list[Array]:
    """The mean magnitude of each layer's direction, of each copy of it, from sums over taps."""
    small = are_small(masks)
    plain = [i for i, layer in enumerate(layers) if not layer.stack]
    sums = sums_of([sizes[i] for i in plain], [small[i] for i in plain], largest)
    totals = dict(zip(plain, sums, strict=True))
    means = []
    for i, (layer, x) in enumerate(zip(layers, sizes, strict=True)):
        copy = tuple(axis for axis in range(x.ndim) if axis not in layer.stack)
        total = totals[i] if i in totals else sum_over(x, copy)
        means.append(total * (layer.copies / layer.size))
    return means
