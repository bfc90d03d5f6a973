"""Reductions, windows and running sums against loops in float64."""

import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from dpai_jax.paths import Flow, Independent
from tests.support.flows import (
    Window,
    assert_normal,
    binary,
    counts,
    draw,
    evaluate,
    flow,
    gradients,
    random_window,
    uniform_along_some,
    weight,
)

seeds = st.integers(0, 2**32 - 1)

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "reduce_sum": lax.reduce_sum,
    "reduce_max": lax.reduce_max,
    "reduce_min": lax.reduce_min,
    "reduce_prod": lax.reduce_prod,
    "reduce_and": lax.reduce_and,
    "reduce_or": lax.reduce_or,
    "reduce_xor": lax.reduce_xor,
    "reduce": lambda x, axes: lax.reduce(x, jnp.ones(()), lambda a, b: a * b + a, axes),
}
CUMULATIVE = {
    "cumsum": lax.cumsum,
    "cumprod": lax.cumprod,
    "cummax": lax.cummax,
    "cummin": lax.cummin,
    "cumlogsumexp": lax.cumlogsumexp,
}


@pytest.mark.parametrize("axes", [(0,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_sums_counts(name, axes):
    x = flow(draw(0, 2, 1, 4), (2, 3, 4), exponent=7, unit="x", ancestors=["input"])
    dtype = jnp.int32 if name in {"reduce_and", "reduce_or", "reduce_xor"} else jnp.float32
    result = evaluate(lambda x: REDUCTIONS[name](x, axes), x, dtypes=[dtype])
    np.testing.assert_array_equal(counts(result), counts(x).sum(axes))
    assert result.ancestors == {"x", "input"}
    assert_normal(result)


def test_axes_that_are_left_stay_uniform():
    result = evaluate(lambda x: x.sum(0), flow(draw(0, 1, 1, 4), (2, 3, 4)))
    assert result.mantissa.shape == (1, 4)


def test_a_reduction_over_several_operands_gives_the_sum_of_each():
    def both(x: Any, y: Any) -> Any:
        return lax.reduce(
            (x, y), (jnp.zeros(()), jnp.zeros(())), lambda a, b: (a[0] * b[0], a[1] + b[1]), (1,)
        )

    x = flow(draw(0, 2, 3))
    first, second = evaluate(both, x, Independent((2, 3)))
    np.testing.assert_array_equal(counts(first), counts(x).sum(1))
    assert isinstance(second, Independent)


@pytest.mark.parametrize("fn", [jnp.sum, jnp.max, jnp.mean, jnp.cumsum])
def test_a_reduction_is_alive_at_zero_where_its_input_is(fn):
    assert evaluate(fn, flow(draw(0, 3), at_zero=0.5)).always_alive
    assert not evaluate(fn, flow(draw(0, 3))).always_alive


@pytest.mark.parametrize("fn", [jnp.argmax, jnp.argmin])
def test_a_position_carries_no_path(fn):
    result = evaluate(fn, flow(draw(0, 2, 3)))
    assert isinstance(result, Independent)
    assert result.known is None


@pytest.mark.parametrize(
    "fn",
    [
        jnp.sum,
        jnp.cumsum,
        jnp.argmax,
        lambda w: lax.reduce_window(w, 0.0, lax.add, (1, 2), (1, 1), "SAME"),
        lambda w: lax.reduce(w, jnp.ones(()), lambda a, b: a * b + a, (0,)),
    ],
)
def test_a_statistic_of_a_kernel_is_free(fn):
    assert isinstance(evaluate(fn, weight(draw(0, 2, 3))), Independent)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CUMULATIVE)
@pytest.mark.parametrize("held", [(2, 3), (2, 1)])
def test_a_running_reduction_runs_up_counts(name, reverse, held):
    x = flow(draw(0, *held), (2, 3), unit="x")
    result = evaluate(lambda x: CUMULATIVE[name](x, axis=1, reverse=reverse), x)
    along = counts(x)[:, ::-1] if reverse else counts(x)
    exact = np.cumsum(along, 1)
    np.testing.assert_array_equal(counts(result), exact[:, ::-1] if reverse else exact)
    assert "x" in result.ancestors


def test_an_associative_scan_of_sums_runs_up_counts():
    x = flow(draw(0, 5))
    result = evaluate(lambda x: lax.associative_scan(operator.add, x), x)
    np.testing.assert_array_equal(counts(result), np.cumsum(counts(x)))


def pool(x: np.ndarray, along: list[Window]) -> np.ndarray:
    """Sums over windows, entry by entry."""
    result = np.zeros([window.steps for window in along])
    for steps in itertools.product(*map(range, result.shape)):
        for taps in itertools.product(*(range(window.taps) for window in along)):
            sites = [w.position(s, t) for w, s, t in zip(along, steps, taps, strict=True)]
            if None not in sites:
                result[steps] += x[tuple(sites)]
    return result


WINDOWS: dict[str, tuple[float, Callable[..., Any]]] = {
    "reduce_window_sum": (0.0, lax.add),
    "reduce_window_max": (-np.inf, lax.max),
    "reduce_window_min": (np.inf, lax.min),
    "reduce_window": (1.0, lambda a, b: a * b + a),
}


@settings(max_examples=8)
@given(seeds, st.sampled_from(sorted(WINDOWS)))
def test_a_window_sums_counts(seed, name):
    rng = np.random.default_rng(seed)
    along = [random_window(rng) for _ in range(rng.integers(1, 4))]
    shape = tuple(window.size for window in along)
    array = draw(seed, *uniform_along_some(rng, shape))
    initial, reducer = WINDOWS[name]

    def apply(array: Any) -> Flow:
        return evaluate(
            lambda x: lax.reduce_window(
                x,
                np.float32(initial),
                reducer,
                [window.taps for window in along],
                [window.stride for window in along],
                [window.padding for window in along],
                [window.dilation for window in along],
                [window.kernel_dilation for window in along],
            ),
            flow(array, shape, unit="x"),
        )

    result = apply(array)
    exact = pool(np.broadcast_to(array, shape), along)
    np.testing.assert_array_equal(counts(result), exact)
    assert "x" in result.ancestors
    probe, other = draw(1, *exact.shape), draw(2, *array.shape)
    (slope,) = gradients(apply, probe, array)
    moved = pool(np.broadcast_to(other, shape), along)
    assert np.sum(slope * other) == np.sum(probe * moved)


def test_pooling_without_padding_leaves_uniform_axes_uniform():
    x = flow(draw(0, 1, 1, 1, 3), (2, 5, 4, 3))
    result = evaluate(
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 3, 1), (1, 2, 1, 1), "VALID"), x
    )
    assert result.shape == (2, 2, 2, 3)
    assert result.mantissa.shape == (1, 1, 1, 3)
    np.testing.assert_array_equal(
        counts(result), np.broadcast_to(6 * counts(x)[:, :2, :2], (2, 2, 2, 3))
    )


def test_several_windows_at_once_sum_the_counts_of_each():
    def both(x: Any, y: Any) -> Any:
        return lax.reduce_window(
            (x, y),
            (np.float32(0), np.float32(0)),
            lambda a, b: (a[0] + b[0], a[1] * b[1]),
            (2,),
            (1,),
            "VALID",
        )

    first, second = evaluate(both, flow([1.0, 2.0, 4.0]), flow([0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(counts(first), [3, 6])
    np.testing.assert_array_equal(counts(second), [1, 1])


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.sum(1),
        lambda x: jnp.cumsum(x, 1),
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME"),
    ],
)
def test_saturating_sums_tell_where_a_path_comes_from(fn):
    x = np.asarray([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    result = evaluate(fn, binary(x), saturating=True)
    np.testing.assert_array_equal(result.mantissa, np.asarray(fn(x.astype(np.float32))) > 0)


def test_the_gradient_of_a_reduction_is_spread_over_its_input():
    def total(array: Any) -> Flow:
        return evaluate(lambda x: jnp.mean(x, (0, 2)), flow(array, (2, 3, 4)))

    (slope,) = gradients(total, [1.0, 2.0, 5.0], draw(0, 1, 3, 4))
    exact = 2 * np.broadcast_to(np.asarray([1.0, 2.0, 5.0])[None, :, None], (1, 3, 4))
    np.testing.assert_array_equal(slope, exact)


def test_pooling_and_reducing_everything_agree():
    x = flow(draw(0, 1, 4, 1, 2), (2, 4, 4, 2))
    pooled = evaluate(
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 4, 4, 1), (1, 1, 1, 1), "VALID"), x
    )
    reduced = evaluate(lambda x: jax.numpy.mean(x, (1, 2), keepdims=True), x)
    np.testing.assert_array_equal(counts(pooled), counts(reduced))


TRANSFORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "fft": (lambda x: jnp.fft.fft(x, axis=-1).real, (-1,)),
    "along another axis": (lambda x: jnp.abs(jnp.fft.fft(x, axis=0)), (0,)),
    "of real numbers": (lambda x: jnp.fft.rfft(x).imag, (-1,)),
    "in two dimensions": (lambda x: jnp.fft.rfft2(x).real, (-2, -1)),
    "and back": (lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * 0.5, 4), (-1,)),
}


@pytest.mark.parametrize("held", [(2, 3, 4), (1, 3, 1)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_fourier_transform_is_a_matrix_of_ones(name, held):
    transform, axes = TRANSFORMS[name]
    x = flow(draw(0, *held), (2, 3, 4), exponent=2, ancestors=["input"])
    exact = counts(x)
    for axis in axes:
        ones = np.ones((exact.shape[axis],) * 2)
        exact = np.moveaxis(np.tensordot(exact, ones, [[axis], [0]]), -1, axis)
    if "back" in name:  # to three frequencies, and from them
        exact = exact * 3
    result = evaluate(transform, x)
    exact = exact[tuple(slice(0, size) for size in result.shape)]
    np.testing.assert_array_equal(counts(result), exact)
    assert "input" in result.lineage
