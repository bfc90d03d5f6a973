"""A masked network as a graph of its units: how many paths lead to each, and through each weight.

Drawn are the features that kernels write, joined by the weights that are kept. A sum of branches
or an activation function is no unit of its own: the weights behind it start at the features that
it was made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks
from dpai_jax.counts import once_per_network
from dpai_jax.measuring import effective
from dpai_jax.paths import EXACT, KernelUse, Network, Spread
from dpai_jax.paths.channels import Channels, channels
from dpai_jax.tools.meshes import on_one_device

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Units and the edges between them.

    Attributes:
      names: of each block of units: "input", or the name of the layer that writes them.
      columns: of each block, how many kernels a path passes to get there, at most.
      block: of each unit, the block it is in; blocks are in order.
      paths: of each unit, the number of paths from the input to one position of it.
      alive: of each unit, whether a path from the input to the output passes it.
      source, target: of each edge, the units it joins.
      share: of each edge, the share of all paths that passes it.
      effective: of each edge, whether one of its weights is effective.
    """

    names: tuple[str, ...]
    columns: np.ndarray
    block: np.ndarray
    paths: np.ndarray
    alive: np.ndarray
    source: np.ndarray
    target: np.ndarray
    share: np.ndarray
    effective: np.ndarray


def graph_of(net: Network, masks: PyTree) -> Graph:
    """The graph of a small network."""
    kept = on_one_device(checks.masks(net, masks))
    graph = _channels(net)
    paths, shares = _paths(net, kept)
    n_inputs, inputs = _input_units(graph)
    counts = np.concatenate([np.ones(n_inputs), *paths])
    sources = _sources(graph, inputs, n_inputs)
    weights = zip(
        shares, _by_use(net, graph, kept), _by_use(net, graph, effective(net, kept)), strict=True
    )
    pairs, share, is_effective = _edges(list(weights), sources, counts, n_inputs)
    alive = np.zeros(len(counts), bool)
    alive[pairs[is_effective].ravel()] = True
    sizes = [n_inputs, *(k.shape[0] * k.shape[2] for k in graph.kernels)]
    return Graph(
        names=("input", *_names(net, graph)),
        columns=np.asarray([0, *_columns(graph)]),
        block=np.repeat(np.arange(len(sizes)), sizes),
        paths=counts,
        alive=alive,
        source=pairs[:, 0],
        target=pairs[:, 1],
        share=share,
        effective=is_effective,
    )


def _by_use(net: Network, graph: Channels, leaves: Sequence[Array]) -> list[np.ndarray]:
    """Masks as each use of a kernel sees them, (groups, inputs, outputs, taps)."""
    row = np.append(net.ravel(jax.device_get(leaves)), False)  # what nobody prunes is not drawn
    return [row[np.where(kernel < 0, net.size, kernel)] for kernel in graph.kernels]


def _edges(
    weights: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    sources: Sequence[np.ndarray],
    counts: np.ndarray,
    n_inputs: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The units that each edge joins, its share of all paths, and whether it is effective.

    Args:
      weights: for each use of a kernel its weights' shares of all paths, which of them are kept,
        and which of them are effective.
      sources: for each feature read, the units that it is made of.
      counts: for each unit, the paths to it.
      n_inputs: the number of input units.
    """
    edges: dict[tuple[int, int], list[float]] = {}
    read, first = 0, n_inputs
    for share, kept, alive in weights:
        groups, inputs, outputs, _ = kept.shape
        for group, i, o in np.argwhere(kept.any(3)):
            units = sources[read + group * inputs + i]
            # What arrives is the sum of what its sources hold.
            parts = counts[units] / max(counts[units].sum(), 1e-300)
            target = first + int(group * outputs + o)
            for unit, part in zip(units, parts, strict=True):
                edge = edges.setdefault((int(unit), target), [0.0, 0.0])
                edge[0] += part * share[group, i, o].sum()
                edge[1] = max(edge[1], float(alive[group, i, o].any() and counts[unit] > 0))
        read, first = read + groups * inputs, first + groups * outputs
    found = np.asarray(list(edges.values()), float).reshape(-1, 2)
    return np.asarray(list(edges), int).reshape(-1, 2), found[:, 0], found[:, 1] > 0


def _paths(net: Network, kept: Sequence[Array]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each use of a kernel, the paths to the features it writes, and its weights' shares.

    The share of all paths that pass a weight is m · ∂ log R_P/∂m, as R_P is linear in each.
    """
    uses, shares_and_paths = _counted(net)
    ones = [jnp.ones(use.weight.shape, jnp.float32) for use in uses]
    masks = [jnp.asarray(m, jnp.float32) for m in kept]
    shares, written = jax.device_get(shares_and_paths(ones, masks))
    paths = [np.ldexp(counts.astype(float), exponent) for counts, exponent in written]
    views = [
        dataclasses.replace(use, weight=dataclasses.replace(use.weight, array=share)).kernel()
        for use, share in zip(uses, shares, strict=True)
    ]
    return paths, [np.asarray(view, float) for view in views]


@once_per_network
def _counted(net: Network) -> tuple[list[KernelUse], Callable[..., Any]]:
    """The uses of kernels, and a compiled function of a factor for each use and of the masks.

    It returns the gradient on the factors, and the counts behind each use with their exponents.
    """
    net = net.unrolled()
    uses: list[KernelUse] = []

    def discover(masks: Sequence[Array]) -> Array:
        def at_kernel(use: KernelUse) -> Spread:
            uses.append(use)
            return use.count()

        return net.log_count(masks, EXACT, at_kernel)

    def count(factors: Sequence[Array], masks: Sequence[Array]) -> tuple[Array, Any]:
        written: list[tuple[Array, Array]] = []

        def at_kernel(use: KernelUse) -> Spread:
            array = use.weight.array * factors[len(written)]
            use = dataclasses.replace(use, weight=dataclasses.replace(use.weight, array=array))
            result = use.count()
            written.append((_features(use, result), use.flow.exponent))
            return result

        return net.log_count(masks, EXACT, at_kernel), written

    shapes = [jax.ShapeDtypeStruct(layer.shape, jnp.float32) for layer in net.layers]
    jax.eval_shape(discover, shapes)
    return uses, jax.jit(jax.grad(count, has_aux=True))


_channels = once_per_network(channels)


def _features(use: KernelUse, result: Spread) -> Array:
    """The most that arrives at any position of each feature written, group by group; flat."""
    places = [use.writes[i] for i in (*use.batch, *use.outputs) if i in use.writes]
    array = result.full(*places).array if places else result.array
    most = jnp.max(array, [i for i in range(array.ndim) if i not in places])
    order = sorted(places)
    return most.transpose([order.index(place) for place in places]).ravel()


def _input_units(graph: Channels) -> tuple[int, np.ndarray]:
    """The number of input units, and for each feature read which of them it reads, or −1.

    Kernels that read as many features of the input read the same.
    """
    inputs, read, first = np.full(len(graph.entered), -1), 0, {0: 0}
    for kernel in graph.kernels:
        size = kernel.shape[0] * kernel.shape[1]
        own = np.flatnonzero(graph.entered[read : read + size])
        start = first.setdefault(len(own), sum(first))
        inputs[read + own] = start + np.arange(len(own))
        read += size
    return sum(first), inputs


def _sources(graph: Channels, inputs: np.ndarray, n_inputs: int) -> list[np.ndarray]:
    """For each feature read, the units that it is made of."""
    sources = [[int(unit)] if unit >= 0 else [] for unit in inputs]
    for written, read in zip(graph.written, graph.read, strict=True):
        sources[read].append(n_inputs + int(written))
    return [np.asarray(units, int) for units in sources]


def _columns(graph: Channels) -> list[int]:
    """For each use of a kernel, how many kernels a path has passed behind it, at most."""
    of_written: list[np.ndarray] = []
    columns: list[int] = []
    ends = np.cumsum([0, *(k.shape[0] * k.shape[1] for k in graph.kernels)])
    for i, kernel in enumerate(graph.kernels):
        mine = (graph.read >= ends[i]) & (graph.read < ends[i + 1])
        before = np.concatenate(of_written) if of_written else np.zeros(0, int)
        columns.append(1 + int(before[graph.written[mine]].max(initial=0)))
        of_written.append(np.full(kernel.shape[0] * kernel.shape[2], columns[i]))
    return columns


def _names(net: Network, graph: Channels) -> list[str]:
    """For each use of a kernel, the name of the layer that its weights are in."""
    ends = np.cumsum([layer.size for layer in net.layers])
    firsts = [int(kernel.max()) for kernel in graph.kernels]
    return [net.layers[int(np.searchsorted(ends, number, "right"))].name for number in firsts]
