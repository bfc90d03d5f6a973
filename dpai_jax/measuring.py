"""What remains of a network under masks: its effective paths, nodes, kernels and weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks
from dpai_jax.counts import counted, reached
from dpai_jax.paths import Layer, Network
from dpai_jax.summaries import Summary
from dpai_jax.tools import meshes
from dpai_jax.tools.host import Quick
from dpai_jax.tools.lanes import shares_of, side_by_side
from dpai_jax.tools.rows import Group, are_small, counts_of, groups_of, in_order
from dpai_jax.tools.switches import usual_switches

PyTree = Any


@dataclasses.dataclass(frozen=True, repr=False)
class LayerTopology:
    """What remains of one layer (of all its copies, where layers are stacked in one kernel).

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> net = dpai.trace(fn, params, jnp.ones((1, 4)))
      >>> (layer,) = dpai.topology(net, {"w": jnp.eye(4, 2, dtype=bool)}).layers
      >>> layer.density
      0.25

    Attributes:
      name: the kernel's path among the parameters.
      shape: the kernel's shape.
      size: the number of its weights before pruning.
      outputs: the number of its output features before pruning.
      weights: how many are kept.
      effective: how many of those lie on a path from the input to the output.
      nodes: output features with an effective incoming weight.
      kernels: pairs of an input and an output feature joined by an effective weight.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    outputs: int
    weights: int
    effective: int
    nodes: int
    kernels: int

    def __repr__(self) -> str:
        return f"LayerTopology({self.name}: {_described(self)})"

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return self.weights / self.size

    @property
    def dead(self) -> int:
        """The number of weights that are kept, but that no path passes."""
        return self.weights - self.effective


@dataclasses.dataclass(frozen=True, repr=False)
class Topology:
    """What remains of a network under masks; printed, it is a table of the layers.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> net = dpai.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}, jnp.ones((1, 4)))
      >>> print(dpai.topology(net, {"w": jnp.eye(4, 2, dtype=bool)}))
      2 of 8 weights kept
      layer       shape  kept  density  effective   nodes  kernels  dead
      ------------------------------------------------------------------
      w           4×2       2   25.00%          2  2 of 2        2     0
      ------------------------------------------------------------------
      all layers            2   25.00%          2  2 of 2        2     0
      log-paths 0.69; effective: on a path; dead: kept, but on none

    Attributes:
      log_paths: log R_P, the natural logarithm of the number of effective paths.
      layers: the layers, in the order in which an input passes them.
    """

    log_paths: float
    layers: tuple[LayerTopology, ...]

    @property
    def size(self) -> int:
        """The number of prunable weights."""
        return sum(layer.size for layer in self.layers)

    @property
    def weights(self) -> int:
        """The number of weights kept."""
        return sum(layer.weights for layer in self.layers)

    @property
    def effective(self) -> int:
        """The number of effective weights."""
        return sum(layer.effective for layer in self.layers)

    @property
    def nodes(self) -> int:
        """R_N, the number of effective nodes."""
        return sum(layer.nodes for layer in self.layers)

    @property
    def kernels(self) -> int:
        """R_C, the number of effective kernels."""
        return sum(layer.kernels for layer in self.layers)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The names of the layers that no path passes any more."""
        return tuple(layer.name for layer in self.layers if layer.effective == 0)

    @property
    def outputs(self) -> int:
        """The number of output features of all layers before pruning."""
        return sum(layer.outputs for layer in self.layers)

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return self.weights / self.size

    @property
    def dead(self) -> int:
        """The number of weights that are kept, but that no path passes."""
        return self.weights - self.effective

    def __repr__(self) -> str:
        return f"Topology({_described(self)}, log_paths={self.log_paths:.2f})"

    def __str__(self) -> str:
        return str(self.summary())

    def summary(self) -> Summary:
        """A table of the layers, for a terminal or a notebook.

        Example:
          >>> import jax, jax.numpy as jnp, dpai_jax as dpai
          >>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
          >>> params = {"hidden": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
          >>> net = dpai.trace(fn, params, jnp.ones((1, 4)))
          >>> masks = {"hidden": jnp.eye(4, 8, dtype=bool), "out": jnp.ones((8, 2), bool)}
          >>> dpai.topology(net, masks).summary()
          20 of 48 weights kept
          layer       shape  kept  density  effective    nodes  kernels  dead
          -------------------------------------------------------------------
          hidden      4×8       4   12.50%          4   4 of 8        4     0
          out         8×2      16  100.00%          8   2 of 2        8     8
          -------------------------------------------------------------------
          all layers           20   41.67%         12  6 of 10       12     8
          log-paths 2.08; effective: on a path; dead: kept, but on none

        Returns:
          The table. In the last row are the totals.
        """
        return self.titled(f"{self.weights:,} of {self.size:,} weights kept")

    def titled(self, title: str) -> Summary:
        """`summary` under a title."""
        return Summary(
            title=title,
            headings=("layer", "shape", *_COLUMNS),
            rows=tuple(
                (layer.name, "×".join(map(str, layer.shape)), *_cells(layer))
                for layer in self.layers
            ),
            total=("all layers", "", *_cells(self)),
            caption=f"log-paths {self.log_paths:.2f}; effective: on a path;"
            " dead: kept, but on none",
        )


_COLUMNS = ("kept", "density", "effective", "nodes", "kernels", "dead")


def _cells(counts: LayerTopology | Topology) -> tuple[str, ...]:
    return (
        f"{counts.weights:,}",
        f"{counts.density:.2%}",
        f"{counts.effective:,}",
        f"{counts.nodes:,} of {counts.outputs:,}",
        f"{counts.kernels:,}",
        f"{counts.dead:,}",
    )


def _described(counts: LayerTopology | Topology) -> str:
    return (
        f"{counts.weights:,} of {counts.size:,} weights kept, {counts.effective:,} effective,"
        f" {counts.nodes:,} nodes, {counts.kernels:,} kernels"
    )


@usual_switches()
def topology(net: Network, masks: PyTree) -> Topology:
    """Counts the effective paths, nodes, kernels and weights of a masked network, exactly.

    A weight is effective if it is kept and a path from the input to the output passes it; a node is
    an output feature of a layer with an effective incoming weight; a kernel is a pair of an input
    and an output feature joined by an effective weight (in a dense layer each weight is one). What
    is effective is found by a pass whose counts clip to {0, 1} forward and backward, so it is free
    of rounding; gates take part in it whatever the network's `gates`.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 1))}
      >>> net = dpai.trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 4)))
      >>> masks = {"a": jnp.ones((4, 2), bool), "b": jnp.array([[True], [False]])}
      >>> left = dpai.topology(net, masks)
      >>> left.weights, left.effective, left.nodes
      (9, 5, 2)

    Args:
      net: the traced network.
      masks: pytree parallel to the parameters: booleans, or zeros and ones.

    Returns:
      The topology, in plain Python numbers.

    Raises:
      ValueError: if the masks' tree or shapes are not those of the network.

    References:
      DPaI (ICLR 2025); Pham et al., Towards Data-Agnostic Pruning At Initialization: What Makes a
      Good Sparse Mask?, NeurIPS 2023.
    """
    return measure(net, [checks.masks(net, masks)])()[0]


def measure(net: Network, masks: Sequence[list[Array]]) -> Callable[[], list[Topology]]:
    """Starts to measure the `topology` of several masks, each a list of the layers' boolean arrays.

    Args:
      net: the traced network.
      masks: the masks.

    Returns:
      A function that waits for the topologies and returns them.
    """
    groups = groups_of(net, masks[0])

    def started(share: Sequence[list[Array]]) -> list[Any]:
        return [(counted(net, kept, "exact", 1.0), _counts(net, groups, kept)) for kept in share]

    under_way = list(itertools.chain(*side_by_side(started, shares_of(masks))))
    known = [(layer.name, layer.shape, layer.size, _n_outputs(layer)) for layer in net.layers]

    def finished() -> list[Topology]:
        found = jax.device_get(under_way)
        return [
            _topology(known, log_paths, in_order(groups, counts)) for log_paths, counts in found
        ]

    return finished


def _topology(
    known: list[tuple[Any, ...]], log_paths: np.ndarray, counts: list[np.ndarray]
) -> Topology:
    pairs = zip(known, counts, strict=True)
    layers = tuple(LayerTopology(*own, *numbers.tolist()) for own, numbers in pairs)
    return Topology(float(np.float32(log_paths)), layers)


def _n_outputs(layer: Layer) -> int:
    """The number of output features, over all copies."""
    return layer.size // layer.size_of((*layer.inputs, *layer.taps))


def compile_ahead(net: Network, weights: list[Array]) -> None:
    """Starts to compile what `measure` runs for masks that are sharded like the weights."""
    kept: Any = meshes.shapes_like(weights, bool)
    reached(net, kept, ahead=True)
    counted(net, kept, "exact", 1.0, ahead=True)
    for group in groups_of(net, kept):
        own, axes = group.of(kept), tuple(group.of(_axes(net)))
        _count_layers.ahead(group.owner, own, own, axes=axes)


@usual_switches()
def effective_weights(net: Network, masks: PyTree) -> PyTree:
    """Which kept weights a path passes, as masks.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 1))}
      >>> net = dpai.trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 4)))
      >>> masks = {"a": jnp.ones((4, 2), bool), "b": jnp.array([[True], [False]])}
      >>> dpai.effective_weights(net, masks)["a"].tolist()
      [[True, False], [True, False], [True, False], [True, False]]

    Args:
      net: the traced network.
      masks: pytree of masks parallel to the parameters.

    Returns:
      Pytree of boolean masks like `masks`, true where a weight is kept and effective.

    Raises:
      ValueError: if the masks' tree or shapes are not those of the network.
    """
    return net.tree(effective(net, checks.masks(net, masks)), lambda: jnp.ones((), bool))


def effective(net: Network, kept: list[Array]) -> list[Array]:
    """Which kept weights a path passes, from boolean masks to boolean masks."""
    return _effective(net, kept, reached(net, kept))


@meshes.program(like=lambda kept, _: kept, layers=lambda kept, _: kept, by_numpy="exactly")
def _effective(_: Network, kept: list[Array], reached: list[Array]) -> list[Array]:
    return [k & r for k, r in zip(kept, reached, strict=True)]


def _counts(net: Network, groups: list[Group], kept: list[Array]) -> list[Array]:
    """For each group of layers what `_count_layers` counts."""
    found, axes = reached(net, kept), _axes(net)
    return [_count_layers(g.owner, g.of(kept), g.of(found), axes=tuple(g.of(axes))) for g in groups]


def _axes(net: Network) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The axes of each layer's input features, and of its taps."""
    return [(layer.inputs, layer.taps) for layer in net.layers]


@meshes.program(
    layers=lambda kept, _: kept,
    by_numpy=lambda axes: Quick(functools.partial(_count_layers_by_numpy, axes=axes)),
)
def _count_layers(
    _: Network | None, kept: list[Array], reached: list[Array], *, axes: tuple[Any, ...]
) -> Array:
    """The weights kept, the effective weights, nodes and kernels of each layer, (layer, 4)."""
    effective = [k & r for k, r in zip(kept, reached, strict=True)]
    kernels = [_any(e, taps) for e, (_, taps) in zip(effective, axes, strict=True)]
    nodes = [_any(k, inputs) for k, (inputs, _) in zip(kernels, axes, strict=True)]
    counts = counts_of([*kept, *effective, *nodes, *kernels], are_small(kept) * 4)
    return counts.reshape(4, len(kept)).T


def _count_layers_by_numpy(
    kept: list[np.ndarray], reached: list[np.ndarray], *, axes: tuple[Any, ...]
) -> np.ndarray:
    found = []
    for k, r, (inputs, taps) in zip(kept, reached, axes, strict=True):
        effective = k & r
        kernels = effective.any(taps, keepdims=True)
        found.append([*map(np.count_nonzero, (k, effective, kernels.any(inputs), kernels))])
    return np.asarray(found, np.uint32)


def _any(flags: Array, axes: tuple[int, ...]) -> Array:
    """Whether any is true along some axes, which keep size one."""
    return jnp.any(flags, axes, keepdims=True) if axes else flags
