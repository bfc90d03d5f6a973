"""Powers of two, made from the bits of a float32. Scaling by them does not round."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
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
    """The exponent of a power of two, int32."""
    biased = lax.shift_right_logical(lax.bitcast_convert_type(power, jnp.int32), jnp.int32(23))
    return biased - jnp.int32(127)


def inverse(power: Array) -> Array:
    """One over a power of two, 0 for 2^127. XLA does not fuse a division with its neighbours."""
    bits = jnp.int32(0x7F00_0000) - lax.bitcast_convert_type(power, jnp.int32)
    return lax.bitcast_convert_type(bits, jnp.float32)


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
