"""The channel graph: which features of kernels lead to which, with no kernel between.

A feature that one kernel writes is followed alone: the network is evaluated with a one at that
feature, behind the kernel, and zeros wherever else paths start. Where something arrives at the
inputs of the other kernels, those features read it. As every kernel starts anew, no contraction
with a kernel is ever computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax.paths.following import Following
from dpai_jax.paths.network import Network
from dpai_jax.paths.values import Shape

# Features followed at once.
_TOGETHER = 128

# The numbers of weights are sent through a trace as two digits, each exact in float32.
_BASE = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """A network as a graph of the features that its kernels read and write.

    A kernel used twice, or in several steps of a scan, stands here once for each use. Features are
    numbered kernel by kernel, group by group: those that are read from 0 on, and likewise those
    that are written.

    Attributes:
      kernels: for each use of a kernel, in the order of evaluation, the numbers of its weights as
        an array (groups, inputs, outputs, taps). Weights are numbered through all layers, each
        in C order; −1 where there is none that can be pruned.
      written, read: the edges, pairs of a feature written and a feature that reads it, by the
        number of the first and then of the second.
      entered: for each feature read, whether the network's input reaches it without a kernel.
      left: for each feature written, whether the network's output reads it without a kernel.
    """

    kernels: tuple[np.ndarray, ...]
    written: np.ndarray
    read: np.ndarray
    entered: np.ndarray
    left: np.ndarray

    def reversed(self) -> Channels:
        """The graph with all its edges turned round; all numbers run from the last to the first."""
        read, written = len(self.left) - 1 - self.written, len(self.entered) - 1 - self.read
        order = np.lexsort((read, written))
        kernels = tuple(k[::-1, ::-1, ::-1].swapaxes(1, 2) for k in reversed(self.kernels))
        return Channels(kernels, written[order], read[order], self.left[::-1], self.entered[::-1])

    def without_dead_ends(self) -> Channels:
        """The graph without what no path from the input to the output passes."""
        return self._leading_out().reversed()._leading_out().reversed()

    def _leading_out(self) -> Channels:
        """The graph without what leads to no output."""
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
    cost hangs on the number of features, hardly on the size of the maps.

    Args:
      net: the traced network.

    Returns:
      The graph.
    """
    kernels, mixed = _kernels(net)
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
    return Channels(kernels, written[inner], read[inner], entered, left)


def _kernels(net: Network) -> tuple[tuple[np.ndarray, ...], list[bool]]:
    """The uses of kernels by the numbers of their weights; which hold others than those, too."""

    @jax.jit
    def views(leaves: list[Array]) -> list[Array]:
        evaluation = Following(gates="jacobian", saturating=True)
        net._outputs(leaves, evaluation)
        return evaluation.kernels

    def through(leaf: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        arrays, first = [], 0
        for layer in net.layers:
            numbers = np.arange(first, first + layer.size).reshape(layer.shape)
            arrays.append(jnp.asarray(leaf(numbers), jnp.float32))
            first += layer.size
        return [np.asarray(view) for view in views(arrays)]

    # Views are linear in the leaves. What nobody prunes is a one in them, whatever the leaves.
    rest = through(np.zeros_like)
    present = [view - r == 1 for view, r in zip(through(np.ones_like), rest, strict=True)]
    high = through(lambda numbers: numbers // _BASE)
    low = through(lambda numbers: numbers % _BASE)
    dtype = np.int32 if net.size < 2**31 else np.int64
    kernels = tuple(
        np.where(p, (h - r).astype(dtype) * _BASE + (w - r).astype(dtype), dtype(-1))
        for p, h, w, r in zip(present, high, low, rest, strict=True)
    )
    return kernels, [bool(np.any(r)) for r in rest]


def _follow(
    net: Network, shapes: Sequence[Shape], mixed: Sequence[bool]
) -> Callable[[Array], Array]:
    """Where features lead, by their number: to each feature read and, last, to the output."""
    sizes = [groups * outputs for groups, _, outputs, _ in shapes]
    ends = np.cumsum(sizes)
    leaves = [jnp.zeros(layer.shape, jnp.float32) for layer in net.layers]

    def follow(feature: Array) -> Array:
        starts = [
            (jnp.arange(end - size, end, dtype=jnp.int32) == feature).astype(jnp.float32)
            for size, end in zip(sizes, ends, strict=True)
        ]
        start = (feature == int(ends[-1])).astype(jnp.float32)
        evaluation = Following("jacobian", True, start=start, starts=starts, mixed=mixed)
        flows = net._outputs(leaves, evaluation)
        output = sum((jnp.sum(flow.mantissa) for flow in flows), jnp.float32(0))
        return jnp.concatenate([*evaluation.reads, output[None]]) > 0

    return jax.jit(jax.vmap(follow))
