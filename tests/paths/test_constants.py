"""Constant folding: index tables, counters and literals keep their values, all else its shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dpai_jax.paths import Flow, Independent
from tests.support.flows import counts, draw, evaluate, flow

CHAINS = {
    "a literal": lambda: jnp.float32(2.5) * 2 - 1,
    "iota": lambda: jnp.arange(6).reshape(2, 3)[:, ::-1].T,
    "where": lambda: jnp.where(jnp.arange(5) % 2 == 0, jnp.arange(5), -1),
    "a running sum": lambda: jnp.cumsum(jnp.ones(4, jnp.int32)) - 1,
    "a sort": lambda: jnp.argsort(jnp.asarray([3, 1, 2])),
    "a triangle": lambda: jnp.tril(jnp.ones((3, 3), bool)),
    "a table": lambda: jnp.asarray(np.arange(4.0, dtype=np.float32))[jnp.asarray([2, 0])],
    "one hot": lambda: jax.nn.one_hot(jnp.arange(3), 4),
    "whole numbers": lambda: (jnp.arange(7, dtype=jnp.int8) // 2) ** 2,
    "half precision": lambda: jnp.linspace(0, 1, 4).astype(jnp.bfloat16) * 0.5 + 1,
    "frequencies": lambda: 10000.0 ** (-jnp.arange(0.0, 8.0, 2.0) / 8.0),
    "an outer product": lambda: jnp.outer(jnp.arange(3), jnp.arange(2)),
    "a call": lambda: jax.jit(lambda i: i + 1)(jnp.arange(3)),
    "a rematerialised call": lambda: jax.checkpoint(lambda i: jnp.sin(i) * 2)(jnp.arange(3.0)),
    "a branch": lambda: lax.cond(jnp.arange(3)[1] > 0, lambda i: i + 1, lambda i: i, 4),
    "filled": lambda: jnp.full((2, 3), 7.0) / jnp.full((2, 3), 2.0),
    "random numbers": lambda: jax.random.randint(jax.random.key(3), (4,), 0, 9),
    "a permutation": lambda: jax.random.permutation(jax.random.key(3), 6),
    "a comparison": lambda: jnp.arange(4)[:, None] >= jnp.arange(4)[None],
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_computed_from_constants_alone_keeps_its_value(name):
    exact = CHAINS[name]()
    result = evaluate(CHAINS[name])
    assert isinstance(result, Independent)
    assert result.known is not None
    value = jnp.broadcast_to(result.known.value, result.shape)
    np.testing.assert_array_equal(np.asarray(value), np.asarray(exact))
    assert value.dtype == exact.dtype


@pytest.mark.parametrize("name", ["where", "a table", "random numbers", "a branch", "filled"])
def test_its_value_can_be_used_inside_a_jitted_function(name):
    """Found while another function is traced, the value is still a plain array."""
    seen = []

    @jax.jit
    def outer(x):
        result = evaluate(CHAINS[name])
        seen.append(np.asarray(result.known.value))
        return x

    outer(jnp.ones(()))
    exact = np.asarray(CHAINS[name]())
    np.testing.assert_array_equal(np.broadcast_to(seen[0], exact.shape), exact)


def test_literals_keep_their_precision_where_x64_is_on():
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.int8):
            result = evaluate(lambda dtype=dtype: (jnp.ones((2,), dtype) * 3 + 1)[:1])
            assert result.known.value.dtype == dtype
            assert float(result.known.value[0]) == 4


def test_a_number_that_fills_an_array_is_held_once():
    """Of 10^18 entries there could be no array."""
    shape = (10**6, 10**6, 10**6)
    result = evaluate(lambda: jnp.maximum(jnp.full(shape, 3.0) * 2 - 1, 0).astype(jnp.bfloat16))
    assert result.shape == shape
    assert result.scalar == 5.0


def test_nothing_is_computed_before_it_is_asked_for():
    """A table of 10^15 entries that no rule reads costs nothing."""
    x = flow(draw(0, 2), unit="x")

    def network(x):
        table = jnp.arange(10**15, dtype=jnp.int32).astype(jnp.float32) * 2.0
        return x + table[:2]

    shapes = [jax.ShapeDtypeStruct((2,), jnp.float32)]
    assert jax.eval_shape(network, *shapes).shape == (2,)
    assert evaluate(network, x).unit == "x"


@pytest.mark.parametrize(
    "fn",
    [
        lambda c: c + 1.0,
        lambda c: jnp.arange(3) * c.astype(jnp.int32),
        lambda c: lax.cond(c[0] > 0, lambda: jnp.ones(3), lambda: jnp.zeros(3)),
        lambda c: lax.scan(lambda i, _: (i + 1.0, None), c, None, 4)[0],
        lambda c: lax.while_loop(lambda i: i[0] < 3, lambda i: i + 1.0, c),
        lambda c: jnp.sort(c),
        lambda c: jax.jit(lambda c: c * 2.0)(c),
    ],
)
def test_what_an_unknown_value_takes_part_in_is_unknown(fn):
    result = evaluate(fn, Independent((3,)))
    assert isinstance(result, Independent)
    assert result.known is None


def test_loops_over_constants_are_not_unrolled():
    result = evaluate(lambda: lax.fori_loop(0, 10**9, lambda _, c: c + 1, 0))
    assert isinstance(result, Independent)
    assert result.known is None


def test_what_all_branches_hand_on_stays_known():
    def fn(c):
        known = jnp.arange(3)
        return lax.cond(c > 0, lambda: known, lambda: known)

    result = evaluate(fn, Independent(()))
    assert isinstance(result, Independent)
    np.testing.assert_array_equal(result.known.value, [0, 1, 2])


def test_known_indices_find_their_way_through_calls():
    """A shuffle of channels whose table is computed in one function and used in another."""

    @jax.jit
    def table():
        return jnp.arange(6).reshape(2, 3).T.reshape(6)

    @jax.jit
    def shuffle(x, indices):
        return x[:, indices]

    x = flow(draw(0, 2, 6))
    result = evaluate(lambda x: shuffle(x, table()), x)
    exact = counts(x)[:, np.arange(6).reshape(2, 3).T.reshape(6)]
    np.testing.assert_array_equal(counts(result), exact)
    jitted = jax.jit(lambda x: evaluate(lambda x: shuffle(x, table()), x).mantissa)(x)
    np.testing.assert_array_equal(jitted, result.mantissa)


def test_constants_of_the_traced_function_are_known():
    """Arrays that a function closes over are constants of its jaxpr."""
    order = jnp.asarray([2, 0, 1])
    x = flow(draw(0, 3))
    result = evaluate(lambda x: x[order], x)
    assert isinstance(result, Flow)
    np.testing.assert_array_equal(counts(result), counts(x)[np.asarray(order)])
