"""The channel graph: which features of kernels lead to which, with no kernel in between.

Each feature that a kernel writes is followed by itself. The network is evaluated with a one at that
feature, behind the kernel, and with zeros wherever else paths start. The features that read it are
those at which something arrives, at the inputs of other kernels. Paths end at every kernel, so no
contraction with a kernel is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax.paths.counting import Reach
from dpai_jax.paths.interpreter import Interpreter
from dpai_jax.paths.kernels import KernelUse
from dpai_jax.paths.network import Network
from dpai_jax.paths.values import Flow, Shape, Spread

# How many features to follow at once.
_TOGETHER = 128

# Weights' numbers go through a trace as two digits to this base, each exact in float32.
_BASE = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """A network as a graph of the features that its kernels read and write.

    A kernel that is used twice, or in several steps of a scan, has one entry for each use. Features
    are numbered from 0, kernel by kernel and group by group: those that are read, and separately
    those that are written.

    Attributes:
      kernels: for each use of a kernel, in the order of evaluation, the numbers of its weights as
        an array (groups, inputs, outputs, taps). Weights are numbered through all layers, each
        in C order; −1 where there is no prunable weight.
      written, read: the edges, pairs of a feature written and a feature that reads it, sorted by
        the first and then by the second.
      entered: for each feature read, whether the network's input reaches it without a kernel.
      left: for each feature written, whether the network's output reads it without a kernel.
    """

    kernels: tuple[np.ndarray, ...]
    written: np.ndarray
    read: np.ndarray
    entered: np.ndarray
    left: np.ndarray

    def reversed(self) -> Channels:
        """The graph with all edges reversed, and features numbered from the last."""
        read, written = len(self.left) - 1 - self.written, len(self.entered) - 1 - self.read
        order = np.lexsort((read, written))
        kernels = tuple(k[::-1, ::-1, ::-1].swapaxes(1, 2) for k in reversed(self.kernels))
        return Channels(kernels, written[order], read[order], self.left[::-1], self.entered[::-1])

    def without_dead_ends(self) -> Channels:
        """The graph without weights and edges on no path from the input to the output."""
        return self._leading_out().reversed()._leading_out().reversed()

    def _leading_out(self) -> Channels:
        """The graph without weights and edges from which no path leads to the output."""
        kernels: list[np.ndarray] = []
        read, reaches = np.zeros(len(self.entered), bool), self.left.copy()
        n_in, n_out = len(self.entered), len(self.left)
        for kernel in reversed(self.kernels):
            groups, inputs, outputs, _ = kernel.shape
            first_in, first_out = n_in - groups * inputs, n_out - groups * outputs
            edges = slice(*np.searchsorted(self.written, [first_out, n_out]))
            reaches[self.written[edges][read[self.read[edges]]]] = True
            open_ = reaches[first_out:n_out].reshape(groups, 1, outputs, 1)
            kernels.insert(0, np.where(open_, kernel, kernel.dtype.type(-1)))
            read[first_in:n_in] = np.any(kernels[0] >= 0, (2, 3)).ravel()
            n_in, n_out = first_in, first_out
        kept = read[self.read]
        return Channels(
            tuple(kernels), self.written[kept], self.read[kept], self.entered & read, self.left
        )


def channels(net: Network) -> Channels:
    """The channel graph of a network.

    Other factors of a product count as alive, so a feature that a gate or attention's logits are
    made of leads wherever the product does. What is uniform along positions is held once, so the
    cost depends on the number of features and hardly on the size of the maps.

    Args:
      net: the traced network.

    Returns:
      The graph.
    """
    # Each step of a scan is a separate use.
    net = net.unrolled()
    kernels, mixed = numbered_weights(net, KernelUse.kernel)
    outputs = sum(k.shape[0] * k.shape[2] for k in kernels)
    inputs = sum(k.shape[0] * k.shape[1] for k in kernels)
    follow = _follow(net, [k.shape for k in kernels], mixed)
    edges, left = [], np.zeros(outputs, bool)
    # The feature after the last one stands for the network's input.
    for first in range(0, outputs + 1, _TOGETHER):
        rows = np.asarray(follow(jnp.arange(first, first + _TOGETHER, dtype=jnp.int32)))
        edges.append(np.argwhere(rows[:, :inputs]) + np.asarray([first, 0]))
        followed = left[first : first + _TOGETHER]
        followed |= rows[: len(followed), inputs]
    written, read = np.concatenate(edges).T
    entered = np.zeros(inputs, bool)
    entered[read[written == outputs]] = True
    inner = written < outputs
    return Channels(tuple(kernels), written[inner], read[inner], entered, left)


class _Open(Reach):
    """As `Reach`, but every factor of a product counts as alive."""

    tracks_constants = False

    def alive(self, flow: Flow) -> Array:
        return jnp.ones((1,) * len(flow.shape), jnp.float32)


_OPEN = _Open()


def numbered_weights(
    net: Network, view: Callable[[KernelUse], Array]
) -> tuple[list[np.ndarray], list[bool]]:
    """The numbers of the weights in each use of a kernel, in the order of evaluation.

    Args:
      net: the traced network, without scans.
      view: gives an array from a use, linear in the kernel's weights.

    Returns:
      For each use an integer array of the view's shape, with numbers as in `Network.ravel`, −1
      where there is no prunable weight; and whether a one stands at any of those places.
    """

    @jax.jit
    def views(leaves: list[Array]) -> list[Array]:
        found: list[Array] = []

        def look(use: KernelUse) -> Spread:
            found.append(view(use))
            return use.count()

        net.evaluate(leaves, Interpreter("jacobian", _OPEN, look))
        return found

    def through(leaf: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        arrays = net.unravel(leaf(np.arange(net.size)).astype(np.float32))
        return [np.asarray(view) for view in views(arrays)]

    # Views are linear in the leaves. Weights that are not prunable are ones, whatever the leaves.
    rest = through(np.zeros_like)
    present = [seen - r == 1 for seen, r in zip(through(np.ones_like), rest, strict=True)]
    high = through(lambda numbers: numbers // _BASE)
    low = through(lambda numbers: numbers % _BASE)
    dtype = np.int32 if net.size < 2**31 else np.int64
    numbers = [
        np.where(p, (h - r).astype(dtype) * _BASE + (w - r).astype(dtype), dtype(-1))
        for p, h, w, r in zip(present, high, low, rest, strict=True)
    ]
    return numbers, [bool(np.any(r)) for r in rest]


def _follow(
    net: Network, shapes: Sequence[Shape], mixed: Sequence[bool]
) -> Callable[[Array], Array]:
    """A function from features' numbers to where they lead: features read and, last, the output."""
    sizes = [groups * outputs for groups, _, outputs, _ in shapes]
    ends = np.cumsum(sizes)
    leaves = _zeros(net)

    def follow(feature: Array) -> Array:
        starts = [
            (jnp.arange(end - size, end, dtype=jnp.int32) == feature).astype(jnp.float32)
            for size, end in zip(sizes, ends, strict=True)
        ]
        start = (feature == int(ends[-1])).astype(jnp.float32)
        reads: list[Array] = []

        def start_anew(use: KernelUse) -> Spread:
            """Ends paths at every kernel, and starts new ones at the feature that is followed."""
            number = len(reads)
            reads.append(use.arriving())
            behind = use.behind(starts[number])
            if not mixed[number]:
                return behind
            # The masks are zero here, so paths pass only by weights that are not prunable.
            return Spread(behind.array + use.count().array, use.shape)

        interpreter = Interpreter("jacobian", _OPEN, start_anew, start)
        flows = net.evaluate(leaves, interpreter)
        output = sum((jnp.sum(flow.mantissa) for flow in flows), jnp.float32(0))
        return jnp.concatenate([*reads, output[None]]) > 0

    return jax.jit(jax.vmap(follow))


def _zeros(net: Network) -> list[Array]:
    """A zero for each weight, written by NumPy: JAX would compile a program for each shape."""
    return [jnp.asarray(np.zeros(layer.shape, np.float32)) for layer in net.layers]


def are_outputs(net: Network) -> list[bool]:
    """For each layer, whether the network's output reads what it writes with no kernel between."""
    places = {layer.index: i for i, layer in enumerate(net.layers)}
    leaves = _zeros(net)

    @jax.jit
    @jax.grad
    def reads(starts: Array) -> Array:
        def start_anew(use: KernelUse) -> Spread:
            """Paths end at every kernel, and start behind it."""
            own = [starts[places[leaf]] for leaf, _ in use.weight.sources]
            written = [i for i in (*use.batch, *use.outputs) if i in use.writes]
            features = math.prod(use.weight.shape[i] for i in written)
            return use.behind(jnp.broadcast_to(jnp.max(jnp.stack(own)), (features,)))

        flows = net.evaluate(leaves, Interpreter("jacobian", _OPEN, start_anew, 0.0))
        return sum((jnp.sum(flow.mantissa) for flow in flows), jnp.float32(0))

    found = jax.device_get(reads(jnp.ones(len(leaves), jnp.float32)))
    return [bool(x > 0) for x in found]
