"""The values of path semantics: what every variable of a traced network stands for.

A variable is one of these kinds:

* `Independent`: does not depend on the network's input; only its shape matters.
* `Weight`: the mask of a prunable kernel, seen through reshapes, transposes, casts and scalings;
  `WeightSum`: several of them, added up.
* `Flow`: the number of paths from the input to each unit.

Flows are held in *block floating point*: a float32 mantissa whose largest entry is in [1/2, 1),
and one integer exponent for the whole array. A power of two scales without rounding, so counts
are as exact as float32 on any depth, and the scale, a constant to differentiation, cancels from
the gradient of the logarithm of a count.

An array of a flow may have size one along an axis whose logical size is larger: the count is then
*uniform* along it. The rules spread such an axis only where an operation needs it.
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
    """An array that stands for a larger one: axes of size one are uniform along `shape`.

    Attributes:
      array: the array.
      shape: the shape of the one that it stands for.
      below: what no entry exceeds, where that is known when the program is built.
    """

    array: Array
    shape: Shape
    below: float | None = None

    def full(self, *axes: int) -> Spread:
        """The same values with the given axes written out; all axes where none is given."""
        spread = set(axes) if axes else set(range(len(self.shape)))
        sizes = zip(self.array.shape, self.shape, strict=True)
        target = tuple(full if i in spread else size for i, (size, full) in enumerate(sizes))
        return self._replace(array=jnp.broadcast_to(self.array, target))

    def uniform(self, axis: int) -> bool:
        """Whether the values along the axis are held once for all."""
        return self.array.shape[axis] == 1


def ones(shape: Shape) -> Spread:
    """A one at every position, held as a single number."""
    return Spread(jnp.ones((1,) * len(shape), jnp.float32), shape)


class Known:
    """A value computed from constants alone, when a rule first asks for it.

    Like the array of a flow it may have size one along axes that are uniform.
    A value that depends on the counter of a loop is a traced array, known from the start.
    """

    def __init__(self, compute: Callable[[], Array | np.ndarray], shape: Shape, traced: bool):
        self._compute = compute
        self._value: Array | np.ndarray | None = None
        self.shape = shape
        self.traced = traced

    @classmethod
    def of(cls, value: Array | np.ndarray) -> Known:
        """A value that is there already."""
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
        """The number that it holds at every position, if there is one and it can be read now."""
        if self.traced or math.prod(self.shape) != 1:
            return None
        value = np.asarray(self.value)
        return float(value.item()) if np.isrealobj(value) else None


@dataclasses.dataclass(frozen=True)
class Independent:
    """A value that does not depend on the network's input.

    Attributes:
      shape: its shape.
      known: its value, where it is computed from constants alone.
      at_zero: for a boolean from comparing flows, its value when all flows are zero.
    """

    shape: Shape
    known: Known | None = None
    at_zero: float | None = None

    @property
    def scalar(self) -> float | None:
        """The known number that it holds at every position, if there is one."""
        return None if self.known is None else self.known.scalar


# For each axis of a view of kernels, the axes of a kernel that it is made of.
Axes = tuple[frozenset[int], ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """The mask of one prunable kernel, or of several put together.

    Attributes:
      array: the mask as float32, of the view's full shape.
      sources: for each kernel in it, by its index among the leaves of the parameters, the kernel's
        axes that each axis of the view is made of.
      below: what no entry exceeds, where that is known.
    """

    array: Array
    sources: tuple[tuple[int, Axes], ...]
    below: float | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the view."""
        return self.array.shape

    @property
    def spread(self) -> Spread:
        """The mask with its shape."""
        return Spread(self.array, self.shape, self.below)

    @property
    def terms(self) -> tuple[Weight, ...]:
        """The weight as a sum of one term (see `WeightSum`)."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class WeightSum:
    """Kernels of one shape that are added up and used as one, each giving paths of its own.

    The real and the imaginary part of a complex kernel are such terms.
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
      unit: which unit it is. Elementwise functions of one unit keep it.
      ancestors: the units that it was derived from without passing a kernel.
      at_zero: what the unit gives where no path reaches it, φ(0) of the activation functions since
        the last kernel. Not zero: the unit is alive everywhere. `math.inf`: some number, not zero.
      filled: boolean scalar, false only if the mantissa is zero.
      constants: where constants were put beside it (a learned class token), the paths from those:
        a unit that such a path reaches is alive, though no path from the input does.
      views: those of its ancestors that it holds whole, rearranged: transposed, reshaped, repeated.
      below: what no entry of the mantissa exceeds, where that is known.
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
        """Whether the unit gives something even where no path reaches it."""
        return self.at_zero != 0.0

    def alive(self) -> Array:
        """One where the unit gives something, zero where it is dead; a constant to gradients."""
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
jax.tree_util.register_dataclass(Weight, ["array"], ["sources", "below"])


replace = dataclasses.replace


def normalise(array: Array, exponent: Array) -> tuple[Array, Array, Array]:
    """The same counts with the largest entry in [1/2, 1), and whether there is any."""
    largest = largest_entry(lax.stop_gradient(array))
    _, inverse, power = scaling(largest)
    return array * inverse, exponent + power, largest > 0


@jax.custom_vjp
def saturate(array: Array) -> Array:
    """One where there is a path, zero where there is none; the same for gradients."""
    return (array > 0.5).astype(array.dtype)


saturate.defvjp(lambda array: (saturate(array), None), lambda _, g: ((g > 0.5).astype(g.dtype),))


def as_flow(value: Value) -> Flow:
    """A value as a flow: no path where it is free, and dead where it is known to be zero."""
    if isinstance(value, Flow):
        return value
    at_zero = 0.0 if isinstance(value, Independent) and value.scalar == 0 else math.inf
    zeros = jnp.zeros((1,) * len(value.shape), jnp.float32)
    return Flow(zeros, jnp.int32(0), value.shape, None, at_zero=at_zero, filled=np.False_)


def align(flows: Sequence[Flow]) -> tuple[list[Array], Array]:
    """The mantissas of several flows under one exponent."""
    # Ignore empty flows when choosing the common exponent: one might push the others out of
    # float32's range. The gradient of an empty flow, the paths that it would bring, is clipped.
    exponent, scales = _common([flow.exponent for flow in flows], [flow.filled for flow in flows])
    return [flow.mantissa * scale for flow, scale in zip(flows, scales, strict=True)], exponent


@jax.jit
def _common(exponents: list[Array], filled: list[Array]) -> tuple[Array, list[Array]]:
    """The largest exponent of the flows that are not empty, and by what each flow is scaled."""
    common = jnp.int32(_LOWEST)
    for exponent, is_filled in zip(exponents, filled, strict=True):
        common = jnp.maximum(common, jnp.where(is_filled, exponent, _LOWEST))
    common = jnp.where(common == _LOWEST, exponents[0], common)
    return common, [power_of_two(jnp.minimum(exponent - common, 64)) for exponent in exponents]


def largest_exponent(exponents: Array, filled: Array) -> Array:
    """The largest of a vector of exponents, those of empty flows left out."""
    largest = jnp.max(jnp.where(filled, exponents, _LOWEST), initial=_LOWEST)
    return jnp.where(largest == _LOWEST, 0, largest)


_LOWEST = -(2**30)
