"""Sums that do not hang on the order of their terms, and so neither on the number of devices.

Floats are added up in fixed point, by integers: whichever terms meet first, the sum is the same bit
by bit. Two integers hold a term; of it is lost what is below some 2^-36 of the largest one, fewer
bits the more terms there are.
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

from dpai_jax.paths import values as v


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product_sum(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """The sum over some axes, which are left with size one, of the products of two arrays.

    Args:
      a: float32 array.
      b: another one, of the same rank; the two broadcast.
      axes: what to sum over.

    Returns:
      The sums; the same for any order of the terms, and so are their derivatives.
    """
    sizes = np.broadcast_shapes(a.shape, b.shape)
    n_terms = math.prod(sizes[i] for i in axes)
    a, b = (x if x.size == math.prod(sizes) else settled(x) for x in (a, b))
    if n_terms == 1:
        return a * b
    # Of derivatives of second order some are negative.
    exponent_a, exponent_b = (v.normalise(jnp.abs(x), jnp.int32(0))[1] for x in (a, b))
    a, b = a * v.power_of_two(-exponent_a), b * v.power_of_two(-exponent_b)
    # 2^30 holds all terms, each of them below one in these units.
    digit = float(2 ** (30 - math.ceil(math.log2(max(n_terms, 1)))))
    scaled = a * b * digit
    whole = jnp.floor(scaled)
    terms = [whole.astype(jnp.int32), ((scaled - whole) * digit).astype(jnp.int32)]
    high, low = lax.reduce(
        terms, [jnp.int32(0)] * 2, lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)], axes
    )
    total = (high.astype(jnp.float32) + low.astype(jnp.float32) / digit) / digit
    total = total * v.power_of_two(exponent_a) * v.power_of_two(exponent_b)
    return jnp.expand_dims(total, axes)


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


def sum_over(array: Array, axes: Sequence[int]) -> Array:
    """The sum of a float32 array over some axes, which are left with size one."""
    return product_sum(array, jnp.ones((1,) * array.ndim, jnp.float32), tuple(axes))


def count_true(flags: Array) -> Array:
    """The number of true entries, uint32.

    What a reduction of one operand reduces may be written out before on CPUs, four bytes a flag.
    One of two operands, both of which are of use, reads what they are made of.
    """
    ones = flags.astype(jnp.uint32)
    rows, some = lax.reduce(
        [ones, ones],
        [jnp.uint32(0)] * 2,
        lambda xs, ys: [xs[0] + ys[0], xs[1] | ys[1]],
        (flags.ndim - 1,),
    )
    return jnp.sum(jnp.where(some > 0, rows, 0), dtype=jnp.uint32)


def settled(array: Array) -> Array:
    """The same array, worked out once.

    A small array that is spread over a large one would be worked out anew for each entry of that,
    as XLA fuses what leads to it. It leaves a reduction of several operands as it is, if all of its
    results are of use, but takes `lax.optimization_barrier` away before it fuses on CPUs.
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
def fold(array: Array, axes: tuple[int, ...]) -> Array:
    """The sum over short axes, such as a filter's taps; they are left with size one.

    Written out, slice by slice, it fuses with what is around it. A reduction of a few entries that
    lie far apart takes a CPU many times as long.
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


fold.defvjp(
    lambda array, axes: (fold(array, axes), jnp.zeros((*array.shape, 0))),
    lambda _, like, cotangent: (jnp.broadcast_to(cotangent, like.shape[:-1]),),
)
