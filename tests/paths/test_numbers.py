"""Equations of known numbers by NumPy, held against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dpai_jax.paths import constants

ONE = {
    "abs": lax.abs,
    "exp": lax.exp,
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "inverse": lambda x: lax.integer_pow(x, -2),
    "log": lax.log,
    "log1p": lax.log1p,
    "logistic": lax.logistic,
    "neg": lax.neg,
    "rsqrt": lax.rsqrt,
    "sqrt": lax.sqrt,
    "square": lax.square,
    "tanh": lax.tanh,
}
TWO = {
    "add": lax.add,
    "div": lax.div,
    "eq": lax.eq,
    "ge": lax.ge,
    "gt": lax.gt,
    "le": lax.le,
    "lt": lax.lt,
    "max": lax.max,
    "min": lax.min,
    "mul": lax.mul,
    "sub": lax.sub,
}
NUMBERS = [0.0, 1.0, -1.0, 0.5, -2.5, 3e8, np.inf]
WHOLE = [0, 1, -1, 7, -5, 2**31 - 1]


def results(fn, *operands):
    """What an equation gives for some numbers: here, and by JAX."""
    (eqn,) = jax.make_jaxpr(fn)(*operands).eqns
    (found,) = constants.evaluated(eqn, operands)
    return found, np.asarray(fn(*map(jnp.asarray, operands)))


def assert_alike(found, expected):
    assert isinstance(found, np.ndarray)
    assert found.dtype == expected.dtype
    # Zero and no number are exactly that: whether a unit is alive hangs on it.
    np.testing.assert_array_equal(found == 0, expected == 0)
    tolerance = 4 * np.finfo(np.float32).eps
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), tolerance)


def test_all_functions_are_tried():
    names = {jax.make_jaxpr(fn)(1.0).eqns[0].primitive.name for fn in ONE.values()}
    names |= {jax.make_jaxpr(fn)(1.0, 1.0).eqns[0].primitive.name for fn in TWO.values()}
    assert names == set(constants._IN_NUMPY)


@pytest.mark.parametrize("name", ONE)
def test_a_function_of_a_number_is_jax_s(name):
    for number in NUMBERS:
        assert_alike(*results(ONE[name], np.float32(number)))


@pytest.mark.parametrize("name", TWO)
def test_a_function_of_two_numbers_is_jax_s(name):
    for a in NUMBERS:
        for b in NUMBERS:
            assert_alike(*results(TWO[name], np.float32(a), np.float32(b)))


@pytest.mark.parametrize("name", [name for name in TWO if name != "div"])
def test_a_function_of_whole_numbers_is_jax_s(name):
    for a in WHOLE:
        for b in WHOLE:
            assert_alike(*results(TWO[name], np.int32(a), np.int32(b)))


@pytest.mark.parametrize(
    ("fn", "operands"),
    [
        (lax.div, (np.int32(-7), np.int32(2))),
        (lax.erf, (np.float32(0.5),)),
        (lax.tanh, (jnp.bfloat16(0.5),)),
    ],
)
def test_what_numpy_has_not_is_left_to_jax(fn, operands):
    found, expected = results(fn, *operands)
    assert isinstance(found, jax.Array)  # of JAX, not of NumPy
    np.testing.assert_array_equal(found, expected)
