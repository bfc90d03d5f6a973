"""Counts of a network's paths, compiled, on one device or many.

What meets a kernel is sharded like it, so that no device ever holds more than its part of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from dpai_jax import checks
from dpai_jax.paths import Network
from dpai_jax.paths.counting import COUNTINGS, REACH
from dpai_jax.paths.kernels import KernelUse
from dpai_jax.paths.network import AtKernel
from dpai_jax.paths.values import Spread
from dpai_jax.stages import chain_for, forward, pulled_behind, pulled_to_masks, run_roughly
from dpai_jax.tools import meshes
from dpai_jax.tools.switches import usual_switches

PyTree = Any
T = TypeVar("T")


@usual_switches()
def log_paths(net: Network, masks: PyTree, counting: str = "exact") -> Array:
    """The logarithm of the number of effective paths, log R_P.

    With P the number of paths into a node, P = 1 at the input and P_j = Σ_i m_ij P_i through a
    layer of mask m; R_P sums P over the outputs. Every position of every feature map counts.
    Differentiable in the masks, which may hold any non-negative numbers. Pure, and jittable.

    In the *mean field* an axis (of images, positions or tokens) along which all counts are equal is
    held as one number and stays so. Where zeros (a convolution's padding, a class token) or tokens
    of another kind would make the counts uneven, their mean over the positions stands for all;
    elsewhere the count is exact. Its cost depends only on the number of weights. It can be
    differentiated in reverse, any number of times, but not forward (`jax.jvp`).

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
      >>> net = dpai.trace(fn, params, jnp.ones((1, 4)))
      >>> masks = {"hidden": jnp.ones((4, 8)), "out": jnp.ones((8, 2)).at[0].set(0)}
      >>> round(float(jnp.exp(dpai.log_paths(net, masks))))
      56

    Args:
      net: the traced network.
      masks: pytree parallel to the parameters, boolean or floating at the layers.
      counting: "exact" or "mean_field".

    Returns:
      float32 scalar, the natural logarithm; `-inf` if no path leads to the output.

    Raises:
      TypeError: if `net` is not a network, or a mask is not an array of numbers.
      ValueError: if the masks' tree or shapes are not those of the network, a mask is negative or
        NaN (outside of `jax.jit`), or `counting` is unknown.

    References:
      DPaI (ICLR 2025), Section "Differentiable Calculation of the Effective Path".
    """
    checks.one_of("counting", counting, COUNTINGS)
    return counted(net, checks.weighted_masks(net, masks), counting)


def counted(
    net: Network,
    masks: list[Any],
    counting: str,
    below: float | None = None,
    *,
    ahead: bool = False,
) -> Array:
    """`log_paths` of the layers' masks, compiled.

    Args:
      net: the traced network.
      masks: for each layer an array, boolean or float32.
      counting: as in `log_paths`.
      below: what no entry of the masks exceeds, where that is known.
      ahead: whether only to start to compile this, for masks of these shapes.

    Returns:
      float32 scalar; nothing of use ahead.
    """
    calls = chain_for(net, masks, COUNTINGS[counting], below)
    if calls:
        slots = forward(net, calls, masks, run=run_roughly, ahead=ahead)
        found: Array = slots[calls[-1].outputs[0]]
        return found
    if ahead:
        _log_count.ahead(net, masks, counting=counting, below=below)
        return jnp.zeros(())
    return _log_count(net, masks, counting=counting, below=below)


@meshes.program(layers=lambda masks: masks, by_numpy="roughly")
def _log_count(net: Network, masks: list[Array], *, counting: str, below: float | None) -> Array:
    return log_count(net, [m.astype(jnp.float32) for m in masks], counting, below)


def log_count(
    net: Network,
    masks: Sequence[Array],
    counting: str,
    below: float | None = None,
    gains: Sequence[tuple[Array, ...]] = (),
    exponents: Sequence[Array] = (),
) -> Array:
    """`log_paths` of the layers' masks in float32, for use within a program.

    Args:
      net: the traced network.
      masks: a float32 array for each layer.
      counting: as in `log_paths`.
      below: what no entry of the masks exceeds, where that is known.
      gains: for each layer ones that its mask is multiplied by (see `Weight.gains`).
      exponents: for each layer the power of two that its mask is a multiple of, int32.

    Returns:
      float32 scalar.
    """
    shardings = _count_shardings(net, masks)
    masks = _resharded(net, masks, shardings)
    at_kernel = _at_kernel(shardings)
    return net.log_count(masks, COUNTINGS[counting], at_kernel, below, gains, exponents)


def reached(
    net: Network, masks: list[Any], *, ahead: bool = False, repeats: bool = False
) -> list[Array]:
    """Which weights a path passes, or would pass if they were kept, from boolean masks.

    Args:
      net: the traced network.
      masks: for each layer a boolean array.
      ahead: whether only to start to compile this, for masks of these shapes.
      repeats: see `pulled_to_masks`.

    Returns:
      For each layer a boolean array; nothing of use ahead.
    """
    calls = chain_for(net, masks, REACH)
    if not calls:
        if ahead:
            _reached.ahead(net, masks)
            return masks
        found: list[Array] = _reached(net, masks)
        return found
    return pulled_to_masks(net, calls, _reached_behind, masks, ahead=ahead, repeats=repeats)


@meshes.program(by_numpy="vouched")  # sums of flags do not round
def _reached_behind(_: Network, *pulled: Any, **of_stage: Any) -> list[Array | None]:
    """What is reached, pulled back through one stage; of masks that end here, whether it is."""
    return pulled_behind(lambda gradient, _: gradient > 0.5, *pulled, **of_stage)


@meshes.program(like=lambda masks: masks, layers=lambda masks: masks, by_numpy="vouched")
def _reached(net: Network, masks: list[Array]) -> list[Array]:
    shardings = _count_shardings(net, masks)
    floats = _resharded(net, [m.astype(jnp.float32) for m in masks], shardings)
    # What is reached is a gradient, and stays where the count had the masks.
    return _resharded(net, net.reached(floats, _at_kernel(shardings)), shardings)


def once_per_network(fn: Callable[[Network], T]) -> Callable[[Network], T]:
    """Keeps what a function works out about a network, as long as the network is there."""

    @functools.wraps(fn)
    def call(net: Network) -> T:
        if fn not in net.programs:
            net.programs[fn] = fn(net)
        found: T = net.programs[fn]
        return found

    return call


@once_per_network
def possible(net: Network) -> list[np.ndarray]:
    """Which weights any mask can make effective: those that a path passes with all kept."""
    shapes = [layer.shape for layer in net.layers]
    ones = {shape: np.ones(shape, bool) for shape in shapes}
    found = reached(net, [ones[shape] for shape in shapes], repeats=True)
    flags: list[np.ndarray] = jax.device_get(found)
    return flags


@once_per_network
def _all_possible(net: Network) -> list[bool]:
    return [bool(flags.all()) for flags in possible(net)]


def rank_last(net: Network, scores: Sequence[Array], lowest: float) -> list[Array]:
    """The layers' scores, the lowest one for weights that no mask can make effective."""
    triples = zip(scores, possible(net), _all_possible(net), strict=True)
    return [
        s if is_all else jnp.where(np.broadcast_to(flags, s.shape), s, lowest)
        for s, flags, is_all in triples
    ]


def _count_shardings(net: Network, masks: Sequence[Array]) -> dict[int, NamedSharding]:
    """How the masks are sharded while paths are counted, by the kernels' indices.

    A loop over copies that are on different devices would gather them on each device.
    """
    pairs = zip(net.layers, meshes.layer_shardings(masks), strict=True)
    return {
        layer.index: meshes.moved_off(sharding, layer.shape, layer.stack)
        for layer, sharding in pairs
        if isinstance(sharding, NamedSharding)
    }


def _resharded(
    net: Network, arrays: Sequence[Array], shardings: Mapping[int, NamedSharding]
) -> list[Array]:
    pairs = zip(net.layers, arrays, strict=True)
    return [meshes.split_like(x, shardings.get(layer.index)) for layer, x in pairs]


def _at_kernel(shardings: Mapping[int, NamedSharding]) -> AtKernel:
    """What happens at a kernel: what meets it is sharded like it."""

    def at_kernel(use: KernelUse) -> Spread:
        sharding = shardings.get(use.weight.sources[0][0])
        if sharding is None:
            return use.count()
        # The inputs of a group are sharded as its outputs are.
        reads = use.reads
        if use.groups > 1:
            reads = {use.outputs[0]: use.reads[use.inputs[0]]}
        flow = _split(use, sharding, reads, use.flow.spread)
        result = use.contract(flow, use.weight.spread, by_taps=use.groups > 1)
        return _split(use, sharding, use.writes, result)

    return at_kernel


def _split(use: KernelUse, sharding: NamedSharding, places: Mapping[int, int], x: Spread) -> Spread:
    """Counts in which the kernel's axes have these places, sharded like the kernel."""
    names, split = meshes.mesh_axes(sharding), {}
    for axis, place in sorted(places.items()):
        # An axis that a reshape merged is split like the first of its parts, and of those that it
        # was split into, the first is.
        for of_kernel in sorted(use.weight.sources[0][1][axis])[:1]:
            split[place], names[of_kernel] = names[of_kernel], ()
    return x._replace(array=meshes.split_along(x.array, sharding.mesh, split))
