"""Uses of kernels: the record that every contraction rule builds where a kernel meets a flow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from dpai_jax.paths import values as v
from dpai_jax.paths.counting import Counting
from dpai_jax.paths.values import Axes, Flow, Shape, Spread, Weight


class Contract(Protocol):
    """A contraction of a flow and a kernel."""

    def __call__(self, flow: Spread, weight: Spread, *, by_taps: bool = False) -> Spread:
        """The counts behind the kernel; `by_taps` computes a grouped convolution tap by tap."""
        ...


class AxesOfLeaf(NamedTuple):
    """The index of a kernel among the leaves of the parameters, and the roles of its axes."""

    leaf: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[int, ...]
    groups: int


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """One use of a kernel as the weight of a contraction with a flow.

    Axes are those of the kernel as it is used here, after reshapes and transposes.

    Attributes:
      weight: the kernel's mask.
      flow: what it is contracted with.
      inputs, outputs, taps: the axes over input features, output features and filter positions.
      batch: the axes over groups, where groups have their own axes.
      groups: the number of groups that the output features are split into along their own axis.
      reads: maps axes of the kernel to axes of the flow.
      writes: maps axes of the kernel to axes of the result.
      contract: the contraction.
      shape: the shape of the result.
      is_lookup: whether token ids look up rows; then every token is an input feature.
    """

    weight: Weight
    flow: Flow
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[int, ...]
    batch: tuple[int, ...]
    groups: int
    reads: Mapping[int, int]
    writes: Mapping[int, int]
    contract: Contract
    shape: Shape
    is_lookup: bool = False

    def count(self) -> Spread:
        """The counts behind the kernel."""
        return self.contract(self.flow.spread, self.weight.spread)

    def plain(self, counting: Counting) -> tuple[KernelUse, list[Array]]:
        """The use of the mask alone: gains are applied to the flow, or left for the result.

        Args:
          counting: how paths are counted.

        Returns:
          The use, and gains that broadcast to its result.
        """
        flow, weight, behind = self.flow, self.weight, []
        for gain in weight.gains:
            axes = {i for i, size in enumerate(gain.shape) if size > 1}
            if axes <= self.writes.keys():
                behind.append(_placed(gain, self.writes, len(self.shape)))
            elif axes <= self.reads.keys() and self.groups == 1:
                placed = _placed(gain, self.reads, len(flow.shape))
                flow = v.replace(flow, mantissa=counting.product(flow.mantissa, placed))
            else:
                weight = v.replace(weight, array=counting.product(weight.array, gain))
        weight = v.replace(weight, gains=(), exponent=None)
        return dataclasses.replace(self, flow=flow, weight=weight), behind

    def kernel(self) -> Array:
        """The mask as (groups, inputs, outputs, taps)."""
        order = (*self.batch, *self.inputs, *self.outputs, *self.taps)
        batch, inputs, outputs, taps = (
            math.prod(self.weight.shape[i] for i in axes)
            for axes in (self.batch, self.inputs, self.outputs, self.taps)
        )
        array = self.weight.array.transpose(order)
        array = array.reshape(batch, inputs, self.groups, outputs // self.groups, taps)
        return array.swapaxes(1, 2).reshape(batch * self.groups, inputs, -1, taps)

    def arriving(self) -> Array:
        """The counts at the input features, group by group, summed over positions; flat."""
        axes = [self.reads[i] for i in (*self.batch, *self.inputs)]
        array = self.flow.spread.full(*axes).array if axes else self.flow.mantissa
        kept = sorted(axes)
        sums = jnp.sum(array, [i for i in range(array.ndim) if i not in axes])
        return sums.transpose([kept.index(axis) for axis in axes]).ravel()

    def behind(self, features: Array) -> Spread:
        """The result with these counts at the output features, the same at every position."""
        written = [i for i in (*self.batch, *self.outputs) if i in self.writes]
        array = features.reshape([self.weight.shape[i] for i in written])
        places = [self.writes[i] for i in written]
        array = array.transpose(sorted(range(len(places)), key=places.__getitem__))
        others = [i for i in range(len(self.shape)) if i not in places]
        return Spread(jnp.expand_dims(array, others), self.shape)

    def axes_of_leaves(self) -> list[AxesOfLeaf]:
        """The roles of each kernel's axes in this contraction."""
        found = []
        for leaf, axes in self.weight.sources:
            inputs, taps = _own(axes, self.inputs), _own(axes, self.taps)
            # An axis merged from input and output features counts as an input.
            outputs = _own(axes, (*self.outputs, *self.batch))
            outputs = tuple(i for i in outputs if i not in inputs + taps)
            # Blocks of input features that are multiplied separately and then summed are no groups.
            groups = [self.weight.shape[i] for i in self.batch if axes[i].isdisjoint(inputs)]
            found.append(AxesOfLeaf(leaf, inputs, outputs, taps, self.groups * math.prod(groups)))
        return found


def _placed(array: Array, places: Mapping[int, int], rank: int) -> Array:
    """An array of the given rank in which axes have these places; along others its size is one."""
    order, sizes = sorted(places, key=places.__getitem__), [1] * rank
    for axis, place in places.items():
        sizes[place] = array.shape[axis]
    others = [i for i in range(array.ndim) if i not in places]
    return array.transpose(*order, *others).reshape(sizes)


def _own(axes: Axes, of_view: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(frozenset().union(*(axes[i] for i in of_view))))
