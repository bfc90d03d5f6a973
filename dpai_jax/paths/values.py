"""The values of path semantics, one for every variable of a traced network.

A value is of one of these kinds:

* `Independent`: does not depend on the network's input; only its shape matters.
* `Weight`: the mask of a prunable kernel, after reshapes, transposes, casts and scalings;
  `WeightSum`: a sum of several.
* `Flow`: the number of paths from the input to each unit.

Flows are held in *block floating point*: a float32 mantissa whose largest entry is in [1/2, 1),
and one integer exponent for the whole array. A power of two scales without rounding, so counts
are as exact as float32 on any depth, and the scale, a constant to differentiation, cancels from
the gradient of the logarithm of a count.

An array of a flow may have size one along an axis whose logical size is larger. The count is then
*uniform* along it. The rules expand such an axis only where an operation needs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.tools.powers import largest_entry, power_of_two, scaling

Shape = tuple[int, ...]


class Spread(NamedTuple):
    """An array that stands for a larger one, to whose shape it broadcasts.

    Attributes:
      array: the array; along an axis of size one the values are uniform.
      shape: the shape of the larger array.
      below: an upper bound of all entries, if one is known when the program is built.
      order: the axes in the order in which they lie in memory, if that is known.
    """

    array: Array
    shape: Shape
    below: float | None = None
    order: tuple[int, ...] | None = None

    def full(self, *axes: int) -> Spread:
        """The same values with the given axes expanded, or all axes if none is given."""
        spread = set(axes) if axes else set(range(len(self.shape)))
        sizes = zip(self.array.shape, self.shape, strict=True)
        target = tuple(full if i in spread else size for i, (size, full) in enumerate(sizes))
        return self._replace(array=jnp.broadcast_to(self.array, target))

    def uniform(self, axis: int) -> bool:
        """Whether all values along the axis are equal and held only once."""
        return self.array.shape[axis] == 1


def ones(shape: Shape) -> Spread:
    """A one at every position, held as a single number."""
    return Spread(jnp.ones((1,) * len(shape), jnp.float32), shape)


class Known:
    """A value that depends on constants alone, computed when a rule first asks for it.

    Like the array of a flow it may have size one along uniform axes. A value that depends on a
    loop counter is a traced array, given from the start.
    """

    def __init__(self, compute: Callable[[], Array | np.ndarray], shape: Shape, traced: bool):
        self._compute = compute
        self._value: Array | np.ndarray | None = None
        self.shape = shape
        self.traced = traced

    @classmethod
    def of(cls, value: Array | np.ndarray) -> Known:
        """Wraps a value that is already computed."""
        return cls(lambda: value, np.shape(value), isinstance(value, jax.core.Tracer))

    @property
    def value(self) -> Array | np.ndarray:
        """The value itself."""
        if self._value is None:
            with jax.ensure_compile_time_eval():
                self._value = self._compute()
        return self._value

    @property
    def scalar(self) -> float | None:
        """The number at every position, if it is the same everywhere and not traced."""
        if self.traced or math.prod(self.shape) != 1:
            return None
        value = np.asarray(self.value)
        return float(value.item()) if np.isrealobj(value) else None


@dataclasses.dataclass(frozen=True)
class Independent:
    """A value that does not depend on the network's input.

    Attributes:
      shape: its shape.
      known: its value, if it depends on constants alone.
      at_zero: for a boolean from comparing flows, its value when all flows are zero.
    """

    shape: Shape
    known: Known | None = None
    at_zero: float | None = None

    @property
    def scalar(self) -> float | None:
        """The known number at every position, if it is the same everywhere."""
        return None if self.known is None else self.known.scalar


# For each axis of a view of a kernel, the axes of the kernel that it is made of.
Axes = tuple[frozenset[int], ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """The mask of one prunable kernel, or of several put together.

    Attributes:
      array: the mask as float32, of the view's full shape.
      sources: for each kernel in it, its index among the leaves of the parameters, and its axes
        that each axis of the view is made of.
      below: an upper bound of all entries, if known.
      gains: ones that broadcast to the view, by which it is multiplied. Each goes along with a
        kernel's features, and is applied to the counts before or behind the kernel, so that its
        derivative, the share of all paths that pass a feature, takes no pass over the kernel.
      exponent: int32 scalar, the power of two that the mask is a multiple of; of one if None.
    """

    array: Array
    sources: tuple[tuple[int, Axes], ...]
    below: float | None = None
    gains: tuple[Array, ...] = ()
    exponent: Array | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the view."""
        return self.array.shape

    @property
    def spread(self) -> Spread:
        """The mask with its shape."""
        axes = self.sources[0][1]
        order = tuple(sorted(range(len(axes)), key=lambda i: min(axes[i], default=i)))
        return Spread(self.array, self.shape, self.below, order)

    @property
    def terms(self) -> tuple[Weight, ...]:
        """The weight itself, as the only term of a sum (see `WeightSum`)."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class WeightSum:
    """A sum of kernels of one shape that is used as one kernel. Each term adds its own paths.

    For example, a complex kernel is the sum of its real and its imaginary part.
    """

    terms: tuple[Weight, ...]

    @property
    def shape(self) -> Shape:
        """The shape of each term."""
        return self.terms[0].shape


@dataclasses.dataclass(frozen=True)
class Flow:
    """The number of paths from the network's input to each unit: `mantissa * 2**exponent`.

    Attributes:
      mantissa: float32, broadcastable to `shape`; its largest entry is near one, or it is zero.
      exponent: int32 scalar.
      shape: the logical shape.
      unit: identifies the unit. Elementwise functions of one unit keep it.
      ancestors: the units that it was derived from without passing a kernel.
      at_zero: the unit's value where no path reaches it, φ(0) of the activation functions since the
        last kernel. If it is not zero, the unit is alive everywhere. `math.inf` means some number
        other than zero.
      filled: boolean scalar, false only if the mantissa is zero.
      constants: the paths from constants that were concatenated with it (a learned class token). A
        unit that such a path reaches is alive, even if no path from the input reaches it.
      views: the ancestors that it contains completely, but transposed, reshaped or repeated.
      below: an upper bound of the mantissa's entries, if known.
    """

    mantissa: Array
    exponent: Array
    shape: Shape
    unit: Hashable
    ancestors: frozenset[Hashable] = frozenset()
    at_zero: float = 0.0
    filled: Array | np.bool = np.True_
    views: frozenset[Hashable] = frozenset()
    constants: Flow | None = None
    below: float | None = None

    @property
    def spread(self) -> Spread:
        """The mantissa with its logical shape."""
        return Spread(self.mantissa, self.shape, self.below)

    @property
    def lineage(self) -> frozenset[Hashable]:
        """The unit itself and its ancestors."""
        return self.ancestors | {self.unit}

    @property
    def always_alive(self) -> bool:
        """Whether the unit is alive even where no path reaches it."""
        return self.at_zero != 0.0

    def alive(self) -> Array:
        """One where the unit is alive, zero where it is dead; a constant for gradients."""
        if self.always_alive:
            return jnp.ones((1,) * len(self.shape), jnp.float32)
        alive = self.mantissa > 0
        if self.constants is not None:
            alive = alive | (self.constants.mantissa > 0)
        return lax.stop_gradient(alive.astype(jnp.float32))


Value = Independent | Weight | WeightSum | Flow

jax.tree_util.register_dataclass(
    Flow,
    ["mantissa", "exponent", "filled", "constants"],
    ["shape", "unit", "ancestors", "views", "at_zero", "below"],
)
jax.tree_util.register_dataclass(Weight, ["array", "gains", "exponent"], ["sources", "below"])
jax.tree_util.register_dataclass(WeightSum, ["terms"], [])


replace = dataclasses.replace


def normalise(array: Array, exponent: Array) -> tuple[Array, Array, Array]:
    """The same counts with the largest entry in [1/2, 1), and whether any is above zero."""
    largest = largest_entry(lax.stop_gradient(array))
    _, inverse, power = scaling(largest)
    return array * inverse, exponent + power, largest > 0


@jax.custom_vjp
def saturate(array: Array) -> Array:
    """Clips counts to one where there is a path, and zero elsewhere; gradients likewise."""
    return (array > 0.5).astype(array.dtype)


saturate.defvjp(lambda array: (saturate(array), None), lambda _, g: ((g > 0.5).astype(g.dtype),))


def as_flow(value: Value) -> Flow:
    """A value as a flow; one that is independent of the input has no path, and is dead if zero."""
    if isinstance(value, Flow):
        return value
    at_zero = 0.0 if isinstance(value, Independent) and value.scalar == 0 else math.inf
    zeros = jnp.zeros((1,) * len(value.shape), jnp.float32)
    return Flow(zeros, jnp.int32(0), value.shape, None, at_zero=at_zero, filled=np.False_)


def align(flows: Sequence[Flow]) -> tuple[list[Array], Array]:
    """The mantissas of several flows under one exponent."""
    # An empty flow must not set the common exponent, as it might push the others out of float32's
    # range. The gradient of an empty flow, the paths that it would add, is clipped.
    exponent, scales = _common([flow.exponent for flow in flows], [flow.filled for flow in flows])
    return [flow.mantissa * scale for flow, scale in zip(flows, scales, strict=True)], exponent


@jax.jit
def _common(exponents: list[Array], filled: list[Array]) -> tuple[Array, list[Array]]:
    """The largest exponent of the flows that are not empty, and each flow's scale under it."""
    common = jnp.int32(_LOWEST)
    for exponent, is_filled in zip(exponents, filled, strict=True):
        common = jnp.maximum(common, jnp.where(is_filled, exponent, _LOWEST))
    common = jnp.where(common == _LOWEST, exponents[0], common)
    return common, [power_of_two(jnp.minimum(exponent - common, 64)) for exponent in exponents]


def largest_exponent(exponents: Array, filled: Array) -> Array:
    """The largest of a vector of exponents, without those of empty flows."""
    largest = jnp.max(jnp.where(filled, exponents, _LOWEST), initial=_LOWEST)
    return jnp.where(largest == _LOWEST, 0, largest)


_LOWEST = -(2**30)
