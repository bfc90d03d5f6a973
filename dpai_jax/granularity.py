"""Granularities: which weights stand or fall together, and how many of them a sparsity keeps.

This is the one place that knows them. A method asks its `Problem` for numbers and masks, and needs
no code of its own; `dpai_jax.grouping` does the work within compiled programs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jax import Array

from dpai_jax.allocation import Allocation, Keep, resolve, weights_to_keep
from dpai_jax.counts import once_per_network
from dpai_jax.grouping import Blocks, Parts, Span
from dpai_jax.paths import Layer, Network
from dpai_jax.paths.channels import are_outputs
from dpai_jax.tools import meshes
from dpai_jax.tools.trees import shown

_BLOCKS = re.compile(r"([1-9]\d*):([1-9]\d*)")

# How far a sparsity may be from 1 − N/M, so that 0.667 can be said for 1:3.
_ROUNDED = 5e-4

_are_outputs = once_per_network(are_outputs)


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Single weights. Other granularities are subclasses.

    Attributes:
      name: as `dpai_jax.prune` takes it.
    """

    name: str = "weight"

    @property
    def is_weight(self) -> bool:
        """Whether each weight stands alone."""
        return True

    def parts(self, net: Network) -> Parts:
        """What `dpai_jax.grouping` needs to know of each layer."""
        del net
        return ()

    def check(self, net: Network, sparsity: float) -> None:
        """Refuses a sparsity that cannot be.

        Raises:
          TypeError, ValueError: as `weights_to_keep`; and if it does not fit the granularity.
        """
        weights_to_keep(net, sparsity)

    def keep(self, net: Network, allocation: Allocation, sparsity: float) -> Keep:
        """How many to keep, as `dpai_jax.grouping.select` takes it; checked."""
        return resolve(net, allocation, sparsity)

    def check_kept(self, net: Network, masks: list[Array], kept: int, sparsity: float) -> None:
        """Checks what a method has kept.

        Raises:
          RuntimeError: if it is not what was asked for: a defect of the method.
        """
        del masks
        if kept != (asked := weights_to_keep(net, sparsity)):
            raise RuntimeError(f"kept {kept} weights where {asked} were asked for")


WEIGHT = Granularity()


@dataclasses.dataclass(frozen=True)
class Groups(Granularity):
    """Groups that are kept or removed whole: kernels, or channels.

    A kernel is the taps that join an input feature to an output feature, so in a layer without taps
    a single weight. A channel is an output feature with all of its weights; of layers whose
    features are the network's outputs all channels stay.
    """

    @property
    def is_weight(self) -> bool:
        """See `Granularity`."""
        return False

    def parts(self, net: Network) -> tuple[Span, ...]:
        """See `Granularity`."""
        by_channel = self.name == "channel"
        whole = _are_outputs(net) if by_channel else [False] * len(net.layers)
        return tuple(
            _span(layer, (*layer.inputs, *layer.taps) if by_channel else layer.taps, is_whole)
            for layer, is_whole in zip(net.layers, whole, strict=True)
        )

    def check(self, net: Network, sparsity: float) -> None:
        """See `Granularity`."""
        asked = weights_to_keep(net, sparsity)
        least = sum(
            layer.size if part.is_whole else layer.copies * part.size
            for layer, part in zip(net.layers, self.parts(net), strict=True)
        )
        if asked < least:
            raise ValueError(
                f"sparsity {sparsity} keeps {asked} of {net.size} weights, fewer than {least}: one "
                f"{self.name} for each layer"
                + (", and all of those that write the outputs" if self.name == "channel" else "")
            )

    def keep(self, net: Network, allocation: Allocation, sparsity: float) -> Keep:
        """The number of groups in each layer, or that of weights in all.

        The allocation's numbers of weights are the layers' shares. Each is rounded up or down to
        whole groups, such that the total comes as near as it can. A layer whose share is less than
        a group keeps one, and the others keep less in proportion.
        """
        self.check(net, sparsity)
        numbers = resolve(net, allocation, sparsity)
        if not isinstance(numbers, list):
            return numbers
        parts = self.parts(net)
        triples = list(zip(net.layers, parts, numbers, strict=True))
        copies = [
            (int(number), part.size, layer.size // layer.copies if part.is_whole else part.size)
            for layer, part, of_layer in triples
            for number in np.broadcast_to(of_layer, part.copies).ravel()
        ]
        found = iter(in_groups(weights_to_keep(net, sparsity), *zip(*copies, strict=True)))
        return [
            np.asarray([next(found) for _ in range(layer.copies)], np.int64).reshape(part.copies)
            for layer, part in zip(net.layers, parts, strict=True)
        ]

    def check_kept(self, net: Network, masks: list[Array], kept: int, sparsity: float) -> None:
        """See `Granularity`."""
        parts, asked = self.parts(net), weights_to_keep(net, sparsity)
        _check_all(self, net, _are_spans(None, masks, parts=parts))
        if abs(kept - asked) > max(part.size for part in parts) / 2:
            raise RuntimeError(f"kept {kept} weights where about {asked} were asked for")


@dataclasses.dataclass(frozen=True)
class NOfM(Granularity):
    """N of every M consecutive weights along a layer's inputs; an allocation plays no part.

    Attributes:
      n: N.
      m: M.
    """

    n: int = 2
    m: int = 4

    @property
    def is_weight(self) -> bool:
        """See `Granularity`."""
        return False

    def parts(self, net: Network) -> tuple[Blocks, ...]:
        """See `Granularity`."""
        return tuple(Blocks(layer.inputs, self.m) for layer in net.layers)

    def check(self, net: Network, sparsity: float) -> None:
        """See `Granularity`."""
        weights_to_keep(net, sparsity)
        if abs(sparsity - (1 - self.n / self.m)) > _ROUNDED:
            raise ValueError(
                f"sparsity must be {1 - self.n / self.m:.4g} with granularity {self.name!r}, got "
                f"{sparsity}"
            )

    def keep(self, net: Network, allocation: Allocation, sparsity: float) -> Keep:
        """The number to keep of M, for each layer: N, or more at a lower sparsity on the way."""
        del allocation
        number = max(self.n, math.ceil(self.m * (1 - sparsity) - self.m * _ROUNDED))
        return [np.int64(number) for _ in net.layers]

    def check_kept(self, net: Network, masks: list[Array], kept: int, sparsity: float) -> None:
        """See `Granularity`."""
        del kept, sparsity
        numbers = [np.int32(self.n)] * len(masks)
        _check_all(self, net, _are_blocks(None, masks, numbers, parts=self.parts(net)))


def parsed(granularity: Any) -> Granularity:
    """The granularity of a name.

    Raises:
      ValueError: if there is none.
    """
    if isinstance(granularity, str):
        if granularity == WEIGHT.name:
            return WEIGHT
        if granularity in ("kernel", "channel"):
            return Groups(granularity)
        if match := _BLOCKS.fullmatch(granularity):
            n, m = map(int, match.groups())
            if n < m:
                return NOfM(granularity, n, m)
    raise ValueError(
        "granularity must be weight, kernel, channel or N:M with N < M such as 2:4, got "
        f"{shown(granularity)}"
    )


def in_groups(
    total: int, shares: Sequence[int], sizes: Sequence[int], least: Sequence[int]
) -> list[int]:
    """Numbers of groups whose weights come as near to a total as rounding the shares permits.

    Args:
      total: the number of weights to keep, no less than the sum of `least`.
      shares: numbers of weights, of which the total is the sum.
      sizes: the number of weights in a group of each.
      least: the fewest weights that each keeps, whole groups.

    Returns:
      The numbers of groups. With the shares scaled down to make room for `least`, each is its share
      rounded up or down; of equally near totals the lower one is taken, and shares of larger
      remainders are rounded up first.
    """
    ideal = _scaled(total, shares, least)
    numbers = [math.floor(x / size) for x, size in zip(ideal, sizes, strict=True)]
    rest = [x - n * size for x, n, size in zip(ideal, numbers, sizes, strict=True)]
    # Those of one size are alike, but for their remainders.
    by_size: dict[int, list[int]] = {}
    for i, remainder in enumerate(rest):
        if remainder:
            by_size.setdefault(sizes[i], []).append(i)
    natural = [round(sum(rest[i] for i in places) / size) for size, places in by_size.items()]
    gap = int(sum(rest))
    chosen = _subset(gap, [(s, len(p)) for s, p in by_size.items()], natural)
    for places, number in zip(by_size.values(), chosen, strict=True):
        for i in sorted(places, key=lambda i: (-rest[i], i))[:number]:
            numbers[i] += 1
    return numbers


def _scaled(total: int, shares: Sequence[int], least: Sequence[int]) -> list[Fraction]:
    """The shares in proportion, but for those that are raised to the least."""
    raised: set[int] = set()
    while True:
        others = [i for i in range(len(shares)) if i not in raised]
        left = total - sum(least[i] for i in raised)
        scale = Fraction(left, max(sum(shares[i] for i in others), 1))
        below = {i for i in others if scale * shares[i] < least[i]}
        if not below:
            return [Fraction(least[i]) if i in raised else scale * s for i, s in enumerate(shares)]
        raised |= below


def _subset(total: int, items: Sequence[tuple[int, int]], natural: Sequence[int]) -> list[int]:
    """How many items of each size to take so that their sum comes nearest to a total.

    Args:
      total: the sum to come near to.
      items: sizes, and how many items there are of each.
      natural: of several ways to one sum, that which stays near these numbers is taken.

    Returns:
      The numbers.
    """
    # Sums that can be had are the bits of an integer.
    sums = [1]
    for size, number in items:
        found = sums[-1]
        for _ in range(number):
            found |= found << size
        sums.append(found)
    farthest = sum(size * number for size, number in items)
    candidates = (total + sign * d for d in range(farthest + 1) for sign in (-1, 1))
    target = next(t for t in candidates if t >= 0 and sums[-1] >> t & 1)
    chosen = []
    for (size, number), before, near in reversed(list(zip(items, sums, natural, strict=False))):
        most = min(number, target // size)
        ways = [n for n in range(most + 1) if before >> (target - n * size) & 1]
        _, taken = min((abs(n - near), n) for n in ways)
        chosen.append(taken)
        target -= taken * size
    return chosen[::-1]


def _check_all(granularity: Granularity, net: Network, flags: list[Array]) -> None:
    for layer, holds in zip(net.layers, jax.device_get(flags), strict=True):
        if not holds:
            raise RuntimeError(f"made masks of {layer.name} that are not by {granularity.name}")


@meshes.program(layers=lambda masks: masks)
def _are_spans(_: None, masks: list[Array], *, parts: tuple[Span, ...]) -> list[Array]:
    return [part.holds(mask) for part, mask in zip(parts, masks, strict=True)]


@meshes.program(layers=lambda masks, _: masks)
def _are_blocks(
    _: None, masks: list[Array], numbers: list[Array], *, parts: tuple[Blocks, ...]
) -> list[Array]:
    triples = zip(parts, masks, numbers, strict=True)
    return [part.holds(mask, number) for part, mask, number in triples]


def _span(layer: Layer, axes: Sequence[int], is_whole: bool) -> Span:
    own = tuple(i for i in sorted(set(axes)) if i not in (*layer.stack, *layer.outputs))
    copies = tuple(size if i in layer.stack else 1 for i, size in enumerate(layer.shape))
    return Span(own, layer.size_of(own), copies, is_whole)
