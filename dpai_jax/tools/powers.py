"""Arithmetic that comes out the same everywhere: powers of two, by which scaling does not round."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def power_of_two(exponent: Array) -> Array:
    """`2**exponent` as float32, exactly; zero below the smallest normal number."""
    biased = lax.clamp(jnp.int32(-127), exponent, jnp.int32(127)) + jnp.int32(127)
    return lax.bitcast_convert_type(lax.shift_left(biased, jnp.int32(23)), jnp.float32)


def power_above(largest: Array) -> Array:
    """The next power of two above a positive float32; 1 for zero."""
    exponent = lax.bitcast_convert_type(largest, jnp.int32) & jnp.int32(0x7F80_0000)
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    return lax.select(power > 0, power + power, jnp.ones_like(power))


def exponent_of(power: Array) -> Array:
    """The exponent of a power of two, int32; of another number that of the power below it."""
    biased = lax.shift_right_logical(lax.bitcast_convert_type(power, jnp.int32), jnp.int32(23))
    return biased - jnp.int32(127)


def inverse(power: Array) -> Array:
    """One over a power of two, 0 for 2^127. XLA does not fuse a division with its neighbours."""
    bits = jnp.int32(0x7F00_0000) - lax.bitcast_convert_type(power, jnp.int32)
    return lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_jvp
def logarithm(number: Array, exponent: Array) -> Array:
    """The natural logarithm of `number * 2**exponent`, for positive normal numbers.

    Of multiplications and additions that round by themselves, so that it is the same whatever
    compiles it.
    """
    bits = lax.bitcast_convert_type(number, jnp.int32)
    one = jnp.int32(0x3F80_0000)
    part = lax.bitcast_convert_type((bits & jnp.int32(0x007F_FFFF)) | one, jnp.float32)
    is_large = part > math.sqrt(2)
    part = jnp.where(is_large, part / 2, part)
    whole = exponent_of(number) + is_large.astype(jnp.int32) + exponent
    ratio = (part - 1) / (part + 1)  # below 0.172
    square, series = ratio * ratio, jnp.full_like(ratio, 1 / 11)
    for n in (9, 7, 5, 3, 1):
        series = rounded(square * series) + 1 / n
    return rounded(whole.astype(jnp.float32) * math.log(2)) + rounded(2 * ratio * series)


@logarithm.defjvp
def _of_logarithm(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    (number, exponent), (tangent, _) = primals, tangents
    return logarithm(number, exponent), tangent / number


# The largest number of which the power of two above, and one over that, are normal numbers.
MOST = np.nextafter(np.float32(2.0**126), np.float32(0))


def rounded(product: Array) -> Array:
    """A product, at most `MOST`, rounded before it is added to another number.

    Otherwise processors that multiply and add at once round only the sum, and it depends on the
    compiler where they do.
    """
    return jnp.minimum(product, MOST)


def stages(shape: tuple[int, ...], axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The axes of a reduction, in the order in which to reduce them.

    XLA on CPUs splits a reduction over cores by the entries of its result. So a large array is
    first reduced along its last axis, which is contiguous in memory. A small array is reduced at
    once, which compiles faster.
    """
    n_terms = math.prod(shape[i] for i in axes)
    return [axes] if n_terms <= SMALL else [axes[-1:], axes[:-1]]


# One core reduces this many terms quickly.
SMALL = 2**16


# Jitted, so that within larger programs it is traced only once for each shape.
@jax.jit
def scaling(largest: Array) -> tuple[Array, Array, Array]:
    """The next power of two above a number, one over it, and its exponent."""
    power = power_above(largest)
    return power, inverse(power), exponent_of(power)


@jax.jit
def largest_entry(array: Array) -> Array:
    """The largest entry, or zero if none is above zero; not differentiable.

    XLA on CPUs writes the operand of a reduction to memory, unless the reduction has two operands
    and both results are used. The reduction compares integers, as this vectorises: the bits of
    positive floats have the same order as the floats.
    """
    most = least = lax.bitcast_convert_type(array, jnp.int32)
    for axes in stages(array.shape, tuple(range(array.ndim))):
        if math.prod(most.shape[i] for i in axes) != 1:
            most, least = lax.reduce(
                [most, least],
                [jnp.zeros((), jnp.int32)] * 2,
                lambda xs, ys: [jnp.maximum(xs[0], ys[0]), jnp.minimum(xs[1], ys[1])],
                axes,
            )
    return lax.bitcast_convert_type(jnp.maximum(most, least).reshape(()), array.dtype)
