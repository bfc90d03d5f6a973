"""Control flow: calls are inlined, scans equal unrolled loops, branches add up."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

import dpai_jax as dpai
from dpai_jax.paths import Flow, Independent, Interpreter, Spread, Weight, register_rule
from tests.support.flows import (
    binary,
    counts,
    draw,
    evaluate,
    flow,
    gradients,
    weight,
)

Scan = Callable[..., tuple[Any, Any]]


def unrolled(
    body: Callable[[Any, Any], tuple[Any, Any]],
    start: Any,
    xs: Any,
    length: int | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """What `lax.scan` means, as a loop of Python."""
    steps = list(range(len(jax.tree.leaves(xs)[0]) if length is None else length))
    carry, ys = start, []
    for i in reversed(steps) if reverse else steps:
        carry, y = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        ys.append(y)
    ordered = ys[::-1] if reverse else ys
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *ordered)


# Networks by what loops in them, each a function of the loop, of the input x of shape (time, batch,
# features), of a stack of kernels w, and of two kernels u, v.
def stacked_layers(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    return scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


def residual_layers(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    return scan(lambda h, w: (h + jax.nn.relu(h @ w), h @ u), x, w)


def layers_from_the_last(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    return scan(lambda h, w: (h + jax.nn.relu(h @ w), h), x, w, reverse=True)


def normalised_layers(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    def body(h: Any, w: Any) -> tuple[Any, None]:
        normal = h * lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-6)
        return h + jax.nn.gelu(normal @ w), None

    return scan(body, x, w)[0]


def two_carries(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """A reversible network: the halves change places at each step."""

    def body(pair: Any, w: Any) -> tuple[Any, None]:
        a, b = pair
        return (b, a + jnp.tanh(b @ w)), None

    return scan(body, (x, jnp.tanh(x @ u)), w)[0]


def injected_input(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """The input, a constant of the loop, joins at each step."""
    return scan(lambda h, w: (jnp.tanh(h @ w + x @ u), None), jnp.tanh(x @ v), w)[0]


def recurrent(
    start: Callable[[Any], Any], scan: Scan, x: Any, w: Any, u: Any, v: Any, reverse: bool = False
) -> Any:
    def body(h: Any, x: Any) -> tuple[Any, Any]:
        h = jnp.tanh(h @ u + x @ v)
        return h, h

    return scan(body, start(x), x, reverse=reverse)


def gated_recurrent(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """A minimal gated unit from zeros: z of one kernel, the candidate of another."""

    def body(h: Any, x: Any) -> tuple[Any, Any]:
        z = jax.nn.sigmoid(x @ u)
        h = (1 - z) * h + z * jnp.tanh(x @ v + h @ w[0])
        return h, h

    return scan(body, jnp.zeros(x.shape[1:]), x)


def lstm(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        h, c = carry
        i, f, o = (jax.nn.sigmoid(x @ k + h @ u) for k in (w[0], w[1], w[2]))
        c = f * c + i * jnp.tanh(x @ v + h @ u)
        h = o * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros(x.shape[1:])
    return scan(body, (zeros, zeros), x)


def running_product(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """From ones, times a gate at each step."""
    return scan(lambda c, x: (c * jax.nn.sigmoid(x @ u), None), jnp.ones(x.shape[1:]), x)[0]


def mapped(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    return scan(lambda _, x: (None, jax.nn.relu(x @ u) @ v), None, x)[1]


def constant_carry(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """A carry that the body hands on unchanged, a kernel among them."""

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        h, kernel = carry
        return (h, kernel), x @ kernel + h

    return scan(body, (x[0], u), x)[1]


def counted_layers(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """Each step's kernel is picked by a counter, as in a loop written with indices."""

    def body(carry: Any, _: Any) -> tuple[Any, None]:
        h, i = carry
        return (jnp.tanh(h @ w[i]), i + 1), None

    return scan(body, (x, 0), None, length=3)[0][0]


def layers_over_time(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """A loop in a loop: recurrent layers, each over all of the time."""

    def layer(x: Any, w: Any) -> tuple[Any, Any]:
        def step(h: Any, x: Any) -> tuple[Any, Any]:
            h = jnp.tanh(h @ w + x @ u)
            return h, h

        last, xs = scan(step, jnp.zeros(x.shape[1:]), x)
        return xs, last @ v

    return scan(layer, x, w)


def loops_side_by_side(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    def body(h: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(h @ w), None

    return scan(body, x, w)[0] + scan(body, x, w[::-1])[0]


def past_a_loop(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """Two stages, and a connection that skips the second."""

    def body(h: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(h @ w), None

    h = scan(body, x, w)[0]
    return h + scan(body, h, w)[0]


def into_an_inner_loop(scan: Scan, x: Any, w: Any, u: Any, v: Any) -> Any:
    """The outer loop's carry joins at each step of the inner one."""

    def outer(c: Any, w: Any) -> tuple[Any, None]:
        return scan(lambda d, _: (jnp.tanh(d @ w) + d + c, None), jnp.tanh(c @ u), None, 2)[0], None

    return scan(outer, x, w)[0]


LOOPS: dict[str, Callable[..., Any]] = {
    "layers stacked": stacked_layers,
    "residual layers": residual_layers,
    "layers from the last": layers_from_the_last,
    "normalised layers": normalised_layers,
    "two carries": two_carries,
    "an input at each step": injected_input,
    "recurrent from zeros": functools.partial(recurrent, lambda x: jnp.zeros(x.shape[1:])),
    "recurrent from ones": functools.partial(recurrent, lambda x: jnp.ones(x.shape[1:])),
    "recurrent from the input": functools.partial(recurrent, lambda x: x[0]),
    "recurrent from the end": functools.partial(
        recurrent, lambda x: jnp.zeros(x.shape[1:]), reverse=True
    ),
    "gated from zeros": gated_recurrent,
    "an LSTM": lstm,
    "a product from ones": running_product,
    "mapped": mapped,
    "a carry that stays": constant_carry,
    "layers by a counter": counted_layers,
    "layers over time": layers_over_time,
    "loops side by side": loops_side_by_side,
    "a connection past a loop": past_a_loop,
    "a connection into an inner loop": into_an_inner_loop,
}


def kernels() -> list[np.ndarray]:
    """A stack of three, and two, with few enough zeros that most units stay alive."""
    return [draw(1, 3, 2, 2) + np.eye(2), draw(2, 2, 2), draw(3, 2, 2) + np.eye(2)]


def total(network: Callable[..., Any], gates: str, x: Flow, *masks: Any) -> Flow:
    """The sum over all results of a network, each entry with a weight of its own."""

    def summed(*args: Any) -> Any:
        ends = [jnp.ravel(end) for end in jax.tree.leaves(network(*args))]
        return jnp.concatenate(ends)

    return evaluate(summed, x, *(weight(m, i) for i, m in enumerate(masks)), gates=gates)


UNIFORM = ["residual layers", "recurrent from zeros", "an LSTM", "mapped", "layers over time"]


@pytest.mark.parametrize(
    ("name", "held"),
    [*((name, (3, 2, 2)) for name in LOOPS), *((name, (1, 1, 2)) for name in UNIFORM)],
)
def test_a_scan_equals_the_unrolled_loop(name, held):
    x = flow(draw(0, *held), (3, 2, 2), exponent=9)
    ours, exact = (
        total(functools.partial(LOOPS[name], scan), "jacobian", x, *kernels())
        for scan in (lax.scan, unrolled)
    )
    np.testing.assert_allclose(counts(ours), counts(exact), rtol=1e-5)
    assert counts(exact).any()


@pytest.mark.parametrize("gates", ["balanced", "signal"])
def test_it_does_so_under_every_semantics_of_gates(gates):
    x = flow(draw(0, 3, 2, 2))
    ours, exact = (
        total(functools.partial(gated_recurrent, scan), gates, x, *kernels())
        for scan in (lax.scan, unrolled)
    )
    np.testing.assert_allclose(counts(ours), counts(exact), rtol=1e-5)


@pytest.mark.parametrize("name", ["residual layers", "layers by a counter", "layers over time"])
def test_its_gradients_are_those_of_the_unrolled_loop(name):
    slopes = []
    for scan in (lax.scan, unrolled):
        network = functools.partial(LOOPS[name], scan)

        def of_all(x: Any, *masks: Any, network: Any = network) -> Flow:
            return total(network, "jacobian", flow(x), *masks)

        size = counts(of_all(draw(0, 3, 2, 2), *kernels())).size
        slopes.append(gradients(of_all, draw(4, size) + 1, draw(0, 3, 2, 2), *kernels()))
    for ours, exact in zip(*slopes, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5)
    assert any(slope.any() for slope in slopes[0])


def test_steps_of_two_loops_over_one_value_are_different_units():
    """Pairs of positions: max(x_t, x_s) has the paths of both."""

    def pairs(x: Any) -> Any:
        return lax.map(lambda a: lax.map(lambda b: jnp.maximum(a, b), x), x)

    x = flow(draw(0, 3, 2))
    result = counts(evaluate(pairs, x))
    for t, s in itertools.permutations(range(3), 2):
        np.testing.assert_array_equal(result[t, s], counts(x)[t] + counts(x)[s])


def test_a_loop_of_no_steps_hands_on_what_it_starts_from():
    x = flow(draw(0, 2, 2))
    last, steps = evaluate(
        lambda x, w: lax.scan(lambda h, w: (h @ w, h), x, w), x, weight(np.zeros((0, 2, 2)))
    )
    np.testing.assert_array_equal(counts(last), counts(x))
    assert steps.shape == (0, 2, 2)


def test_a_learned_start_adds_no_path():
    def network(scan: Scan, x: Any, u: Any, start: Any) -> Any:
        def body(h: Any, x: Any) -> tuple[Any, Any]:
            h = jnp.tanh(h @ u + x)
            return h, h

        return scan(body, start, x)[1]

    x, u = flow(draw(0, 3, 2, 2)), weight(draw(1, 2, 2))
    ours, exact = (
        evaluate(functools.partial(network, scan), x, u, Independent((2, 2)))
        for scan in (lax.scan, unrolled)
    )
    np.testing.assert_array_equal(counts(ours), counts(exact))


def test_stacked_layers_multiply_their_masks():
    """Against numpy: 60 layers, whose counts float32 could not hold."""
    masks = draw(1, 60, 3, 3) + 1
    x = flow(np.ones((1, 3)))
    result = evaluate(
        lambda x, w: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0], x, weight(masks)
    )
    exact = functools.reduce(np.matmul, masks, np.ones((1, 3)))
    np.testing.assert_allclose(counts(result), exact, rtol=1e-5)


def test_outputs_of_all_steps_come_under_one_scale():
    """Steps whose counts lie 2^200 apart: the small ones vanish beside the large, and only they."""

    def network(x: Any, w: Any) -> Any:
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), h), x, w)[1]

    masks = np.concatenate([np.full((4, 1, 1), 2.0**50), np.full((4, 1, 1), 2.0**-50)])
    result = evaluate(network, flow([[1.0]]), weight(masks))
    powers = np.asarray([0, 50, 100, 150, 200, 150, 100, 50])
    exact = np.where(powers > 200 - 120, np.ldexp(1.0, powers), 0)
    np.testing.assert_array_equal(counts(result)[:, 0, 0], exact)


def test_empty_steps_leave_the_scale_to_the_others():
    def network(x: Any, w: Any) -> Any:
        return lax.scan(lambda h, w: (h @ w, h @ w), x, w)[1]

    masks = np.asarray([2.0**60, 2.0**60, 2.0**60, 0.0, 1.0]).reshape(5, 1, 1)
    result = evaluate(network, flow([[1.0]]), weight(masks))
    exact = [2.0**60, 2.0**120, 2.0**180, 0, 0]
    np.testing.assert_array_equal(counts(result)[:, 0, 0], exact)


def test_a_loop_with_an_index_is_a_scan():
    w = draw(1, 3, 2, 2)

    def network(x: Any, w: Any) -> Any:
        return lax.fori_loop(0, 3, lambda i, h: h + jnp.tanh(h @ w[i]), x)

    x = flow(draw(0, 2, 2))
    exact = functools.reduce(lambda h, m: h + h @ m, w, counts(x))
    np.testing.assert_array_equal(counts(evaluate(network, x, weight(w))), exact)


def test_a_counter_finds_its_way_through_arithmetic():
    """Kernels from the last to the first, every other one: w[2 * (1 - i) + 1]."""
    w = draw(1, 4, 2, 2)

    def network(x: Any, w: Any) -> Any:
        return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ w[2 * (1 - i) + 1]), x)

    x = flow(draw(0, 2, 2))
    np.testing.assert_array_equal(counts(evaluate(network, x, weight(w))), counts(x) @ w[3] @ w[1])


def test_counters_of_a_loop_in_a_loop_are_told_apart():
    w = draw(1, 2, 2, 2, 2)

    def network(x: Any, w: Any) -> Any:
        def outer(i: Any, h: Any) -> Any:
            return lax.fori_loop(0, 2, lambda j, h: jnp.tanh(h @ w[i, j]), h)

        return lax.fori_loop(0, 2, outer, x)

    x = flow(draw(0, 2, 2))
    exact = functools.reduce(np.matmul, w.reshape(4, 2, 2), counts(x))
    np.testing.assert_array_equal(counts(evaluate(network, x, weight(w))), exact)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(counts(evaluate(network, x, weight(w))), exact)


def test_sums_over_many_steps_stay_in_range():
    """Fibonacci's numbers: two units that add up 300 times, beyond 2^200."""

    def network(a: Any, b: Any) -> Any:
        return lax.fori_loop(0, 300, lambda _, pair: (pair[1], pair[0] + pair[1]), (a, b))[1]

    numbers = [1, 1]
    for _ in range(300):
        numbers.append(numbers[-1] + numbers[-2])
    result = evaluate(network, flow([1.0]), flow([1.0]))
    np.testing.assert_allclose(counts(result), [float(numbers[-1])], rtol=1e-4)


def test_a_loop_writes_its_steps_into_a_buffer():
    def network(x: Any, w: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            h, buffer = carry
            h = jnp.tanh(h @ w)
            return h, lax.dynamic_update_index_in_dim(buffer, h, i, 0)

        return lax.fori_loop(0, 3, body, (x, jnp.zeros((3, 2))))[1]

    x, w = flow(draw(0, 2) + 1), draw(1, 2, 2) + 1
    powers = [counts(x) @ np.linalg.matrix_power(w, i + 1) for i in range(3)]
    np.testing.assert_array_equal(counts(evaluate(network, x, weight(w))), np.stack(powers))


def test_a_scan_over_steps_that_are_known_sees_their_values():
    w = draw(1, 3, 2, 2)

    def network(x: Any, w: Any) -> Any:
        return lax.scan(lambda h, i: (jnp.tanh(h @ w[i]), None), x, jnp.asarray([2, 0]))[0]

    x = flow(draw(0, 2, 2))
    np.testing.assert_array_equal(counts(evaluate(network, x, weight(w))), counts(x) @ w[2] @ w[0])


def test_saturating_scans_stay_zeros_and_ones():
    w = draw(1, 3, 4, 4) > 2
    x = np.asarray([[1.0, 0.0, 0.0, 1.0]])
    last, steps = evaluate(
        lambda x, w: lax.scan(lambda h, w: (h + h @ w, h @ w), x, w),
        binary(x),
        weight(w),
        saturating=True,
    )
    reached, seen = x > 0, []
    for mask in w:
        seen.append(reached @ mask)
        reached = reached | seen[-1]
    np.testing.assert_array_equal(last.mantissa, reached)
    np.testing.assert_array_equal(steps.mantissa, np.stack(seen))


STACKS: dict[str, tuple[Callable[[Any, Any], Any], tuple[int, ...], tuple[Any, ...]]] = {
    "scanned over": (
        lambda w, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0],
        (5, 2, 2),
        ((1,), (2,), (0,)),
    ),
    "picked by a counter": (
        lambda w, x: lax.fori_loop(0, 5, lambda i, h: jnp.tanh(h @ w[i]), x),
        (5, 2, 2),
        ((1,), (2,), (0,)),
    ),
    "stacked along the last axis": (
        lambda w, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.moveaxis(w, -1, 0))[0],
        (2, 2, 5),
        ((0,), (1,), (2,)),
    ),
    "in a loop in a loop": (
        lambda w, x: lax.scan(
            lambda h, w: (lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, w)[0], None), x, w
        )[0],
        (3, 4, 2, 2),
        ((2,), (3,), (0, 1)),
    ),
    "shared by all steps": (
        lambda w, x: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, 4)[0],
        (2, 2),
        ((0,), (1,), ()),
    ),
    "in heads": (
        lambda w, x: lax.scan(
            lambda h, w: (h + jnp.einsum("bd,dhk->bhk", h, w).reshape(3, 2), None), x, w
        )[0],
        (5, 2, 1, 2),
        ((1,), (2, 3), (0,)),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_the_axes_over_copies_of_a_layer_are_found(name):
    fn, shape, expected = STACKS[name]
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (3, 2))]
    (layer,) = dpai.trace(fn, *structs).layers
    assert (layer.inputs, layer.outputs, layer.stack) == expected
    assert layer.copies == np.prod([shape[i] for i in expected[2]], dtype=int)


@pytest.mark.parametrize(("index", "taken"), [(0, 0), (2, 2), (-5, 0), (9, 2)])
def test_of_branches_with_a_known_index_one_is_taken(index, taken):
    branches = [jnp.tanh, lambda x: x[::-1], jnp.cumsum]
    x = flow(draw(0, 3))
    result = evaluate(lambda x: lax.switch(jnp.asarray(index), branches, x), x)
    exact = [counts(x), counts(x)[::-1], np.cumsum(counts(x))][taken]
    np.testing.assert_array_equal(counts(result), exact)


def test_branches_with_an_unknown_index_add_up():
    """Any may be taken: a mixture of experts chosen by a router."""

    def network(x: Any, w: Any, u: Any, i: Any) -> Any:
        return lax.switch(i, [lambda x: x @ w, lambda x: x @ u, lambda x: jnp.ones((2, 2))], x)

    x, w, u = flow(draw(0, 2, 2)), draw(1, 2, 2), draw(2, 2, 2)
    types = [jnp.float32] * 3 + [jnp.int32]
    result = evaluate(network, x, weight(w), weight(u, 1), Independent(()), dtypes=types)
    np.testing.assert_array_equal(counts(result), counts(x) @ w + counts(x) @ u)

    def routed(x: Any, w: Any, u: Any) -> Any:
        return network(x, w, u, jnp.argmax(x[0]))

    result = evaluate(routed, x, weight(w), weight(u, 1))
    np.testing.assert_array_equal(counts(result), counts(x) @ w + counts(x) @ u)


def test_of_one_computation_for_several_platforms_one_counts():
    x, w = flow(draw(0, 2, 2)), draw(1, 2, 2)

    def network(x: Any, w: Any) -> Any:
        return lax.platform_dependent(
            x, w, cpu=jnp.matmul, tpu=lambda x, w: (w.T @ x.T).T, default=jnp.matmul
        )

    np.testing.assert_array_equal(counts(evaluate(network, x, weight(w))), counts(x) @ w)


def test_branches_that_keep_the_unit_are_the_unit():
    x = flow(draw(0, 2, 2), unit="x")
    result = evaluate(
        lambda x, p: lax.cond(p[0, 0] > 0, jnp.tanh, lambda x: 2 * x, x), x, Independent((2, 2))
    )
    assert result.unit == "x"
    np.testing.assert_array_equal(counts(result), counts(x))


@pytest.mark.parametrize(
    ("branches", "alive"),
    [
        ((jax.nn.sigmoid, jnp.exp), True),
        ((jax.nn.sigmoid, jnp.tanh), False),
        ((jnp.sin, jnp.tanh), False),
    ],
)
def test_a_branch_is_alive_at_zero_where_all_are(branches, alive):
    result = evaluate(
        lambda x, p: lax.cond(p[0, 0] > 0, *branches, x), flow(draw(0, 2, 2)), Independent((2, 2))
    )
    assert result.always_alive == alive


def test_branches_hand_on_kernels_and_free_values():
    def network(p: Any, w: Any, u: Any) -> Any:
        same = lax.cond(p > 0, lambda w, u: w, lambda w, u: w, w, u)
        either = lax.cond(p > 0, lambda w, u: w, lambda w, u: u, w, u)
        return same, either

    w, u = weight(draw(0, 2, 2)), weight(draw(1, 2, 2), 1)
    same, either = evaluate(network, Independent(()), w, u)
    assert isinstance(same, Weight)
    assert isinstance(either, Independent)


@jax.custom_jvp
def with_a_derivative(x: Any) -> Any:
    return jnp.tanh(x)


with_a_derivative.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), tangents[0]))


@jax.custom_vjp
def with_a_gradient(x: Any) -> Any:
    return jnp.tanh(x)


with_a_gradient.defvjp(lambda x: (jnp.tanh(x), None), lambda _, g: (g,))


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
        jax.named_call,
        lambda f: jax.jit(jax.checkpoint(jax.jit(f))),
        lambda f: lambda x, w: with_a_derivative(f(x, w)),
        lambda f: lambda x, w: with_a_gradient(f(x, w)),
        lambda f: lambda x, w: jax.vmap(f, (0, None))(x, w),
        lambda f: lambda x, w: jax.linearize(lambda x: f(x, w), x)[0],
    ],
)
def test_calls_are_what_they_call(wrap):
    x, w = flow(draw(0, 2, 2)), draw(1, 2, 2)
    result = evaluate(wrap(lambda x, w: jnp.tanh(x @ w)), x, weight(w))
    np.testing.assert_array_equal(counts(result), counts(x) @ w)
    (layer,) = dpai.trace(
        lambda w, x: wrap(lambda x, w: x @ w)(x, w), jnp.ones((2, 2)), jnp.ones((2, 2))
    ).layers
    assert (layer.inputs, layer.outputs) == ((0,), (1,))


# Counters of loops: the first, whether to go on, the next, and how many steps that gives.
COUNTED: dict[str, tuple[Any, Any, Any, int]] = {
    "up to a constant": (0, lambda i: i < 3, lambda i: i + 1, 3),
    "down": (7, lambda i: i > 0, lambda i: i - 2, 4),
    "powers": (1, lambda i: i * i < 50, lambda i: 2 * i, 3),
    "no step": (5, lambda i: i < 5, lambda i: i + 1, 0),
    "a compiled test": (0, jax.jit(lambda i: i != 2), lambda i: i + 1, 2),
}


@pytest.mark.parametrize("held", [(2, 3), (1, 3), (1, 1)])
@pytest.mark.parametrize("name", COUNTED)
def test_a_while_loop_with_a_known_number_of_steps_is_that_many_steps(name, held):
    start, test, count_on, steps = COUNTED[name]
    x, w, u = flow(draw(0, *held), (2, 3), exponent=3), draw(1, 3, 3), draw(2, 3, 3)

    def step(h: Any, i: Any, w: Any, u: Any) -> Any:
        return h + jnp.tanh(h @ jnp.where(i % 2 == 0, w, u)) @ u

    def looped(x: Any, w: Any, u: Any) -> Any:
        def body(carry: Any) -> Any:
            i, noise, h = carry
            return count_on(i), jnp.sin(noise), step(h, i, w, u)

        return lax.while_loop(lambda carry: test(carry[0]), body, (start, jnp.ones(4), x))[2]

    def written_out(x: Any, w: Any, u: Any) -> Any:
        i = start
        for _ in range(steps):
            x, i = step(x, i, w, u), count_on(i)
        return x

    kernels = weight(w, 0), weight(u, 1)
    looped_counts = counts(evaluate(looped, x, *kernels))
    np.testing.assert_allclose(looped_counts, counts(evaluate(written_out, x, *kernels)), 1e-6)
    saturated = [
        evaluate(fn, binary(counts(x) > 0), *kernels, saturating=True)
        for fn in (looped, written_out)
    ]
    np.testing.assert_array_equal(*(np.broadcast_to(r.mantissa, (2, 3)) for r in saturated))


def test_the_gradient_through_a_counted_while_loop_is_that_of_its_steps():
    x, w = draw(0, 2, 3), draw(1, 3, 3)

    def looped(x: Any, w: Any) -> Any:
        return lax.fori_loop(0, bound, lambda _, h: h + jax.nn.relu(h @ w), x)

    def written_out(x: Any, w: Any) -> Any:
        for _ in range(3):
            x = x + jax.nn.relu(x @ w)
        return x

    # A bound that is a traced constant makes a while loop.
    bound = jnp.asarray(3)
    assert "while" in str(jax.make_jaxpr(lambda x, n: lax.fori_loop(0, n, lambda _, h: h, x))(x, 3))
    probe = draw(2, 2, 3) + 1
    found, exact = (
        gradients(lambda x, w, fn=fn: evaluate(fn, flow(x), weight(w)), probe, x, w)
        for fn in (jax.jit(looped), written_out)
    )
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, 1e-5)


# Loops of which nobody knows the number of steps, and a network that counts as they do.
SETTLING: dict[str, tuple[Any, Any]] = {
    "an activation until it is small": (
        lambda x: lax.while_loop(lambda y: jnp.max(y) > 1, lambda y: jnp.tanh(y / 2), x),
        lambda x: x,
    ),
    "Newton's square root of each entry": (
        lambda x: lax.while_loop(
            lambda y: jnp.any(jnp.abs(y * y - x) > 1e-3), lambda y: 0.5 * (y + x / y), jnp.ones(3)
        ),
        lambda x: x,
    ),
    "a norm by Newton, counting steps": (
        lambda x: (
            x
            / lax.while_loop(
                lambda c: c[1] ** 2 - jnp.sum(x * x) > 1e-3,
                lambda c: (c[0] + 1, 0.5 * (c[1] + jnp.sum(x * x) / c[1])),
                (0, jnp.sum(x * x)),
            )[1]
        ),
        lambda x: x,
    ),
    "two values that change places": (
        lambda x: lax.while_loop(
            lambda c: c[0][0] > 1, lambda c: (c[1], c[1] * 0.5), (jnp.ones(3), x)
        )[0],
        lambda x: x,
    ),
}


@pytest.mark.parametrize("name", SETTLING)
def test_a_while_loop_of_unknown_length_counts_where_its_steps_add_no_path(name):
    looped, exact = SETTLING[name]
    x = flow(draw(0, 3) + 1, exponent=2)
    np.testing.assert_array_equal(counts(evaluate(looped, x)), counts(evaluate(exact, x)))


def test_a_while_loop_without_a_flow_is_free():
    def network(x: Any, w: Any, c: Any) -> Any:
        steps = lax.while_loop(lambda i: i < 3.0, lambda i: i + jnp.sum(w), c)
        return x @ w + steps

    x, w = flow(draw(0, 2, 2)), draw(1, 2, 2)
    result = evaluate(network, x, weight(w), Independent(()))
    np.testing.assert_array_equal(counts(result), counts(x) @ w)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda x: lax.bitcast_convert_type(x, jnp.int32), "bitcast_convert_type"),
        (lambda x: jnp.linalg.cholesky(x), "cholesky"),
        (lambda x: lax.scan(lambda c, _: (jnp.linalg.cholesky(c), 0), x, None, 2)[0], "cholesky"),
    ],
)
def test_a_flow_into_anything_else_says_where_and_what_to_do(fn, name):
    with pytest.raises(NotImplementedError) as caught:
        evaluate(fn, flow(draw(0, 2, 2)))
    message = str(caught.value)
    assert repr(name) in message
    assert "test_control.py" in message
    assert "dpai_jax.paths.register_rule" in message


def make_primitive(name: str) -> Primitive:
    """A primitive of no rule: of one operand, and a result of its shape and type."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x, **_: x)
    return primitive


names = (f"a_test_primitive_{i}" for i in itertools.count())


def test_a_registered_rule_gives_a_primitive_its_semantics():
    primitive = make_primitive(next(names))

    def network(x: Any) -> Any:
        return primitive.bind(x, times=3) * 2.0

    x = flow(draw(0, 2, 3), unit="x")
    with pytest.raises(NotImplementedError, match=primitive.name):
        evaluate(network, x)

    @register_rule(primitive)
    def rule(interpreter: Interpreter, eqn: Any, x: Flow) -> Flow:
        times = eqn.params["times"]
        return interpreter.flow(Spread(x.mantissa * times, x.shape), x.exponent)

    np.testing.assert_array_equal(counts(evaluate(network, x)), 3 * counts(x))
    assert rule.__name__ == "rule"


def test_a_rule_registered_later_takes_the_place_of_the_one_before():
    primitive = make_primitive(next(names))
    register_rule(primitive)(lambda interpreter, eqn, x: x)
    register_rule(primitive)(lambda interpreter, eqn, x: Independent(x.shape))
    assert isinstance(evaluate(primitive.bind, flow(draw(0, 2, 3))), Independent)


def test_a_rule_may_return_several_results_and_is_spared_free_values():
    primitive = Primitive(next(names))
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda x: [x, x])
    register_rule(primitive)(lambda interpreter, eqn, x: [x, Independent(x.shape)])
    x = flow(draw(0, 2, 3))
    first, second = evaluate(primitive.bind, x)
    np.testing.assert_array_equal(counts(first), counts(x))
    assert isinstance(second, Independent)
    assert all(
        isinstance(end, Independent) for end in evaluate(primitive.bind, Independent((2, 3)))
    )


def test_a_primitive_without_a_rule_makes_a_kernel_free():
    primitive = make_primitive(next(names))
    assert isinstance(evaluate(primitive.bind, weight(draw(0, 2, 2))), Independent)


@pytest.mark.parametrize("primitive", ["exp", jnp.exp, None])
def test_a_rule_needs_a_primitive(primitive):
    with pytest.raises(TypeError, match="primitive must be"):
        register_rule(primitive)


def test_printing_changes_nothing(capsys):
    params = {"first": jnp.ones((3, 4)), "last": jnp.ones((4, 2))}

    def fn(params, x):
        hidden = x @ params["first"]
        jax.debug.print("hidden {}", hidden)
        return jax.nn.relu(hidden) @ params["last"]

    net = dpai.trace(fn, params, jnp.ones((1, 3)))
    assert float(dpai.log_paths(net, params)) == pytest.approx(np.log(3 * 4 * 2))
    assert capsys.readouterr().out == ""
