"""Shape operations against numpy, on flows with uniform axes and on kernels seen through them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import dpai_jax as dpai
from dpai_jax.paths import Flow, Independent
from dpai_jax.paths import values as v
from tests.support.flows import (
    binary,
    counts,
    draw,
    evaluate,
    flow,
    gradients,
    uniform_along_some,
    weight,
)

# An operation as JAX has it, and the same in numpy.
Pair = tuple[Callable[[Any], Any], Callable[[Any], Any]]
Shape = tuple[int, ...]


def twin(operation: Callable[[Any, Any], Any]) -> Pair:
    """An operation that JAX and numpy write alike."""
    return (lambda x: operation(jnp, x)), (lambda x: operation(np, x))


def transposed(rng: np.random.Generator, shape: Shape) -> Pair:
    order = rng.permutation(len(shape)).tolist()
    return twin(lambda xp, x: xp.transpose(x, order))


def reshaped(rng: np.random.Generator, shape: Shape) -> Pair:
    """To a random factorisation of the size, with axes of size one strewn in."""
    left, sizes = int(np.prod(shape)), []
    while left > 1:
        sizes.append(int(rng.choice([n for n in range(2, left + 1) if left % n == 0])))
        left //= sizes[-1]
    for place in rng.integers(0, len(sizes) + 1, rng.integers(0, 3)):
        sizes.insert(place, 1)
    return twin(lambda xp, x: xp.reshape(x, sizes))


def merged(rng: np.random.Generator, shape: Shape) -> Pair:
    """Two neighbouring axes made one."""
    i = int(rng.integers(len(shape) - 1)) if len(shape) > 1 else 0
    return twin(lambda xp, x: xp.reshape(x, (*x.shape[:i], -1, *x.shape[i + 2 :])))


def split_axis(rng: np.random.Generator, shape: Shape) -> Pair:
    """One axis made two."""
    i = int(rng.integers(len(shape)))
    n = int(rng.choice([n for n in range(1, shape[i] + 1) if shape[i] % n == 0]))
    return twin(lambda xp, x: xp.reshape(x, (*x.shape[:i], n, -1, *x.shape[i + 1 :])))


def expanded(rng: np.random.Generator, shape: Shape) -> Pair:
    i, n = int(rng.integers(len(shape) + 1)), int(rng.integers(1, 3))
    target = (*shape[:i], n, *shape[i:])
    return twin(lambda xp, x: xp.broadcast_to(xp.expand_dims(x, i), target))


def squeezed(rng: np.random.Generator, shape: Shape) -> Pair:
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and rng.random() < 0.7)
    return twin(lambda xp, x: xp.squeeze(x, axes))


def reversed_(rng: np.random.Generator, shape: Shape) -> Pair:
    axes = tuple(i for i in range(len(shape)) if rng.random() < 0.5)
    return twin(lambda xp, x: xp.flip(x, axes))


def sliced(rng: np.random.Generator, shape: Shape) -> Pair:
    starts = [int(rng.integers(size)) for size in shape]
    steps = rng.integers(1, 3, len(shape)).tolist()
    index = tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))
    return (lambda x: lax.slice(x, starts, x.shape, steps)), (lambda x: x[index])


def padded(rng: np.random.Generator, shape: Shape) -> Pair:
    """Around and between entries, and off the ends."""
    config = []
    for size in shape:
        low, high, inner = rng.choice([(0, 0, 0), (1, 0, 0), (0, 2, 1), (-1, 1, 0), (1, -1, 1)])
        config.append((int(low), int(high), int(inner)) if size > 1 else (0, 0, 0))

    def reference(x: np.ndarray) -> np.ndarray:
        for axis, (low, high, inner) in enumerate(config):
            rows = np.moveaxis(x, axis, 0)
            wide = np.zeros(((len(rows) - 1) * (inner + 1) + 1, *rows.shape[1:]))
            wide[:: inner + 1] = rows
            wide = wide[max(-low, 0) : len(wide) - max(-high, 0)]
            around = [(max(low, 0), max(high, 0))] + [(0, 0)] * (wide.ndim - 1)
            x = np.moveaxis(np.pad(wide, around), 0, axis)
        return x

    return (lambda x: lax.pad(x, np.float32(-7), config)), reference


def tiled(rng: np.random.Generator, shape: Shape) -> Pair:
    reps = rng.integers(1, 3, len(shape)).tolist()
    return twin(lambda xp, x: xp.tile(x, reps))


def repeated(rng: np.random.Generator, shape: Shape) -> Pair:
    axis = int(rng.integers(len(shape)))
    return twin(lambda xp, x: xp.repeat(x, 2, axis))


def rolled(rng: np.random.Generator, shape: Shape) -> Pair:
    """Split in two along an axis and put together in the other order."""
    axis = int(rng.integers(len(shape)))
    at = int(rng.integers(shape[axis] + 1))
    return twin(lambda xp, x: xp.concatenate(xp.split(x, [at], axis)[::-1], axis))


def restacked(rng: np.random.Generator, shape: Shape) -> Pair:
    """Unstacked along one axis, and stacked along another."""
    axis, onto = rng.integers(len(shape), size=2).tolist()
    return (
        lambda x: jnp.stack(jnp.unstack(x, axis=axis), onto),
        lambda x: np.stack(list(np.moveaxis(x, axis, 0)), onto),
    )


OPERATIONS = [
    transposed,
    reshaped,
    merged,
    split_axis,
    expanded,
    squeezed,
    reversed_,
    sliced,
    padded,
    tiled,
    repeated,
    rolled,
    restacked,
]


def chains(operations: list[Callable[..., Pair]]) -> st.SearchStrategy[Any]:
    """Seeds, each with two or three operations."""
    several = st.lists(st.sampled_from(operations), min_size=2, max_size=3)
    return st.tuples(st.integers(0, 2**32 - 1), several)


def build(seed: int, operations: list[Callable[..., Pair]]) -> tuple[Pair, Shape, Shape]:
    """A chain of operations on a random shape, the shape, and one that holds some axes once."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 4, rng.integers(2, 4)).tolist())
    pairs, x = [], np.zeros(shape)
    for operation in operations:
        # An operation on no axis at all has nothing to choose from.
        if x.ndim:
            pairs.append(operation(rng, x.shape))
            x = pairs[-1][1](x)

    def in_turn(side: int) -> Callable[[Any], Any]:
        def chain(x: Any) -> Any:
            for pair in pairs:
                x = pair[side](x)
            return x

        return chain

    return (in_turn(0), in_turn(1)), shape, uniform_along_some(rng, shape)


def check(seed: int, operations: list[Callable[..., Pair]]) -> None:
    (apply, reference), shape, held = build(seed, operations)
    array = draw(seed, *held)

    def network(array: Any) -> Flow:
        return evaluate(apply, flow(array, shape, unit="x", exponent=-3, at_zero=0.5))

    result = network(array)
    exact = reference(np.broadcast_to(array, shape))
    np.testing.assert_array_equal(counts(result), exact / 8)
    assert "x" in result.lineage
    probe, other = draw(1, *exact.shape), draw(2, *held)
    (slope,) = gradients(network, probe, array)
    assert 8 * np.sum(slope * other) == np.sum(probe * reference(np.broadcast_to(other, shape)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_moves_counts_as_numpy_moves_numbers(operation):
    check(7, [operation])


@settings(max_examples=6)
@given(chains(OPERATIONS))
def test_chains_of_operations_move_counts_as_numpy_moves_numbers(chain):
    check(*chain)


@settings(max_examples=10)
@given(chains([operation for operation in OPERATIONS if operation is not restacked]))
def test_a_kernel_is_seen_through_any_chain(chain):
    """An axis of a view along which a coordinate of the kernel varies is made of that axis."""
    (apply, reference), shape, _ = build(*chain)
    mask = draw(0, *shape)
    view = evaluate(apply, weight(mask, leaf=5))
    np.testing.assert_array_equal(view.array, reference(mask))
    for leaf, axes in view.sources:
        assert leaf == 5
        for k, coordinate in enumerate(np.indices(shape)):
            # Coordinates count from one; where padding put a zero, no entry of the kernel stands.
            seen = reference(coordinate + 1.0)
            smallest = np.where(seen == 0, np.inf, seen)
            for axis, made_of in enumerate(axes):
                if np.any(seen.max(axis, initial=0) > smallest.min(axis, initial=np.inf)):
                    assert k in made_of


@pytest.mark.parametrize(
    ("fn", "held"),
    [
        (lambda x: x.reshape(2, 12), (2, 1)),
        (lambda x: x.reshape(2, 3, 2, 2), (2, 1, 1, 1)),
        (lambda x: x.reshape(1, 2, 1, 12), (1, 2, 1, 1)),
        (lambda x: x.transpose(2, 0, 1), (1, 2, 1)),
        (lambda x: x[:, 1:, ::2], (2, 1, 1)),
        (lambda x: x[None, :, 0], (1, 2, 1)),
        (lambda x: jnp.flip(x), (2, 1, 1)),
        (lambda x: jnp.broadcast_to(x[:, None], (2, 5, 3, 4)), (2, 1, 1, 1)),
        (lambda x: jnp.pad(x, ((1, 1), (0, 0), (0, 0))), (4, 1, 1)),
        (lambda x: jnp.concatenate([x, 2 * x]), (4, 1, 1)),
        (lambda x: jnp.stack([x, x], 1), (2, 2, 1, 1)),
        (lambda x: jnp.split(x, 3, 1)[1], (2, 1, 1)),
    ],
)
def test_axes_that_an_operation_leaves_alone_stay_uniform(fn, held):
    result = evaluate(fn, flow(draw(0, 2, 1, 1), (2, 3, 4)))
    assert result.mantissa.shape == held


def test_a_view_is_a_unit_of_its_own_and_the_same_view_the_same_unit():
    x = flow(draw(0, 4, 2), unit="x")
    halves = evaluate(lambda x: (x[:2], jnp.tanh(x)[:2], x[2:], jnp.split(x, 2)[0]), x)
    assert halves[0].unit == halves[1].unit
    assert len({"x", halves[0].unit, halves[2].unit}) == 3
    parts = evaluate(lambda x: jnp.split(x, 2), x)
    assert parts[0].unit != parts[1].unit


def test_parts_of_one_value_add_up():
    """A maxout or a fold: different entries of one value are different units."""
    x = flow(draw(0, 4, 2))
    result = evaluate(lambda x: jnp.maximum(x[:2], x[2:]), x)
    np.testing.assert_array_equal(counts(result), counts(x)[:2] + counts(x)[2:])


def test_a_gated_linear_unit_multiplies_the_halves_of_one_value():
    x = flow(draw(0, 2, 6))
    a, b = np.split(counts(x), 2, 1)
    result = evaluate(jax.nn.glu, x)
    np.testing.assert_array_equal(counts(result), a + (a > 0) * b)


@pytest.mark.parametrize("axis", [0, 1])
def test_concatenation_puts_counts_under_one_scale_and_zeros_where_nothing_flows(axis):
    a = flow(draw(0, 2, 1), (2, 3), exponent=4, ancestors=["input", "a's own"])
    b = flow(draw(1, 1, 3), (2, 3), exponent=-2, ancestors=["input"])
    result = evaluate(lambda a, b, c: jnp.concatenate([a, c, b], axis), a, b, Independent((2, 3)))
    exact = np.concatenate([counts(a), np.zeros((2, 3)), counts(b)], axis)
    np.testing.assert_array_equal(counts(result), exact)
    assert result.ancestors == {"input"}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacking_does_the_same_along_a_new_axis(axis):
    a, b = flow(draw(0, 1, 3), (2, 3), exponent=4), flow(draw(1, 2, 3), exponent=-2)
    result = evaluate(lambda a, b, c: jnp.stack([a, c, b], axis), a, b, Independent((2, 3)))
    exact = np.stack([counts(a), np.zeros((2, 3)), counts(b)], axis)
    np.testing.assert_array_equal(counts(result), exact)


def test_an_empty_part_does_not_push_the_others_out_of_range():
    full, empty = flow([[1.0, 3.0]]), flow([[0.0, 0.0]], exponent=500)
    result = evaluate(lambda a, b: jnp.concatenate([a, b]), full, empty)
    np.testing.assert_array_equal(counts(result), [[1, 3], [0, 0]])


@pytest.mark.parametrize("rests", [(0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.5, 2.0)])
def test_a_concatenation_is_alive_at_zero_where_every_part_is(rests):
    a, b = (flow(draw(i, 2, 3), at_zero=rest) for i, rest in enumerate(rests))
    assert evaluate(lambda a, b: jnp.concatenate([a, b]), a, b).always_alive == all(rests)


def test_what_is_put_beside_a_unit_may_be_dead_at_zero():
    x = flow(draw(0, 2, 3), at_zero=0.5)
    for fn, alive in [
        (lambda x: jnp.concatenate([x, jnp.zeros((1, 3))]), False),
        (lambda x: jnp.concatenate([x, jnp.ones((1, 3))]), True),
        (lambda x: jnp.pad(x, 1), False),
        (lambda x: jnp.pad(x, 1, constant_values=1.0), True),
    ]:
        assert evaluate(fn, x).always_alive == alive


def test_what_is_cropped_away_leaves_no_trace_in_the_scale():
    far = Flow(jnp.asarray([0.5, 2.0**-120, 0.0]), jnp.int32(120), (3,), "far")
    near = flow([3.0])
    for crop, exact in [((-1, -1, 0), 4.0), ((-2, 0, 0), 3.0)]:
        result = evaluate(
            lambda x, y, crop=crop: lax.pad(x, np.float32(0), [crop]) + y,
            v.replace(far, exponent=jnp.int32(120 if exact == 4.0 else 400)),
            near,
        )
        np.testing.assert_array_equal(counts(result), [exact])


def test_views_keep_what_a_unit_gives_at_zero():
    x = flow(draw(0, 2, 4), at_zero=0.5)
    for fn in (jnp.transpose, jnp.ravel, lambda x: x[:, 1:3], lambda x: jnp.split(x, 2, 1)[0]):
        assert evaluate(fn, x).at_zero == 0.5


def test_saturating_views_stay_zeros_and_ones():
    x = np.asarray([[0.0, 1.0], [1.0, 0.0]])

    def fn(x: Any) -> Any:
        return jnp.concatenate([jnp.pad(x.T, 1)[:, ::-1].reshape(2, 8), jnp.ones((2, 1))], 1)

    result = evaluate(fn, binary(x), saturating=True)
    exact = np.pad(x.T, 1)[:, ::-1].reshape(2, 8)
    np.testing.assert_array_equal(result.mantissa, np.concatenate([exact, np.zeros((2, 1))], 1))


def test_an_array_without_entries_flows_nowhere():
    x = flow(draw(0, 2, 1), (2, 3))
    for fn in (
        lambda x: x[:, 3:],
        lambda x: x[:, :0].reshape(0),
        lambda x: jnp.split(x, [0], 1)[0],
    ):
        result = evaluate(fn, x)
        assert counts(result).size == 0
        joined = evaluate(lambda x, fn=fn: jnp.concatenate([fn(x).reshape(2, 0), x], 1), x)
        np.testing.assert_array_equal(counts(joined), counts(x))


def test_kernels_side_by_side_keep_their_names_and_count_ones_where_nobody_prunes():
    a, b = weight(draw(0, 2, 3), leaf=1), weight(draw(1, 2, 1), leaf=4)
    fused = evaluate(lambda a, b, c: jnp.concatenate([a, c, b], 1), a, b, Independent((2, 2)))
    exact = np.concatenate([draw(0, 2, 3), np.ones((2, 2)), draw(1, 2, 1)], 1)
    np.testing.assert_array_equal(fused.array, exact)
    assert {leaf for leaf, _ in fused.sources} == {1, 4}
    stacked = evaluate(lambda a, c: jnp.stack([a, c], 1), a, Independent((2, 3)))
    np.testing.assert_array_equal(stacked.array, np.stack([draw(0, 2, 3), np.ones((2, 3))], 1))


def conv(x: Any, kernel: Any, **options: Any) -> Any:
    """A convolution of images (batch, height, width, features) by kernels HWIO."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def fused_projection(p: Any, x: Any) -> Any:
    q, k = jnp.split(x @ jnp.concatenate([p["q"], p["k"]], 1), 2, -1)
    return q + k


# How a kernel is used, its shape, that of the input, and its inputs, outputs, taps, stack, groups.
USES: dict[str, tuple[Callable[[Any, Any], Any], Shape, Shape, tuple[Any, ...]]] = {
    "as it is": (lambda w, x: x @ w, (4, 6), (2, 4), ((0,), (1,), (), (), 1)),
    "transposed": (lambda w, x: x @ w.T, (6, 4), (2, 4), ((1,), (0,), (), (), 1)),
    "on the left": (lambda w, x: w @ x, (6, 4), (4, 2), ((1,), (0,), (), (), 1)),
    "into heads": (
        lambda w, x: jnp.einsum("td,dhk->thk", x, w),
        (4, 2, 3),
        (5, 4),
        ((0,), (1, 2), (), (), 1),
    ),
    "out of heads": (
        lambda w, x: jnp.einsum("thk,hkd->td", x, w),
        (2, 3, 4),
        (5, 2, 3),
        ((0, 1), (2,), (), (), 1),
    ),
    "heads folded": (
        lambda w, x: x @ w.reshape(4, 6),
        (4, 2, 3),
        (5, 4),
        ((0,), (1, 2), (), (), 1),
    ),
    "one of two halves": (
        lambda w, x: x @ jnp.split(w, 2, 1)[1],
        (4, 6),
        (2, 4),
        ((0,), (1,), (), (), 1),
    ),
    "both halves": (
        lambda w, x: x @ w[:, :3] + x @ w[:, 3:],
        (4, 6),
        (2, 4),
        ((0,), (1,), (), (), 1),
    ),
    "one of a stack": (
        lambda w, x: jnp.tanh(x @ w[0]) @ w[1],
        (2, 4, 4),
        (3, 4),
        ((1,), (2,), (), (0,), 1),
    ),
    "unstacked": (
        lambda w, x: jnp.tanh(x @ jnp.unstack(w)[0]) @ jnp.unstack(w)[1],
        (2, 4, 4),
        (3, 4),
        ((1,), (2,), (), (0,), 1),
    ),
    "one for each group": (
        lambda w, x: jnp.einsum("tgi,gio->tgo", x, w),
        (3, 4, 2),
        (5, 3, 4),
        ((1,), (0, 2), (), (), 3),
    ),
    "mapped over experts": (
        lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x),
        (3, 4, 2),
        (3, 5, 4),
        ((1,), (0, 2), (), (), 3),
    ),
    "standardised": (
        lambda w, x: x @ ((w - w.mean(0)[None]) / w.std(0)[None]),
        (4, 6),
        (2, 4),
        ((0,), (1,), (), (), 1),
    ),
    "in another precision": (
        lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
        (4, 6),
        (2, 4),
        ((0,), (1,), (), (), 1),
    ),
    "as a filter": (
        lambda w, x: conv(x, w),
        (3, 3, 2, 5),
        (1, 4, 4, 2),
        ((2,), (3,), (0, 1), (), 1),
    ),
    "as a filter OIHW": (
        lambda w, x: conv(x, w.transpose(2, 3, 1, 0)),
        (5, 2, 3, 3),
        (1, 4, 4, 2),
        ((1,), (0,), (2, 3), (), 1),
    ),
    "as a filter of one tap": (
        lambda w, x: conv(x, w[None, None]),
        (2, 5),
        (1, 4, 4, 2),
        ((0,), (1,), (), (), 1),
    ),
    "as a filter of one tap, reshaped": (
        lambda w, x: conv(x, w.reshape(1, 1, 2, 5)),
        (2, 5),
        (1, 4, 4, 2),
        ((0,), (1,), (), (), 1),
    ),
    "depthwise": (
        lambda w, x: conv(x, w, feature_group_count=4),
        (3, 3, 1, 4),
        (1, 4, 4, 4),
        ((2,), (3,), (0, 1), (), 4),
    ),
    "transposed convolution": (
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME", transpose_kernel=True),
        (3, 3, 5, 2),
        (1, 4, 4, 2),
        ((3,), (2,), (0, 1), (), 1),
    ),
    "columns in another order": (
        lambda w, x: x @ w[:, jnp.asarray([2, 0, 1])],
        (4, 3),
        (2, 4),
        ((0,), (1,), (), (), 1),
    ),
    "rows in another order": (
        lambda w, x: x @ w[jnp.asarray([2, 0, 1])],
        (3, 5),
        (2, 3),
        ((0,), (1,), (), (), 1),
    ),
    "on patches": (
        lambda w, x: x @ w.reshape(12, 5),
        (2, 2, 3, 5),
        (4, 12),
        ((0, 1, 2), (3,), (), (), 1),
    ),
}


@pytest.mark.parametrize("name", USES)
def test_the_axes_of_a_kernel_are_found_through_every_view(name):
    fn, kernel, x, expected = USES[name]
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (kernel, x)]
    (layer,) = dpai.trace(fn, *structs).layers
    found = (layer.inputs, layer.outputs, layer.taps, layer.stack, layer.groups)
    assert found == expected
    assert layer.shape == kernel


def test_kernels_put_together_are_layers_each():
    p = {name: jax.ShapeDtypeStruct((4, 3), jnp.float32) for name in "qk"}
    layers = dpai.trace(fused_projection, p, jax.ShapeDtypeStruct((2, 4), jnp.float32)).layers
    assert sorted(layer.name for layer in layers) == ["k", "q"]
    assert {(layer.inputs, layer.outputs, layer.taps, layer.stack) for layer in layers} == {
        ((0,), (1,), (), ())
    }


def test_a_kernel_used_in_parts_is_counted_in_each():
    """Both halves of one kernel: the gradient of the sum reaches every entry."""
    x, mask = flow(draw(0, 2, 4)), draw(1, 4, 6)

    def network(mask: Any) -> Flow:
        return evaluate(lambda x, w: x @ w[:, :3] + x @ w[:, 3:], x, weight(mask))

    exact = counts(x) @ mask[:, :3] + counts(x) @ mask[:, 3:]
    np.testing.assert_array_equal(counts(network(mask)), exact)
    (slope,) = gradients(network, np.ones((2, 3)), mask)
    np.testing.assert_array_equal(slope, np.broadcast_to(counts(x).sum(0)[:, None], (4, 6)))


def test_the_order_of_large_scales_does_not_matter_to_a_reshape():
    x = v.replace(flow(draw(0, 2, 6)), exponent=jnp.int32(10**6))
    result = evaluate(lambda x: x.reshape(3, 4), x)
    assert int(result.exponent) == 10**6
    np.testing.assert_array_equal(result.mantissa, np.reshape(x.mantissa, (3, 4)))
