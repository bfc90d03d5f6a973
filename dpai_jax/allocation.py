"""How many weights each layer keeps: densities over layers, as exact integers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Protocol

import jax
import numpy as np

from dpai_jax import checks, counts
from dpai_jax.paths import Layer, Network
from dpai_jax.tools.switches import usual_switches
from dpai_jax.tools.trees import check_structure, shown

PyTree = Any


class Allocation(Protocol):
    """How many weights to keep: a function of a traced network and a sparsity.

    `erk`, `er`, `uniform` and `global_threshold` are allocations; any function of this form is one.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> def first_dense(net, sparsity):  # the first layer keeps all, the second has the rest
      ...     total, first = dpai.weights_to_keep(net, sparsity), net.layers[0].size
      ...     return {"a": first, "b": total - first}
      >>> params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 8))}
      >>> net = dpai.trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 4)))
      >>> first_dense(net, 0.5)
      {'a': 8, 'b': 4}
      >>> method = dpai.Magnitude(allocation=first_dense)
    """

    def __call__(self, net: Network, sparsity: float, /) -> PyTree:
        """Shares out the weights to keep.

        Args:
          net: the traced network.
          sparsity: fraction of all prunable weights to remove, in [0, 1).

        Returns:
          A pytree parallel to the parameters, with a number for each layer and 0 elsewhere; or one
          number for all layers together. They sum to `weights_to_keep(net, sparsity)`.
        """
        ...


# Checked numbers of weights to keep: a list over the layers, or one number for all of them.
Keep = list[Any] | int


def weights_to_keep(net: Network, sparsity: float) -> int:
    """The number of weights that a network keeps at a sparsity, `round((1 − sparsity)·N)`.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> net = dpai.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((16, 4))}, jnp.ones((1, 16)))
      >>> dpai.weights_to_keep(net, 0.9)
      6

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      The number of weights to keep.

    Raises:
      TypeError: if `net` is not a network, or `sparsity` not a number.
      ValueError: if the sparsity is outside [0, 1), or keeps fewer weights than there are layers.
    """
    checks.network(net)
    checks.number("sparsity", sparsity, "a number in [0, 1)", lambda s: 0 <= s < 1)
    # As a fraction of integers: a float32 product is off by one at 25 million weights.
    total = round((1 - Fraction(str(float(sparsity)))) * net.size)
    layers = sum(layer.copies for layer in net.layers)
    if total < layers:
        raise ValueError(
            f"sparsity {sparsity} keeps {total} of {net.size} weights, fewer than the network has "
            f"layers ({layers}): each needs at least one"
        )
    return total


def global_threshold(net: Network, sparsity: float) -> int:
    """The allocation that leaves the choice to one threshold over all layers.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> net = dpai.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((16, 4))}, jnp.ones((1, 16)))
      >>> dpai.global_threshold(net, 0.9)
      6

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      The number of weights to keep in all layers together, `weights_to_keep(net, sparsity)`.

    Raises:
      TypeError, ValueError: as `weights_to_keep`.
    """
    return weights_to_keep(net, sparsity)


def check_allocation(allocation: Any) -> None:
    """Checks a method's setting `allocation`."""
    checks.function("allocation", allocation, "allocation(net, sparsity)")


def resolve(net: Network, allocation: Allocation, sparsity: float) -> Keep:
    """Calls an allocation and checks the numbers that it returns.

    Raises:
      TypeError: if the allocation is not a function, or returns anything but integers.
      ValueError: if the numbers do not have the structure of the parameters, do not sum to the
        number of weights to keep, or exceed the size of a layer.
    """
    check_allocation(allocation)
    given = allocation(net, sparsity)
    if is_total(given, net.treedef):
        keep: Keep = checked_count(given, net.size, "all layers", "allocation").item()
        total = keep
    else:
        keep = list(keep_of_layers(net, given, "allocation"))
        total = sum(int(np.sum(number)) for number in keep)
    if total != (asked := weights_to_keep(net, sparsity)):
        raise ValueError(
            f"allocation must keep {asked} weights in all at sparsity {sparsity}, got {total}"
        )
    return keep


def keep_of_layers(net: Network, keep: PyTree | int, argument: str = "keep") -> Any:
    """Checks numbers of weights to keep; returns a list over the layers, or one for all of them."""
    if is_total(keep, net.treedef):
        return checked_count(keep, net.size, "all layers", argument)
    check_structure(keep, net.treedef, argument, "params")
    return [
        checked_count(number, layer.size, layer.name, argument)
        for layer, number in zip(net.layers, net.leaves(keep), strict=True)
    ]


def is_total(keep: Any, treedef: Any) -> bool:
    """Whether `keep` is one number for all layers of a tree together."""
    is_number = jax.tree_util.all_leaves([keep]) and np.ndim(keep) == 0
    return is_number and jax.tree.structure(keep) != treedef


def checked_count(keep: Any, size: int, name: str = "all layers", argument: str = "keep") -> Any:
    """Checks how many of `size` weights to keep: one number, or one for each copy of a layer."""
    if isinstance(keep, jax.core.Tracer):
        return keep
    numbers = np.asarray(keep)
    if not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"{argument} must hold integers, but has {shown(keep)} for {name}")
    most = size // max(numbers.size, 1)
    if numbers.size and (numbers.min() < 0 or numbers.max() > most):
        raise ValueError(
            f"{argument} must be in [0, {most}] for {name}, got {shown(numbers.tolist())}"
        )
    return numbers


def er(net: Network, sparsity: float) -> PyTree:
    """Weights to keep per layer by the Erdős-Rényi rule.

    Density is proportional to (in + out)/(in·out), whatever a convolution's taps, capped at one
    and solved again for the layers that are not full.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> params = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 4))}
      >>> net = dpai.trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 8)))
      >>> dpai.er(net, 0.75)
      {'a': 26, 'b': 22}

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      As `erk`.

    Raises:
      ValueError: as `erk`.

    References:
      Mocanu et al., Nature Communications 2018; Evci et al., Rigging the Lottery, ICML 2020.
    """
    return _allocate(net, sparsity, lambda c: (c.inputs + c.outputs) * math.prod(c.taps))


def erk(net: Network, sparsity: float) -> PyTree:
    """Weights to keep per layer by the Erdős-Rényi-kernel rule.

    Density is proportional to (taps + in + out)/(taps·in·out), the sum over the product of a
    kernel's axes, capped at one and solved again for the layers that are not full. Weights that no
    mask can make effective, such as those to features that nothing reads, get no share.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> params = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 4))}
      >>> net = dpai.trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 8)))
      >>> dpai.erk(net, 0.75)
      {'a': 26, 'b': 22}

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      Pytree parallel to the parameters of the number of weights to keep: an int for each layer,
      0 for a leaf that is not prunable, and for layers stacked in one kernel an integer array, of
      the kernel's rank and of size one but along the stack, with a number for each of them.
      The sum is exactly `round((1 − sparsity)·N)`, and at least one weight stays in each layer.

    Raises:
      TypeError, ValueError: as `weights_to_keep`.

    References:
      Evci et al., Rigging the Lottery, ICML 2020; Mocanu et al., Nature Communications 2018.
    """
    return _allocate(net, sparsity, lambda c: c.inputs + c.outputs + sum(c.taps))


def uniform(net: Network, sparsity: float) -> PyTree:
    """Weights to keep per layer at one density for all layers.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> params = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 4))}
      >>> net = dpai.trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 8)))
      >>> dpai.uniform(net, 0.75)
      {'a': 32, 'b': 16}

    Args:
      net: the traced network.
      sparsity: fraction of all prunable weights to remove, in [0, 1).

    Returns:
      As `erk`.

    Raises:
      ValueError: as `erk`.
    """
    return _allocate(net, sparsity, lambda c: c.size)


@dataclasses.dataclass(frozen=True)
class _Capacity:
    """The part of one copy of a layer that masks can make effective.

    Attributes:
      inputs, outputs: the number of features that have such a weight.
      taps: the number of positions that have one, for each axis of a filter.
      size: the number of such weights.
    """

    inputs: int
    outputs: int
    taps: tuple[int, ...]
    size: int


@counts.once_per_network
def _capacities(net: Network) -> list[_Capacity]:
    """The capacities of all copies of all layers."""
    pairs = zip(net.layers, counts.possible(net), strict=True)
    return [capacity for layer, flags in pairs for capacity in _of_copies(layer, flags)]


def _of_copies(layer: Layer, possible: np.ndarray) -> list[_Capacity]:
    """The capacities of a layer's copies, from the weights that a mask can make effective."""

    def used(flags: np.ndarray, axes: Sequence[int]) -> int:
        others = tuple(i for i in range(flags.ndim) if i not in axes)
        return int(np.count_nonzero(flags.any(others)))

    copies = np.moveaxis(possible, layer.stack, range(len(layer.stack)))
    copies = copies.reshape(-1, *copies.shape[len(layer.stack) :])
    kept = [i for i in range(possible.ndim) if i not in layer.stack]
    inputs, outputs, taps = (
        [kept.index(i) for i in axes] for axes in (layer.inputs, layer.outputs, layer.taps)
    )
    return [
        _Capacity(
            used(flags, inputs),
            used(flags, outputs),
            tuple(used(flags, [i]) for i in taps),
            int(np.count_nonzero(flags)),
        )
        for flags in copies
    ]


@usual_switches()
def _allocate(net: Network, sparsity: float, share: Callable[[_Capacity], int]) -> PyTree:
    total = weights_to_keep(net, sparsity)
    capacities = _capacities(net)
    sizes = [layer.size // layer.copies for layer in net.layers for _ in range(layer.copies)]
    usable = [max(capacity.size, 1) for capacity in capacities]
    # At low sparsities more weights are kept than can be effective.
    if total <= sum(usable):
        sizes = usable
    parts = iter(apportion(total, [max(share(c), 1) for c in capacities], sizes))
    return net.tree(
        [_per_copy(layer, [next(parts) for _ in range(layer.copies)]) for layer in net.layers], int
    )


def _per_copy(layer: Layer, keep: list[int]) -> int | np.ndarray:
    if not layer.stack:
        return keep[0]
    shape = [size if i in layer.stack else 1 for i, size in enumerate(layer.shape)]
    return np.asarray(keep, np.int64).reshape(shape)


def apportion(total: int, shares: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Splits a total in proportion to shares, each part between one and its size.

    Args:
      total: what to split, from `len(sizes)` to `sum(sizes)`.
      shares: positive weights.
      sizes: the largest that each part may be.

    Returns:
      The parts, integers that sum to the total, by largest remainder.
    """
    ideal = _capped(total, shares, sizes)
    parts = [min(max(math.floor(x), 1), size) for x, size in zip(ideal, sizes, strict=True)]
    while (missing := total - sum(parts)) != 0:
        step = 1 if missing > 0 else -1
        free = [i for i, part in enumerate(parts) if (part < sizes[i] if missing > 0 else part > 1)]
        free.sort(key=lambda i: step * (parts[i] - ideal[i]))
        for i in free[: abs(missing)]:
            parts[i] += step
    return parts


def _capped(total: int, shares: Sequence[int], sizes: Sequence[int]) -> list[Fraction]:
    """The real-valued solution: parts are proportional to shares, except those that are full."""
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in full]
        left = total - sum(sizes[i] for i in full)
        scale = Fraction(left, sum(shares[i] for i in rest)) if rest else Fraction(0)
        over = {i for i in rest if scale * shares[i] > sizes[i]}
        if not over:
            break
        full |= over
    return [Fraction(s) if i in full else scale * shares[i] for i, s in enumerate(sizes)]
