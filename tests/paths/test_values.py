"""Values: counts in block floating point, uniform axes, alignment, saturation, known numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpai_jax.paths import Flow, Independent, Spread
from dpai_jax.paths import values as v
from dpai_jax.tools import powers
from tests.support.flows import counts, flow, gradients, weight

exponents = st.integers(-(10**6), 10**6)
mantissas = st.floats(0, 1, width=32, allow_subnormal=False)


def test_power_of_two_is_exact_over_float32s_range():
    exponents = np.arange(-126, 128)
    exact = np.ldexp(np.ones(exponents.size), exponents)
    np.testing.assert_array_equal(np.float64(powers.power_of_two(jnp.asarray(exponents))), exact)


def test_power_of_two_is_zero_where_float32_has_no_normal_number():
    for exponent in (-127, -150, -(2**30), -(2**31)):
        assert float(powers.power_of_two(jnp.int32(exponent))) == 0


@given(st.lists(mantissas, min_size=1, max_size=4), st.integers(-120, 110), exponents)
def test_normalise_keeps_counts_and_puts_the_largest_below_one(entries, scale, exponent):
    # Entries below 2^-126 of the largest are below float32's range, and may be lost.
    array = np.ldexp(np.asarray([m if m > 1e-5 else 0 for m in entries]), scale).astype(np.float32)
    array[array < 2.0**-125] = 0
    mantissa, power, filled = v.normalise(jnp.asarray(array), jnp.int32(exponent))
    assert filled == array.any()
    assert not filled or 0.5 <= mantissa.max() < 1
    shift = int(power) - exponent
    np.testing.assert_array_equal(np.ldexp(np.float64(mantissa), shift), np.float64(array))


def test_normalise_of_nothing_changes_nothing():
    mantissa, power, filled = v.normalise(jnp.zeros((2, 3)), jnp.int32(41))
    assert not filled
    assert not mantissa.any()
    assert power == 41


def test_normalise_of_an_empty_array_is_empty():
    mantissa, power, filled = v.normalise(jnp.zeros((0, 3)), jnp.int32(5))
    assert not filled
    assert mantissa.shape == (0, 3)
    assert power == 5


@pytest.mark.parametrize("array", [[3.0, 0.0, 1.0], [0.0, 0.0, 0.0], [2.0**-60, 2.0**-50, 0.0]])
def test_normalise_leaves_the_gradient_of_a_count_as_it_is(array):
    """The derivative of a count by itself is one, whatever the exponent it is held under."""

    def normal(array):
        mantissa, power, filled = v.normalise(array, jnp.int32(0))
        return Flow(mantissa, power, array.shape, "x", filled=filled)

    (slope,) = gradients(normal, [1.0, 2.0, 5.0], array)
    np.testing.assert_array_equal(slope, [1.0, 2.0, 5.0])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-40, 40)), min_size=1, max_size=4))
def test_align_is_exact_where_float32_can_hold_the_counts(parts):
    flows = [flow([float(n), 1.0], exponent=power) for n, power in parts]
    arrays, exponent = v.align(flows)
    for array, (n, power) in zip(arrays, parts, strict=True):
        aligned = np.ldexp(np.float64(array), int(exponent))
        np.testing.assert_array_equal(aligned, np.ldexp([float(n), 1.0], power))


@given(exponents, exponents)
def test_aligned_sums_are_right_however_far_apart_the_exponents_are(a, b):
    (x, y), exponent = v.align([flow([3.0], exponent=a), flow([5.0], exponent=b)])
    ours = math.log2(float((x + y)[0])) + int(exponent)
    high, low = max(a, b), min(a, b)
    of = {a: 3.0, b: 5.0} if a != b else {a: 8.0}
    exact = of[high] + (0 if a == b else math.ldexp(of[low], max(low - high, -1000)))
    assert ours - high == pytest.approx(math.log2(exact), abs=1e-6)


@given(exponents, exponents)
def test_a_flow_of_nothing_takes_no_part_in_the_choice_of_the_exponent(full, empty):
    (x, y), exponent = v.align([flow([3.0], exponent=full), flow([0.0], exponent=empty)])
    assert not y.any()
    assert np.ldexp(np.float64(x), int(exponent) - full) == 3.0


def test_aligned_flows_of_nothing_are_nothing():
    arrays, _ = v.align([flow([0.0], exponent=9), flow([0.0], exponent=-3)])
    assert not any(array.any() for array in arrays)


@pytest.mark.parametrize("above", [18, 30, 60])
def test_a_gradient_reaches_a_flow_of_nothing_through_align(above):
    def second(array):
        empty = v.replace(flow(array, exponent=above), filled=np.False_)
        (_, y), exponent = v.align([flow([3.0], exponent=20), empty])
        return v.replace(empty, mantissa=y, exponent=exponent)

    np.testing.assert_array_equal(gradients(second, [1.0], [0.0]), [[2.0**above]])


def test_the_largest_exponent_is_that_of_a_flow_that_is_not_empty():
    exponents = jnp.asarray([3, 90, -4])
    assert v.largest_exponent(exponents, jnp.asarray([True, False, True])) == 3
    assert v.largest_exponent(exponents, jnp.asarray([False, False, True])) == -4


def test_saturation_gives_zeros_and_ones_forward_and_backward():
    array = jnp.asarray([0.0, 1e-9, 1.0, 7.0])
    saturated, pull = jax.vjp(v.saturate, array)
    np.testing.assert_array_equal(saturated, [0, 0, 1, 1])
    (slope,) = pull(jnp.asarray([7.0, 1.0, 1e-9, 0.0]))
    np.testing.assert_array_equal(slope, [1, 1, 0, 0])


def test_spread_writes_out_the_axes_asked_for():
    spread = Spread(jnp.arange(3.0).reshape(1, 3, 1), (2, 3, 4))
    assert [spread.uniform(i) for i in range(3)] == [True, False, True]
    assert spread.full(2).array.shape == (1, 3, 4)
    assert spread.full(1).array.shape == (1, 3, 1)
    whole = np.broadcast_to(np.arange(3.0).reshape(1, 3, 1), (2, 3, 4))
    np.testing.assert_array_equal(spread.full().array, whole)


def test_ones_are_held_as_one_number():
    spread = v.ones((2, 0, 5))
    assert spread.array.shape == (1, 1, 1)
    np.testing.assert_array_equal(spread.full().array, np.ones((2, 0, 5)))


def test_a_unit_is_alive_where_its_count_or_its_rest_is_not_zero():
    dead = flow([0.0, 2.0])
    assert not dead.always_alive
    np.testing.assert_array_equal(dead.alive(), [0, 1])
    for rest in (0.5, -1.0, math.inf):
        assert v.replace(dead, at_zero=rest).always_alive
        np.testing.assert_array_equal(v.replace(dead, at_zero=rest).alive(), [1])


def test_being_alive_is_a_constant_to_gradients():
    slope = jax.grad(lambda a: jnp.sum(flow(a).alive()))(jnp.asarray([0.0, 2.0]))
    np.testing.assert_array_equal(slope, [0, 0])


def test_the_lineage_of_a_unit_is_itself_and_its_ancestors():
    assert flow([1.0], unit="b", ancestors=["a"]).lineage == {"a", "b"}


def test_flows_and_weights_are_pytrees_of_their_arrays():
    value = flow([1.0, 2.0], unit="x", ancestors=["y"], at_zero=1.0)
    copy = jax.tree.map(jnp.copy, value)
    np.testing.assert_array_equal(counts(copy), counts(value))
    assert (copy.shape, copy.unit, copy.lineage, copy.at_zero) == ((2,), "x", {"x", "y"}, 1.0)
    (mask,) = jax.tree.leaves(weight(np.ones((2, 3))))
    assert mask.shape == (2, 3)
    assert weight(np.ones((2, 3))).shape == (2, 3)


def test_known_values_are_computed_when_first_asked_for_and_once():
    calls = []

    def compute():
        calls.append(1)
        return np.arange(3)

    known = v.Known(compute, (3,), traced=False)
    assert not calls
    assert list(known.value) == list(known.value) == [0, 1, 2]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("value", "number"),
    [(2, 2.0), (np.full((1, 1), -0.5), -0.5), (np.ones((2,)), None), (1j, None), (True, 1.0)],
)
def test_a_known_value_is_a_scalar_where_it_holds_one_real_number(value, number):
    assert Independent(np.shape(value), v.Known.of(value)).scalar == number


def test_an_unknown_value_is_no_scalar():
    assert Independent(()).scalar is None


def test_a_traced_value_is_no_scalar():
    seen = []
    jax.jit(lambda i: seen.append(Independent((), v.Known.of(i)).scalar))(jnp.int32(3))
    assert seen == [None]
