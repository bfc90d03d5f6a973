"""Counts written as flows and read back, and random shapes, for the tests of values and rules."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpai_jax.paths import EXACT, REACH, Flow, Interpreter, Weight
from dpai_jax.paths import values as v
from dpai_jax.tools import powers


def flow(
    counts: Any,
    shape: tuple[int, ...] | None = None,
    *,
    exponent: int = 0,
    unit: Hashable = None,
    ancestors: Iterable[Hashable] = (),
    at_zero: float = 0.0,
) -> Flow:
    """A flow of `counts * 2**exponent`, which have size one along the uniform axes of `shape`."""
    mantissa, filled = counts, np.True_
    if not isinstance(counts, jax.core.Tracer):
        # In numpy, as JAX would compile anew for each shape that a test draws.
        largest = np.max(counts, initial=0.0)
        shift = int(np.frexp(largest)[1])
        mantissa = jnp.asarray(np.ldexp(counts, -shift).astype(np.float32))
        exponent, filled = exponent + shift, np.bool(largest > 0)
    return Flow(
        mantissa,
        jnp.asarray(np.int32(exponent)),
        mantissa.shape if shape is None else shape,
        object() if unit is None else unit,
        frozenset(ancestors),
        at_zero,
        filled,
    )


def binary(array: Any) -> Flow:
    """A flow as a saturating evaluation holds it: one where there is a path, zero elsewhere."""
    mantissa = jnp.asarray(np.asarray(array, np.float32))
    return Flow(mantissa, jnp.asarray(np.int32(0)), mantissa.shape, object())


def weight(array: Any, leaf: int = 0) -> Weight:
    """The mask of the kernel that is this leaf of the parameters."""
    mask = array if isinstance(array, jax.core.Tracer) else jnp.asarray(np.float32(array))
    return Weight(mask, ((leaf, tuple(frozenset({i}) for i in range(mask.ndim))),))


def counts(value: Flow) -> np.ndarray:
    """The counts of a flow at every position, in float64."""
    mantissa = np.asarray(value.mantissa, np.float64)
    return np.broadcast_to(np.ldexp(mantissa, int(value.exponent)), value.shape)


def draw(seed: int, *shape: int) -> np.ndarray:
    """Small whole numbers, some of them zero: float32 adds and multiplies them without rounding."""
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.float64)


def evaluate(
    fn: Callable[..., Any],
    *values: v.Value,
    dtypes: Iterable[Any] = (),
    gates: str = "jacobian",
    saturating: bool = False,
) -> Any:
    """What a function gives in path semantics, its arguments having the given values."""
    types = list(dtypes) or [jnp.float32] * len(values)
    structs = [
        jax.ShapeDtypeStruct(value.shape, dtype) for value, dtype in zip(values, types, strict=True)
    ]
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*structs)
    results = Interpreter(gates, REACH if saturating else EXACT).evaluate(jaxpr, *values)
    for result, shape in zip(results, jax.tree.leaves(shapes), strict=True):
        assert result.shape == shape.shape
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def gradients(fn: Callable[..., Flow], probe: np.ndarray, *at: Any) -> list[np.ndarray]:
    """The gradients in each array of `at` of the sum over `probe * counts` of `fn(*at)`."""

    def total(*arrays: jax.Array) -> jax.Array:
        result = fn(*arrays)
        uniform = tuple(i for i, size in enumerate(result.mantissa.shape) if size == 1)
        each = jnp.asarray(np.sum(probe, uniform, keepdims=True, dtype=np.float32))
        return jnp.sum(result.mantissa * each) * powers.power_of_two(result.exponent)

    arrays = [jnp.asarray(np.float32(array)) for array in at]
    return [np.float64(slope) for slope in jax.grad(total, tuple(range(len(at))))(*arrays)]


def factors(a: Flow, b: Flow, gates: str) -> tuple[np.ndarray, np.ndarray]:
    """The counts with which the factors of a product take part in it."""
    x, y = counts(a), counts(b)
    if gates == "jacobian" or a.always_alive == b.always_alive:
        return x, y
    gate, signal = (x, y) if a.always_alive else (y, x)
    scaled = gate * 0.0
    if gates == "balanced" and gate.any():
        scaled = gate * (signal.max() / gate.max())
    return (scaled, y) if a.always_alive else (x, scaled)


def assert_normal(value: Flow) -> None:
    """Holds a flow to its normal form, and its mantissa to axes that are whole or of size one."""
    largest = float(jnp.max(value.mantissa, initial=0.0))
    assert largest == 0 or 0.5 <= largest < 1
    for size, full in zip(value.mantissa.shape, value.shape, strict=True):
        assert size in (1, full)


def uniform_along_some(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with some of its axes of size one."""
    return tuple(int(rng.choice((size, size, 1))) for size in shape)


@dataclasses.dataclass(frozen=True)
class Window:
    """How a filter moves along one spatial axis."""

    size: int
    taps: int
    stride: int
    padding: tuple[int, int]
    dilation: int
    kernel_dilation: int

    @property
    def steps(self) -> int:
        """At how many positions the filter stops."""
        padded = (self.size - 1) * self.dilation + 1 + sum(self.padding)
        return (padded - (self.taps - 1) * self.kernel_dilation - 1) // self.stride + 1

    def position(self, step: int, tap: int) -> int | None:
        """Which entry a tap meets; none where it falls on padding or between entries."""
        at = step * self.stride + tap * self.kernel_dilation - self.padding[0]
        inside = at % self.dilation == 0 and 0 <= at // self.dilation < self.size
        return at // self.dilation if inside else None


def random_window(rng: np.random.Generator) -> Window:
    """A filter's way along an axis, padding and dilations of both kinds on every other one."""
    padding = tuple(rng.integers(-1, 3, 2).tolist()) if rng.random() < 0.5 else (0, 0)
    stride, *dilations = (rng.random(3) < (0.5, 0.25, 0.3)) + 1
    size, taps = rng.integers(1, (5, 4)).tolist()
    window = Window(size, taps, int(stride), padding, *map(int, dilations))
    return window if window.steps > 0 else random_window(rng)
