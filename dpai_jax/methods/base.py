"""What a pruning method is: a frozen dataclass of settings with one function, `run`.

A method may have two more functions: `compile_ahead(problem)` starts to compile what `run` needs,
and `run_many` runs several methods at once whose `together` is equal, and raises if a score is NaN.

Methods work on plain lists with one item for each layer, in the order of `net.layers`.
`dpai_jax.prune` turns the lists into trees.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks, counts
from dpai_jax.allocation import Allocation, Keep
from dpai_jax.granularity import WEIGHT, Granularity
from dpai_jax.masks import select_layers
from dpai_jax.paths import Network
from dpai_jax.tools.signatures import Alike
from dpai_jax.tools.trees import shown

PyTree = Any

# A loss, `loss_fn(params, batch)`.
Loss = Callable[[PyTree, PyTree], Array]

# Called with the step, the number of steps, and what was measured at this step.
Report = Callable[[int, int, Mapping[str, float]], None]

# The most batches to read from an iterator, which may never end.
MOST_BATCHES = 128


class Data:
    """The loss and the batches given to `prune`, read when a method first asks for them."""

    def __init__(self, loss_fn: Loss | None, batches: Iterable[PyTree] | None):
        self.loss_fn, self.batches = loss_fn, batches
        self._read: tuple[Alike, Sequence[PyTree]] | None = None

    @property
    def is_given(self) -> bool:
        """Whether the caller gave a loss or batches."""
        return self.loss_fn is not None or self.batches is not None

    @property
    def is_used(self) -> bool:
        """Whether a method read them."""
        return self._read is not None

    def read(self, params: PyTree) -> tuple[Alike, Sequence[PyTree]]:
        """Reads and checks the loss and the batches; later calls return the same."""
        if self._read is None:
            if self.loss_fn is None:
                raise ValueError(
                    "loss_fn must be given to a method that prunes by a loss, got None"
                )
            checks.function("loss_fn", self.loss_fn, "loss_fn(params, batch)")
            batches = read_batches(self.batches)
            if not batches:
                raise ValueError("batches must hold at least one batch for loss_fn, got none")
            _check_loss(self.loss_fn, params, batches)
            self._read = Alike(self.loss_fn), batches
        return self._read


def read_batches(batches: Any) -> Sequence[PyTree]:
    """The batches as a sequence; an iterator is read."""
    if isinstance(batches, list | tuple):
        return batches
    is_array = hasattr(batches, "dtype")
    if is_array or isinstance(batches, str | dict) or not isinstance(batches, Iterable | None):
        raise TypeError(f"batches must be a list of batches, got {shown(batches)}")
    return tuple(itertools.islice(batches or (), MOST_BATCHES))


def _check_loss(loss_fn: Loss, params: PyTree, batches: Sequence[PyTree]) -> None:
    for batch in (batches[0], batches[-1]):
        try:
            loss = jax.eval_shape(loss_fn, params, batch)
        except Exception as error:
            reason = " ".join(str(error).split()).partition(". ")[0][:120]
            raise TypeError(
                "loss_fn(params, batch) fails on one of batches (a single batch (x, y) is given as "
                f"[(x, y)]): {reason}"
            ) from error
        if not hasattr(loss, "shape") or loss.shape != ():
            found = getattr(loss, "shape", type(loss).__name__)
            raise TypeError(f"loss_fn must return a scalar, got {found}")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a method has to prune.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> class Smallest:
      ...     def run(self, problem):
      ...         scores = [-jnp.abs(w) for w in problem.weights()]
      ...         masks = problem.select(scores, problem.keep(dpai.erk))
      ...         return dpai.Pruned(masks, scores)
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.arange(8.0).reshape(4, 2)}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=Smallest())
      >>> result.masks["w"].tolist()
      [[True, True], [True, True], [False, False], [False, False]]

    Attributes:
      net: the traced network.
      params: its parameters at initialisation.
      sparsity: the fraction of prunable weights to remove, in [0, 1).
      key: a random key.
      report: takes progress.
      fn: the network, `fn(params, x)`.
      x: its input; only its shape and dtype are used.
      given: the loss and the batches, if there are any.
      granularity: which weights stand or fall together.
    """

    net: Network
    params: PyTree
    sparsity: float
    key: Array
    report: Report
    fn: Callable[[PyTree, PyTree], PyTree]
    x: PyTree
    given: Data = dataclasses.field(default_factory=lambda: Data(None, None))
    granularity: Granularity = WEIGHT

    def data(self) -> tuple[Alike, Sequence[PyTree]]:
        """The loss and the batches, for a method that prunes by them.

        The loss can be a static argument: it is equal to any other loss of the same code and
        values.

        Raises:
          ValueError: if they were not given.
          TypeError: if they do not fit.
        """
        return self.given.read(self.params)

    def weights(self) -> list[Array]:
        """The layers' weights at initialisation.

        Raises:
          TypeError: if `params` holds shapes in place of values.
        """
        weights = self.net.leaves(self.params)
        for layer, w in zip(self.net.layers, weights, strict=True):
            if isinstance(w, jax.ShapeDtypeStruct):
                raise TypeError(
                    f"params must hold values for this method, but {layer.name} is {w!r}"
                )
        return weights

    def keep(self, allocation: Allocation, sparsity: float | None = None) -> Keep:
        """The number of weights to keep in each layer, or one for all; checked.

        Where weights stand in groups, the numbers are what `select` takes.

        Args:
          allocation: a method's setting.
          sparsity: the problem's if not given.

        Raises:
          TypeError, ValueError: if the allocation gives anything but such numbers.
        """
        asked = self.sparsity if sparsity is None else sparsity
        return self.granularity.keep(self.net, allocation, asked)

    def select(self, scores: list[Array], keep: Keep) -> list[Array]:
        """The masks that keep the weights, or the groups, of the highest scores.

        Weights that no mask can make effective come last. Ties under one threshold over all layers
        go by the order of the parameters, as in `dpai_jax.binarize`.
        """
        ranked = counts.rank_last(self.net, scores, -math.inf)
        parts = self.granularity.parts(self.net)
        if isinstance(keep, list):
            return select_layers(ranked, keep, parts)
        order = np.argsort([layer.index for layer in self.net.layers])
        parts = tuple(parts[i] for i in order) if parts else ()
        masks = select_layers([ranked[i] for i in order], keep, parts)
        return [masks[i] for i in np.argsort(order)]

    def weights_of(self, keep: Keep, masks: list[Array]) -> int:
        """How many weights `select` has kept."""
        if self.granularity.is_weight:
            return sum(int(np.sum(k)) for k in jax.tree.leaves(keep))
        return sum(
            int(np.sum(n)) for n in jax.device_get([jnp.sum(m, dtype=jnp.uint32) for m in masks])
        )

    def refuse_groups(self, name: str) -> None:
        """Raises a ValueError if weights stand in groups, for a method that takes single ones."""
        if not self.granularity.is_weight:
            raise ValueError(
                f"granularity must be 'weight' with method {name}, which chooses single weights, "
                f"got {self.granularity.name!r}"
            )


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What a method returns, in lists over the layers.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> scores = [jnp.array([[2.0, -1.0]])]
      >>> dpai.Pruned([s > 0 for s in scores], scores).masks[0].tolist()
      [[True, False]]

    Attributes:
      masks: the boolean masks.
      scores: the scores that they were made of.
      history: arrays of one length, what was measured along the way; empty for one-shot methods.
      rank: makes what weights are preferred by, the highest first; the scores if not given.
    """

    masks: list[Array]
    scores: list[Array]
    history: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rank: Callable[[], list[Array]] | None = None


class Method(Protocol):
    """A pruning method: its settings, and a function `run`.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> class Last:  # keeps the weights of the last outputs
      ...     def run(self, problem):
      ...         scores = [jnp.broadcast_to(jnp.arange(2.0), (4, 2))]
      ...         return dpai.Pruned(problem.select(scores, problem.keep(dpai.erk)), scores)
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=Last()).masks["w"].tolist()
      [[False, True], [False, True], [False, True], [False, True]]
    """

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network."""
        ...
