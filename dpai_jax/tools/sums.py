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
from jax.experimental.xla_metadata import set_xla_metadata

from dpai_jax.tools.powers import SMALL, largest_entry, rounded, scaling, stages

# An upper bound of all magnitudes in an array, or None if it is not known.
Bound = float | None

# How many bits of a term, counted from those of the largest term, a sum keeps at least.
_BITS = 36

# Into how many parts of equal length some rows of a large array are cut, to be added up.
_PARTS = 8

# Of so many entries at once. More than a cache holds, but far less than new memory is slow for.
_AT_ONCE = 2**22

# Numbers of terms, as powers of two, to which those of small sums are rounded up.
_FEW = (6, 12)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product_sum(
    a: Array,
    b: Array,
    axes: tuple[int, ...],
    below: tuple[Bound, Bound] = (None, None),
    write: tuple[bool, bool] = (False, False),
) -> Array:
    """The sum of `a * b` over some axes, which keep size one.

    Args:
      a: float32 array.
      b: float32 array of the same rank; the two broadcast.
      axes: the axes to sum over.
      below: upper bounds of the magnitudes in `a` and in `b`, if known; a bound saves the pass that
        finds the largest.
      write: whether to write out `a` and `b` for the sum and its derivatives (see `written_out`).

    Returns:
      float32 array. Neither the sums nor their derivatives depend on the order of the terms.
    """
    del write  # without derivatives there is only one reader
    if math.prod(np.broadcast_shapes(a.shape, b.shape)[i] for i in axes) == 1:
        return rounded(a * b)
    (scale_a, inverse_a), (scale_b, inverse_b) = scale_of(a, below[0]), scale_of(b, below[1])
    total = sum_below_one([(a, inverse_a), (b, inverse_b)], axes)
    return rounded(total * scale_a * scale_b)


def _forward(
    a: Array,
    b: Array,
    axes: tuple[int, ...],
    below: tuple[Bound, Bound],
    write: tuple[bool, bool],
) -> tuple[Array, tuple[Array, Array]]:
    a, b = (written_out(x) if is_it else x for x, is_it in zip((a, b), write, strict=True))
    return product_sum(a, b, axes, below), (a, b)


def _backward(
    _axes: tuple[int, ...],
    below: tuple[Bound, Bound],
    write: tuple[bool, bool],
    factors: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    sizes = np.broadcast_shapes(*(factor.shape for factor in factors))
    cotangent = written_out(cotangent) if any(write) else cotangent

    def gradient(i: int) -> Array:
        of, other = factors[i], factors[1 - i]
        repeated = tuple(i for i, size in enumerate(sizes) if of.shape[i] < size)
        sums = product_sum(cotangent, other, repeated, (None, below[1 - i]))
        return jnp.broadcast_to(sums, of.shape)

    return gradient(0), gradient(1)


product_sum.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_over(array: Array, axes: tuple[int, ...]) -> Array:
    """The sum of a float32 array over some axes, which keep size one.

    The last axis is summed first, as it is contiguous in memory.
    """
    scale, inverse = scale_of(array)
    total = array
    for stage in stages(array.shape, axes):
        held = held_by(array.shape, stage)
        total, scale, inverse = sum_below_one([(total, inverse)], stage), scale * held, 1 / held
    return total * inverse * scale


sum_over.defvjp(
    lambda array, axes: (sum_over(array, axes), jnp.zeros((*array.shape, 0), array.dtype)),
    lambda _, like, cotangent: (product_sum(cotangent, jnp.ones(like.shape[:-1], like.dtype), ()),),
)


def scale_of(array: Array, below: Bound = None) -> tuple[Array | float, Array | float]:
    """A power of two above all magnitudes in an array, and one over it."""
    if below is not None:
        power = 2.0 ** (math.frexp(below)[1])
        return power, 1 / power
    # Second derivatives may be negative.
    power, inverse, _ = scaling(largest_entry(lax.abs(lax.stop_gradient(array))))
    return power, inverse


@jax.custom_vjp
def scaled(array: Array, factor: Array | float) -> Array:
    """An array times a constant that broadcasts to it; it and its derivative are `rounded`."""
    return rounded(array * factor)


scaled.defvjp(
    lambda array, factor: (scaled(array, factor), factor),
    lambda factor, cotangent: (scaled(cotangent, factor), jnp.zeros_like(factor)),
)


def held_by(shape: Sequence[int], axes: Sequence[int]) -> float:
    """A power of two that the sum over some axes of terms below one cannot exceed."""
    return _held(math.prod(shape[i] for i in axes))


def _held(n_terms: int) -> float:
    exponent = math.ceil(math.log2(max(n_terms, 1)))
    # Rounded up to one of a few, so that sums of different lengths share what is compiled.
    return 2.0 ** next((few for few in _FEW if exponent <= few), exponent)


# A float32 array, and by what to multiply it.
Factor = tuple[Array, Array | float]


@functools.partial(jax.jit, static_argnums=1)
def sum_below_one(factors: Sequence[Factor], axes: tuple[int, ...]) -> Array:
    """The sum of a product over some axes, which keep size one, in one pass.

    Args:
      factors: what is multiplied; arrays of one rank that broadcast. All products are of magnitude
        below one.
      axes: the axes to sum over.

    Returns:
      float32 array.
    """
    shape = np.broadcast_shapes(*(x.shape for x, _ in factors))
    n_terms = math.prod(shape[i] for i in axes)
    if n_terms == 1:
        return _product(factors)
    digits, base = digits_of(_product(factors), n_terms)
    sums = _totals_by_rows(factors, axes) if _is_by_columns(shape, axes) else totals(digits, axes)
    return from_digits(sums, base)


def _product(factors: Sequence[Factor]) -> Array:
    return functools.reduce(jnp.multiply, [x * scale for x, scale in factors])


def digits_of(terms: Array, n_terms: int) -> tuple[list[Array], float]:
    """Terms of magnitude below one as integers, whose sums do not depend on the order.

    Args:
      terms: float32 array.
      n_terms: how many of them a sum can have.

    Returns:
      The digits, int32, the highest first, and their base.
    """
    base = 2.0**30 / _held(n_terms)
    digits, rest = [], terms
    for _ in range(max(2, math.ceil(_BITS / math.log2(base)))):
        rest = rest * base
        whole = lax.floor(rest)
        digits.append(lax.convert_element_type(whole, jnp.int32))
        rest = rest - whole
    return digits, base


def from_digits(digits: Sequence[Array], base: float) -> Array:
    """The sums of terms from the sums of their digits, float32."""
    sums = [total.astype(jnp.float32) for total in digits]
    return functools.reduce(lambda low, high: high + low * (1 / base), sums[::-1]) * (1 / base)


def totals(arrays: Sequence[Array], axes: Sequence[int]) -> list[Array]:
    """The sums of arrays of one shape over some axes, which keep size one, in one pass.

    Booleans are counted, up to 2^32 of them. XLA on CPUs may write the operand of a simple
    reduction to memory. It fuses those of a variadic reduction if every output is used.
    """
    terms = [x.astype(jnp.uint32) if x.dtype == bool else x for x in arrays]
    sums = lax.reduce(
        terms,
        [jnp.zeros((), x.dtype) for x in terms],
        lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
        tuple(axes),
    )
    return [jnp.expand_dims(x, tuple(axes)) for x in sums]


def _is_by_columns(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether sums go over rows of a large array on a single CPU.

    There a variadic reduction reads down each column, a number at a time, which takes some four
    times as long as to add up rows.
    """
    if math.prod(shape) <= SMALL or len(shape) - 1 in axes:
        return False
    if max((shape[axis] for axis in axes), default=0) < 2 * _PARTS:
        return False
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _totals_by_rows(factors: Sequence[Factor], axes: Sequence[int]) -> list[Array]:
    """The sums of the digits of a product over some axes, which keep size one, row by row.

    Args:
      factors: see `sum_below_one`.
      axes: the axes to sum over.

    Returns:
      The sums of each digit.
    """
    shape = np.broadcast_shapes(*(x.shape for x, _ in factors))
    n_terms = math.prod(shape[i] for i in axes)
    ended = [1 if i in axes else size for i, size in enumerate(shape)]
    if tuple(axes) == tuple(range(len(axes))):  # rows in blocks are as many rows
        factors = [(_in_rows(x, shape, len(axes)), scale) for x, scale in factors]
        shape, axes = (n_terms, *shape[len(axes) :]), (0,)
    longest = max(axes, key=lambda axis: shape[axis])
    n_steps = min(-(-math.prod(shape) // _AT_ONCE), shape[longest] // _PARTS)
    length = shape[longest] // (n_steps * _PARTS)

    def rows(first: Array | int, number: int) -> list[Array]:
        def cut(x: Array) -> Array:
            is_one = x.shape[longest] == 1
            return x if is_one else lax.dynamic_slice_in_dim(x, first, number, longest)

        return digits_of(_product([(cut(x), scale) for x, scale in factors]), n_terms)[0]

    def step(i: Array | int) -> list[Array]:
        at_once = rows(i * _PARTS * length, _PARTS * length)
        ends = itertools.pairwise(range(0, _PARTS * length + 1, length))
        parts = [[lax.slice_in_dim(x, *pair, axis=longest) for x in at_once] for pair in ends]
        return [functools.reduce(jnp.add, own) for own in zip(*parts, strict=True)]

    if n_steps == 1:
        sums = [step(0)]
    else:
        none = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(lambda: rows(0, length))]
        sums = [lax.fori_loop(0, n_steps, lambda i, x: list(map(jnp.add, x, step(i))), none)]
    rest = shape[longest] - n_steps * _PARTS * length
    if rest:
        sums.append(rows(shape[longest] - rest, rest))
    found = [[jnp.sum(x, tuple(axes), x.dtype) for x in own] for own in sums]
    return [functools.reduce(jnp.add, own).reshape(ended) for own in zip(*found, strict=True)]


def _in_rows(array: Array, shape: Sequence[int], n: int) -> Array:
    """An array that broadcasts to a shape, of whose first axes one is made."""
    if all(size == 1 for size in array.shape[:n]):
        return array.reshape(1, *array.shape[n:])
    whole = jnp.broadcast_to(array, (*shape[:n], *array.shape[n:]))
    return whole.reshape(-1, *array.shape[n:])


@jax.custom_vjp
def written_out(array: Array) -> Array:
    """The array, which XLA works out once, and not again for every reader.

    Otherwise it fuses the producers of a small array into each entry of a larger array that it is
    broadcast to, and compiles them anew for each reader. On CPUs it removes a barrier before it
    fuses. But a call that is not inlined there gets what is written in memory.
    """
    if jax.default_backend() != "cpu":
        return lax.optimization_barrier(array)
    with set_xla_metadata(inlineable="false"):
        return _same(array)


written_out.defvjp(lambda array: (written_out(array), None), lambda _, cotangent: (cotangent,))


@jax.jit
def _same(array: Array) -> Array:
    return array


def written_together(flags: Sequence[Array]) -> list[Array]:
    """The same boolean arrays; those of one shape are written by one kernel.

    XLA on CPUs compiles a kernel for each array that is cut out of another, which takes as long as
    compiling much more code. A variadic reduction is a single kernel.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, array in enumerate(flags):
        alike.setdefault(array.shape, []).append(i)
    found = list(flags)
    for shape, places in alike.items():
        if len(places) > 1:
            pairs = [jnp.broadcast_to(flags[i], (2, *shape)) for i in places]
            none = [jnp.zeros((), bool)] * len(pairs)
            written = lax.reduce(pairs, none, lambda xs, ys: list(map(lax.max, xs, ys)), (0,))
            for i, array in zip(places, written, strict=True):
                found[i] = array
    return found


@jax.custom_vjp
def written_out_backward(array: Array) -> Array:
    """Returns the array; its cotangent, in which several paths meet, is written out."""
    return array


written_out_backward.defvjp(
    lambda array: (array, None),
    lambda _, cotangent: (rounded(written_out(cotangent)),),
)


@jax.custom_vjp
def finite_backward(array: Array) -> Array:
    """Returns the array; its cotangent is at most `MOST`, that of paths that are missing too."""
    return array


finite_backward.defvjp(lambda array: (array, None), lambda _, cotangent: (rounded(cotangent),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def sum_taps(array: Array, axes: tuple[int, ...]) -> Array:
    """The sum over short axes, such as a filter's taps; they keep size one.

    A sum of slices fuses with its neighbours. A reduction over a few entries that are far apart in
    memory takes a CPU many times as long.
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
