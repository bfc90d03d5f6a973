"""Order-independent, bitwise reproducible sums: the same on any number of devices.

Floats are added in fixed point, as integers, so the order of the terms does not matter. Two
integers hold a term. Bits below about 2^-36 of the largest term are dropped, a few more the more
terms there are.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.tools.powers import inverse, largest_entry, power_above


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product_sum(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """The sum of `a * b` over some axes, which keep size one.

    Args:
      a: float32 array.
      b: float32 array of the same rank; the two broadcast.
      axes: the axes to sum over.

    Returns:
      float32 array. Neither the sums nor their derivatives depend on the order of the terms.
    """
    sizes = np.broadcast_shapes(a.shape, b.shape)
    n_terms = math.prod(sizes[i] for i in axes)
    a, b = (x if x.size == math.prod(sizes) else materialize(x) for x in (a, b))
    if n_terms == 1:
        return a * b
    scale_a, scale_b = _scale(a), _scale(b)
    below_one = (a * inverse(scale_a)) * (b * inverse(scale_b))
    return _sum_below_one(below_one, axes) * scale_a * scale_b


def _forward(a: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, tuple[Array, Array]]:
    return product_sum(a, b, axes), (a, b)


def _backward(
    _axes: tuple[int, ...], factors: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    sizes = np.broadcast_shapes(*(factor.shape for factor in factors))

    def gradient(of: Array, other: Array) -> Array:
        repeated = tuple(i for i, size in enumerate(sizes) if of.shape[i] < size)
        return jnp.broadcast_to(product_sum(cotangent, other, repeated), of.shape)

    a, b = factors
    return gradient(a, b), gradient(b, a)


product_sum.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_over(array: Array, axes: tuple[int, ...]) -> Array:
    """The sum of a float32 array over some axes, which keep size one.

    The last axis is summed first, as it is contiguous in memory.
    """
    scale = _scale(array)
    total = array * inverse(scale)
    for stage in (axes[-1:], axes[:-1]):
        held = _held(math.prod(array.shape[i] for i in stage))
        total, scale = _sum_below_one(total, stage) / held, scale * held
    return total * scale


sum_over.defvjp(
    lambda array, axes: (sum_over(array, axes), jnp.zeros((*array.shape, 0), array.dtype)),
    lambda _, like, cotangent: (product_sum(cotangent, jnp.ones(like.shape[:-1], like.dtype), ()),),
)


def _scale(array: Array) -> Array:
    """A power of two above all magnitudes."""
    # Second derivatives may be negative.
    return power_above(largest_entry(lax.stop_gradient(jnp.abs(array))))


def _held(n_terms: int) -> float:
    """A power of two that a sum of this many terms below one cannot exceed."""
    return float(2 ** math.ceil(math.log2(max(n_terms, 1))))


def _sum_below_one(terms: Array, axes: tuple[int, ...]) -> Array:
    """The sum over some axes, which keep size one, of terms of magnitude below one."""
    n_terms = math.prod(terms.shape[i] for i in axes)
    if n_terms == 1:
        return terms
    digit = 2.0**30 / _held(n_terms)
    scaled = terms * digit
    whole = lax.floor(scaled)
    digits = [lax.convert_element_type(x, jnp.int32) for x in (whole, (scaled - whole) * digit)]
    high, low = (total.astype(jnp.float32) for total in totals(digits, axes))
    return (high + low * (1 / digit)) * (1 / digit)


def totals(arrays: Sequence[Array], axes: Sequence[int]) -> list[Array]:
    """The sums of arrays of one shape over some axes, which keep size one, in one pass.

    Booleans are counted, up to 2^32 of them. XLA on CPUs may write out the operand of a reduction
    of one operand. A variadic reduce fuses its producers if every output is used.
    """
    terms = [x.astype(jnp.uint32) if x.dtype == bool else x for x in arrays]
    sums = lax.reduce(
        terms,
        [jnp.zeros((), x.dtype) for x in terms],
        lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
        tuple(axes),
    )
    return [jnp.expand_dims(x, tuple(axes)) for x in sums]


def count_true(flags: Array) -> Array:
    """The number of true entries, uint32."""
    # The false entries only make it a reduction of two operands (see `totals`).
    rows, others = totals([flags, ~flags], (flags.ndim - 1,))
    return jnp.sum(jnp.where(others < flags.shape[-1], rows, 0), dtype=jnp.uint32)


def materialize(array: Array) -> Array:
    """Identity that stops XLA on CPUs from recomputing `array` in every consumer.

    XLA fuses the producers of a small array into each entry of a larger one that it broadcasts to.
    It does not fuse a variadic reduce whose outputs are all used. `lax.optimization_barrier` does
    not help: XLA on CPUs removes it before it fuses.
    """
    pair = jnp.broadcast_to(array, (2, *array.shape))
    high, low = lax.reduce(
        [pair, pair],
        [jnp.full((), -jnp.inf, array.dtype), jnp.full((), jnp.inf, array.dtype)],
        lambda xs, ys: [jnp.maximum(xs[0], ys[0]), jnp.minimum(xs[1], ys[1])],
        (0,),
    )
    return jnp.maximum(high, low)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_taps(array: Array, axes: tuple[int, ...]) -> Array:
    """The sum over short axes, such as a filter's taps; they keep size one.

    Written out slice by slice, it fuses with its neighbours. A reduction of a few entries that are
    far apart in memory takes a CPU many times as long.
    """
    places = itertools.product(*(range(array.shape[i]) for i in axes))
    slices = [
        lax.slice(
            array,
            [place[axes.index(i)] if i in axes else 0 for i in range(array.ndim)],
            [place[axes.index(i)] + 1 if i in axes else n for i, n in enumerate(array.shape)],
        )
        for place in places
    ]
    return functools.reduce(jnp.add, slices)


sum_taps.defvjp(
    lambda array, axes: (sum_taps(array, axes), jnp.zeros((*array.shape, 0))),
    lambda _, like, cotangent: (jnp.broadcast_to(cotangent, like.shape[:-1]),),
)
