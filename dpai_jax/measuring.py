"""What remains of a network under masks: its effective paths, nodes, kernels and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks
from dpai_jax.counts import counted, reached
from dpai_jax.paths import Network
from dpai_jax.tools import meshes
from dpai_jax.tools.rows import Group, are_small, counts_of, groups_of, in_order
from dpai_jax.tools.switches import usual_switches

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LayerTopology:
    """What remains of one layer (of all its copies, where layers are stacked in one kernel).

    Example:
      >>> import dpai_jax as dpai
      >>> layer = dpai.LayerTopology("w", size=8, weights=4, effective=3, nodes=2, kernels=3)
      >>> layer.density
      0.5

    Attributes:
      name: the kernel's path among the parameters.
      size: the number of its weights before pruning.
      weights: how many are kept.
      effective: how many of those lie on a path from the input to the output.
      nodes: output features with an effective incoming weight.
      kernels: pairs of an input and an output feature joined by an effective weight.
    """

    name: str
    size: int
    weights: int
    effective: int
    nodes: int
    kernels: int

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return self.weights / self.size


@dataclasses.dataclass(frozen=True)
class Topology:
    """What remains of a network under masks; printed, it is a table of the layers.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> net = dpai.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}, jnp.ones((1, 4)))
      >>> print(dpai.topology(net, {"w": jnp.eye(4, 2, dtype=bool)}))
      layer          weights  density  effective   nodes   kernels
      w                    2   0.2500          2       2         2
      all layers           2   0.2500          2       2         2
      log-paths 0.69

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

    def __str__(self) -> str:
        width = max(len("all layers"), *(len(layer.name) for layer in self.layers))
        head = f"{'layer':<{width}} {'weights':>11} {'density':>8} {'effective':>10}"
        head += f" {'nodes':>7} {'kernels':>9}"
        rows = [
            f"{r.name:<{width}} {r.weights:>11,} {r.density:>8.4f} {r.effective:>10,}"
            f" {r.nodes:>7,} {r.kernels:>9,}"
            for r in self.layers
        ]
        density = self.weights / self.size
        total = f"{'all layers':<{width}} {self.weights:>11,} {density:>8.4f} {self.effective:>10,}"
        total += f" {self.nodes:>7,} {self.kernels:>9,}"
        return "\n".join([head, *rows, total, f"log-paths {self.log_paths:.2f}"])


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
    return measure(net, [checks.masks(net, masks)])[0]


def measure(net: Network, masks: Sequence[list[Array]]) -> list[Topology]:
    """`topology` of several masks, each a list of the layers' boolean arrays."""
    # All are under way before the first is read.
    groups = groups_of(net, masks[0])
    found = jax.device_get(
        [(counted(net, kept, "exact", 1.0), _counts(net, groups, kept)) for kept in masks]
    )
    return [_topology(net, log_paths, in_order(groups, counts)) for log_paths, counts in found]


def _topology(net: Network, log_paths: np.ndarray, counts: list[np.ndarray]) -> Topology:
    layers = (
        LayerTopology(layer.name, layer.size, *map(int, numbers))
        for layer, numbers in zip(net.layers, counts, strict=True)
    )
    return Topology(float(np.float32(log_paths)), tuple(layers))


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


@meshes.program(like=lambda kept, _: kept, layers=lambda kept, _: kept)
def _effective(_: Network, kept: list[Array], reached: list[Array]) -> list[Array]:
    return [k & r for k, r in zip(kept, reached, strict=True)]


def _counts(net: Network, groups: list[Group], kept: list[Array]) -> list[Array]:
    """For each group of layers what `_count_layers` counts."""
    found, axes = reached(net, kept), _axes(net)
    return [_count_layers(g.owner, g.of(kept), g.of(found), axes=tuple(g.of(axes))) for g in groups]


def _axes(net: Network) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The axes of each layer's input features, and of its taps."""
    return [(layer.inputs, layer.taps) for layer in net.layers]


@meshes.program(layers=lambda kept, _: kept)
def _count_layers(
    _: Network | None, kept: list[Array], reached: list[Array], *, axes: tuple[Any, ...]
) -> Array:
    """The weights kept, the effective weights, nodes and kernels of each layer, (layer, 4)."""
    effective = [k & r for k, r in zip(kept, reached, strict=True)]
    kernels = [_any(e, taps) for e, (_, taps) in zip(effective, axes, strict=True)]
    nodes = [_any(k, inputs) for k, (inputs, _) in zip(kernels, axes, strict=True)]
    counts = counts_of([*kept, *effective, *nodes, *kernels], are_small(kept) * 4)
    return counts.reshape(4, len(kept)).T


def _any(flags: Array, axes: tuple[int, ...]) -> Array:
    """Whether any is true along some axes, which keep size one."""
    return jnp.any(flags, axes, keepdims=True) if axes else flags
