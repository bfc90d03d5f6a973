"""What a pruning method is: a frozen dataclass of its settings with one function, `run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax.paths import Network

PyTree = Any

# How many weights to keep: a pytree parallel to the parameters with a number for each layer, or one
# number for all layers together, and so one threshold.
Allocation = Callable[[Network, float], PyTree]

# A loss, `loss_fn(params, batch)`.
Loss = Callable[[PyTree, PyTree], Array]

# Called with the step, the number of steps, and what was measured there.
Report = Callable[[int, int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a method has to prune.

    Attributes:
      net: the traced network.
      params: its parameters at initialisation.
      sparsity: the fraction of prunable weights to remove, in [0, 1).
      key: a random key.
      report: takes progress.
      fn: the network, `fn(params, x)`.
      x: its input, of which only the shape is meant.
      loss_fn: the loss, `loss_fn(params, batch)`, or nothing.
      batches: the batches for it.
    """

    net: Network
    params: PyTree
    sparsity: float
    key: Array
    report: Report
    fn: Callable[[PyTree, PyTree], PyTree]
    x: PyTree
    loss_fn: Loss | None = None
    batches: Sequence[PyTree] = ()

    def data(self) -> tuple[Loss, Sequence[PyTree]]:
        """The loss and the batches, for a method that prunes by them.

        Raises:
          ValueError: if they were not given.
        """
        if self.loss_fn is None or not self.batches:
            missing = "loss_fn" if self.loss_fn is None else "batches"
            given = "none" if self.loss_fn is None else "no batch"
            raise ValueError(
                f"this method prunes by loss_fn(params, batch) on batches, but {missing} holds "
                f"{given}"
            )
        return self.loss_fn, self.batches

    def weights(self) -> list[Array]:
        """The layers' weights at initialisation.

        Raises:
          TypeError: if `params` holds shapes in place of values.
        """
        weights = self.net.leaves(self.params)
        for layer, w in zip(self.net.layers, weights, strict=True):
            if isinstance(w, jax.ShapeDtypeStruct):
                raise TypeError(
                    f"this method prunes by the values of params, but {layer.name} is {w!r}"
                )
        return weights


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What a method gives back.

    Attributes:
      masks: pytree of boolean masks parallel to the parameters.
      scores: pytree of the scores that they were made of.
      history: arrays of one length, what was measured along the way; empty for one-shot methods.
      stopped: why it ended before its last step, or an empty string.
      rank: makes the pytree by which weights are preferred, the highest first, for those who ask;
        by the scores if not given.
    """

    masks: PyTree
    scores: PyTree
    history: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    stopped: str = ""
    rank: Callable[[], PyTree] | None = None


class Method(Protocol):
    """A pruning method."""

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network."""
        ...


def numpy_generator(key: Array) -> np.random.Generator:
    """NumPy's generator for a random key, for what is drawn on the host."""
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))


def score_tree(net: Network, scores: list[Array]) -> PyTree:
    """The tree of scores that has these at the layers."""
    return net.tree(scores, lambda: np.float32(0))
