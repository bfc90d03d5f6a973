"""Sums in fixed point, held against float64 and against themselves in another order."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpai_jax.tools import sums
from dpai_jax.tools.sums import (
    product_sum,
    sum_below_one,
    sum_over,
    sum_taps,
    totals,
    written_out,
)

# Sums must keep their bits however XLA orders and fuses them.
pytestmark = pytest.mark.optimized

Shape = tuple[int, ...]

compiled = jax.jit(product_sum, static_argnums=2)


def weighted(a: jax.Array, b: jax.Array, axes: Shape) -> jax.Array:
    """One number from all sums, to which each contributes differently."""
    sums = product_sum(a, b, axes)
    return jnp.vdot(jnp.arange(1.0, sums.size + 1).reshape(sums.shape), sums)


gradients = jax.jit(jax.grad(weighted, (0, 1)), static_argnums=2)


def draw(shape: Shape, seed: int, spread: float = 1.0) -> np.ndarray:
    """Positive numbers over some orders of magnitude, a fifth of them zero."""
    rng = np.random.default_rng(seed)
    numbers = np.exp(spread * rng.standard_normal(shape)) * (rng.random(shape) > 0.2)
    return numbers.astype(np.float32)


def lost(a: np.ndarray, b: np.ndarray, axes: Shape) -> float:
    """How much a sum may miss: of each term what is below the lower of its two digits."""
    n_terms = math.prod(np.broadcast_shapes(a.shape, b.shape)[i] for i in axes)
    # Up to 64 terms are added as if they were 64, and up to 4096 as if they were 4096.
    as_if = next((number for number in (64, 4096) if n_terms <= number), n_terms)
    bits = 2 * (30 - math.ceil(math.log2(as_if)))
    largest = [2.0 ** (math.floor(math.log2(x.max())) + 1) if x.max() else 0.0 for x in (a, b)]
    return n_terms * 2.0**-bits * math.prod(largest)


def assert_sums(actual: Any, a: np.ndarray, b: np.ndarray, axes: Shape) -> None:
    expected = np.sum(a.astype(np.float64) * b, axes, keepdims=True)
    # Each product is rounded once, and so is each step from the two digits to one float.
    np.testing.assert_allclose(actual, expected, 2.0**-22, lost(a, b, axes))


SHAPES: list[tuple[Shape, Shape, Shape]] = [
    ((30, 20), (30, 1), (0,)),
    ((30, 20), (1, 20), (1,)),
    ((1, 20), (30, 20), (0, 1)),
    ((30, 20), (1, 1), (0,)),
    ((30, 1), (1, 20), (0,)),
    ((4, 5, 6), (4, 1, 6), (0, 2)),
    ((4, 5, 6), (1, 5, 1), ()),
    ((7, 1), (7, 1), (1,)),
    ((5000,), (5000,), (0,)),
]


@pytest.mark.parametrize(("shape_a", "shape_b", "axes"), SHAPES)
def test_sums_of_products_are_those_of_float64(shape_a: Shape, shape_b: Shape, axes: Shape) -> None:
    for seed, spread in enumerate((0.1, 1.0, 8.0)):
        a, b = draw(shape_a, seed, spread), draw(shape_b, 10 + seed, spread)
        sums = compiled(a, b, axes)
        assert sums.dtype == jnp.float32
        assert_sums(sums, a, b, axes)


@pytest.mark.parametrize("scale", [2.0**-60, 1e-12, 3e7, 2.0**60])
def test_sums_hold_at_any_scale_of_either_factor(scale: float) -> None:
    a, b = draw((30, 20), 0) * np.float32(scale), draw((30, 1), 1)
    assert_sums(compiled(a, b, (0,)), a, b, (0,))
    assert_sums(compiled(b, a, (0,)), b, a, (0,))
    assert_sums(compiled(a, b / np.float32(scale), (0,)), a, b / np.float32(scale), (0,))


def test_sums_of_zeros_and_of_nothing_are_zero() -> None:
    zeros = np.zeros((3, 4), np.float32)
    np.testing.assert_array_equal(product_sum(zeros, zeros, (0,)), np.zeros((1, 4)))
    np.testing.assert_array_equal(product_sum(zeros + 1, zeros, (0, 1)), np.zeros((1, 1)))
    np.testing.assert_array_equal(sum_over(jnp.zeros((0, 4)), (0,)), np.zeros((1, 4)))


def test_whole_numbers_add_up_without_any_rounding() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (512, 9)), rng.integers(0, 2**7, (512, 1))
    sums = compiled(a.astype(np.float32), b.astype(np.float32), (0,))
    np.testing.assert_array_equal(sums, np.sum(a * b, 0, keepdims=True))


def test_a_sum_over_some_axes_is_that_of_float64() -> None:
    x = draw((6, 7, 8), 0)
    for axes in ((0,), (1, 2), (0, 1, 2), ()):
        assert_sums(sum_over(jnp.asarray(x), axes), x, np.ones((1, 1, 1), np.float32), axes)


def test_flags_and_whole_numbers_are_added_up_together() -> None:
    x, numbers = draw((6, 7, 8), 0), np.arange(6 * 7 * 8, dtype=np.int32).reshape(6, 7, 8)
    for axes in ((0,), (1, 2), (0, 1, 2), ()):
        count, added = totals([jnp.asarray(x > 0), jnp.asarray(numbers)], axes)
        np.testing.assert_array_equal(count, np.sum(x > 0, axes, keepdims=True))
        np.testing.assert_array_equal(added, np.sum(numbers, axes, keepdims=True))


# Rows that eight parts divide evenly and rows that they do not; taps beside them.
LARGE: list[tuple[Shape, Shape, Shape]] = [
    ((1024, 80), (1024, 1), (0,)),
    ((1003, 80), (1003, 1), (0,)),
    ((1003, 80), (1, 80), (0,)),
    ((3, 300, 80), (3, 300, 1), (0, 1)),
    ((3, 300, 80), (1, 300, 1), (0, 1)),
    ((300, 3, 80), (1, 3, 1), (0,)),
    ((3, 300, 80), (1, 300, 80), (1,)),
    ((17, 9000), (17, 1), (0,)),
]


@pytest.mark.parametrize("at_once", [sums._AT_ONCE, 2**14])
@pytest.mark.parametrize(("shape", "shape_b", "axes"), LARGE)
def test_rows_of_large_arrays_are_added_up_in_parts_on_one_cpu(
    monkeypatch, shape, shape_b, axes, at_once
):
    """And come out the same, bit by bit, as where there are several devices."""
    monkeypatch.setattr(sums, "_AT_ONCE", at_once)
    a, b = draw(shape, 0), draw(shape_b, 1)
    scales = [np.float32(2.0 ** -math.ceil(math.log2(2 * x.max()))) for x in (a, b)]
    forms, found = [], []
    for n_devices in (8, 1):
        monkeypatch.setattr(jax, "device_count", lambda n_devices=n_devices: n_devices)

        def summed(a: jax.Array, b: jax.Array) -> jax.Array:
            factors = [(a, scales[0]), (b, scales[1])]
            return sum_below_one.__wrapped__(factors, axes)

        forms.append(str(jax.make_jaxpr(summed)(a, b)))
        found.append(jax.jit(summed)(a, b))
    assert not any(name in forms[0] for name in ("slice", "scan"))
    assert "slice" in forms[1]
    assert ("scan" in forms[1]) == (at_once < a.size)
    np.testing.assert_array_equal(*found)
    assert_sums(found[1], a * scales[0], b * scales[1], axes)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 12.0))
def test_terms_in_any_order_have_the_same_sum_bit_by_bit(seed: int, spread: float) -> None:
    a, b = draw((200, 3), seed, spread), draw((200, 1), seed + 1, spread)
    order = np.random.default_rng(seed).permutation(200)
    first, second = compiled(a, b, (0,)), compiled(a[order], b[order], (0,))
    np.testing.assert_array_equal(first, second)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 12.0))
def test_gradients_in_any_order_are_the_same_bit_by_bit(seed: int, spread: float) -> None:
    a, b = draw((40, 50), seed, spread), draw((40, 1), seed + 1, spread)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(40), rng.permutation(50)

    def gradient(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> tuple[jax.Array, jax.Array]:
        _, backward = jax.vjp(lambda a, b: compiled(a, b, (0,)), a, b)
        return backward(jnp.asarray(weights))

    weights = draw((1, 50), seed + 2, spread)
    for_a, for_b = gradient(a, b, weights)
    moved_a, moved_b = gradient(a[rows][:, columns], b[rows], weights[:, columns])
    np.testing.assert_array_equal(np.asarray(for_a)[rows][:, columns], moved_a)
    np.testing.assert_array_equal(np.asarray(for_b)[rows], moved_b)


def test_the_sum_is_the_same_bit_by_bit_however_many_devices_add_it_up() -> None:
    mesh = jax.make_mesh((8,), ("terms",))
    a, b = draw((64, 5), 0, 4.0), draw((64, 1), 1, 4.0)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("terms"))
    apart = compiled(*jax.device_put((a, b), sharding), (0,))
    np.testing.assert_array_equal(apart, compiled(a, b, (0,)))


def by_sum(a: np.ndarray, b: np.ndarray, axes: Shape) -> jax.Array:
    """What `weighted` is by `jnp.sum`."""
    sums = jnp.sum(a * b, axes, keepdims=True)
    return jnp.vdot(jnp.arange(1.0, sums.size + 1).reshape(sums.shape), sums)


@pytest.mark.parametrize(("shape_a", "shape_b", "axes"), SHAPES)
def test_gradients_are_those_of_float64(shape_a: Shape, shape_b: Shape, axes: Shape) -> None:
    a, b = draw(shape_a, 0), draw(shape_b, 1)
    actual = gradients(a, b, axes)
    with jax.enable_x64(True):
        wide = a.astype(np.float64), b.astype(np.float64)
        expected = jax.jit(jax.grad(by_sum, (0, 1)), static_argnums=2)(*wide, axes)
        expected = jax.device_get(expected)
    for x, gradient, reference in zip((a, b), actual, expected, strict=True):
        assert gradient.shape == x.shape
        # Fixed point loses what is far below the largest term, 2^-30 of it here at the most.
        largest = float(np.max(reference))
        np.testing.assert_allclose(gradient, reference, 1e-6, 2.0**-30 * largest)


def test_zeros_have_the_gradient_of_what_they_are_multiplied_by() -> None:
    a, b = np.zeros((3, 2), np.float32), np.asarray([[1.0], [2.0], [4.0]], np.float32)
    for_a, for_b = jax.grad(weighted, (0, 1))(a, b, (0,))
    np.testing.assert_array_equal(for_a, b * np.asarray([[1.0, 2.0]]))
    np.testing.assert_array_equal(for_b, np.zeros((3, 1)))


def hessian(fn: Any) -> Any:
    """The second derivatives of a function of two arrays, both times in reverse."""
    return jax.jit(jax.jacrev(jax.grad(fn, (0, 1)), (0, 1)))


@pytest.mark.parametrize("outer", [jnp.square, jnp.log], ids=["square", "log"])
def test_second_derivatives_are_those_of_float64(outer: Any) -> None:
    """Those of the logarithm are negative, and of a factor's own entries zero before it."""
    a, b = draw((5, 3), 0) + np.float32(0.1), draw((5, 1), 1) + np.float32(0.1)

    def total(sums: jax.Array) -> jax.Array:
        return jnp.vdot(jnp.arange(1.0, 4), outer(sums)[0])

    actual = hessian(lambda a, b: total(product_sum(a, b, (0,))))(a, b)
    with jax.enable_x64(True):
        wide = a.astype(np.float64), b.astype(np.float64)
        expected = hessian(lambda a, b: total(jnp.sum(a * b, 0, keepdims=True)))(*wide)
        expected = jax.device_get(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, 1e-5, 1e-6 * np.max(np.abs(y)))


def test_a_sum_over_some_axes_has_first_and_second_derivatives() -> None:
    x = jnp.asarray(draw((3, 4), 0) + np.float32(0.1))

    def total(sums: Any, x: jax.Array) -> jax.Array:
        return jnp.vdot(jnp.arange(1.0, 5), jnp.log(sums(x))[0])

    fixed = jax.jit(functools.partial(total, jax.jit(lambda x: sum_over(x, (0,)))))
    floating = functools.partial(total, lambda x: jnp.sum(x, 0, keepdims=True))
    np.testing.assert_allclose(jax.grad(fixed)(x), jax.grad(floating)(x), 1e-5)
    second = jax.jacrev(jax.grad(floating))(x)
    np.testing.assert_allclose(jax.jacrev(jax.grad(fixed))(x), second, 1e-5, 1e-6)


def test_the_gradient_of_a_sum_is_float32_with_x64_too() -> None:
    x = jnp.asarray(draw((3, 4), 0))
    with jax.enable_x64(True):
        gradient = jax.grad(lambda x: sum_over(x, (0, 1)).reshape(()))(x)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, np.ones((3, 4)))


FOLDED: list[tuple[Shape, Shape]] = [
    ((3, 3, 4, 5), (0, 1)),
    ((4, 2, 5), (1,)),
    ((4, 1), (1,)),
    ((4, 5), ()),
    ((2, 3), (0, 1)),
]


@pytest.mark.parametrize(("shape", "axes"), FOLDED)
def test_fold_is_the_sum_and_has_its_gradient(shape: Shape, axes: Shape) -> None:
    x = draw(shape, 0)
    np.testing.assert_allclose(
        sum_taps(jnp.asarray(x), axes), np.sum(x, axes, keepdims=True), rtol=1e-6
    )

    def square(total: Any, x: Any) -> jax.Array:
        return jnp.sum(jnp.square(total(x)))

    actual = jax.grad(functools.partial(square, lambda x: sum_taps(x, axes)))(x)
    by_sum = jax.grad(functools.partial(square, lambda x: jnp.sum(x, axes, keepdims=True)))(x)
    np.testing.assert_allclose(actual, by_sum, rtol=1e-6)


def test_fold_has_second_derivatives() -> None:
    x = draw((3, 2), 0)
    actual = jax.jacrev(jax.grad(lambda x: jnp.sum(sum_taps(x, (0,)) ** 3)))(jnp.asarray(x))
    expected = jax.hessian(lambda x: jnp.sum(jnp.sum(x, 0) ** 3))(jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_what_is_written_out_is_worked_out_once() -> None:
    def fn(write: bool, x: jax.Array) -> Any:
        line = jnp.sin(x)
        line = written_out(line) if write else line
        return line[:, None] * x[None], line[None] + x[:, None]

    x = jnp.linspace(-3, 3, 300)
    for argument in (x, jnp.stack([x, 2 * x])):
        results = []
        for write, n_sines in ((True, 1), (False, 2)):
            run = functools.partial(fn, write)
            compiled = jax.jit(run if argument is x else jax.vmap(run)).lower(argument).compile()
            assert compiled.as_text().count(" sine(") == n_sines
            results.append(compiled(argument))
        jax.tree.map(np.testing.assert_array_equal, *results)
    gradient = jax.grad(lambda x: jnp.sum(written_out(x) ** 2))(x)
    np.testing.assert_array_equal(gradient, 2 * x)
