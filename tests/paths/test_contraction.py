"""Contractions against loops in float64: any dimension numbers, uniform axes, kernels and flows."""

import dataclasses
import itertools
import math
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
    Window,
    assert_normal,
    binary,
    counts,
    draw,
    evaluate,
    factors,
    flow,
    gradients,
    random_window,
    uniform_along_some,
    weight,
)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A bilinear operation, its slow reference, and the sizes of what it takes.

    Attributes:
      apply: the operation on JAX arrays.
      reference: the same on float64 arrays, written with loops or `einsum`.
      shapes: the shapes of both operands.
      held: the shapes in which flows hold them: of size one along uniform axes.
      outputs: the kernel's axes over output features, where the second operand is one.
      inputs: its axes over input features.
      taps: its axes over positions of a filter.
      groups: into how many groups the features are split.
    """

    apply: Callable[[Any, Any], Any]
    reference: Callable[[np.ndarray, np.ndarray], np.ndarray]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    held: tuple[tuple[int, ...], tuple[int, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[int, ...] = ()
    groups: int = 1


def dot_product(rng: np.random.Generator) -> Contraction:
    """A `dot_general` over any number of contracted, batch and other axes in any order."""
    letters = iter("abcdefgh")
    batch, contracted, *rests = ([next(letters) for _ in range(n)] for n in rng.integers(0, 3, 4))
    sizes = dict(zip("abcdefgh", rng.integers(1, 4, 8).tolist(), strict=True))
    sides = [rng.permutation(batch + contracted + rest).tolist() for rest in rests]
    dims = tuple(
        tuple(tuple(side.index(letter) for letter in which) for side in sides)
        for which in (contracted, batch)
    )
    # Of the result: batch axes first, then those of each operand in its own order.
    result = batch + [c for side, rest in zip(sides, rests, strict=True) for c in side if c in rest]
    spec = f"{''.join(sides[0])},{''.join(sides[1])}->{''.join(result)}"
    shapes = tuple(tuple(sizes[letter] for letter in side) for side in sides)
    return Contraction(
        lambda x, y: lax.dot_general(x, y, dims),
        lambda x, y: np.einsum(spec, x, y),
        shapes,
        tuple(uniform_along_some(rng, shape) for shape in shapes),
        inputs=tuple(sorted(dims[0][1])),
        outputs=tuple(i for i in range(len(sides[1])) if i not in dims[0][1]),
        groups=math.prod(sizes[letter] for letter in batch),
    )


def convolve(
    x: np.ndarray, kernel: np.ndarray, along: list[Window], groups: int, batch_groups: int
) -> np.ndarray:
    """A convolution of (batch, in, *space) with (out, in, *taps), term by term."""
    per_batch, n_out = x.shape[0] // batch_groups, kernel.shape[0]
    per_group = kernel.shape[1]
    result = np.zeros((per_batch, n_out, *(window.steps for window in along)))
    for n, out, *steps in itertools.product(*map(range, result.shape)):
        for c, *taps in itertools.product(*map(range, kernel.shape[1:])):
            sites = [w.position(s, t) for w, s, t in zip(along, steps, taps, strict=True)]
            if None in sites:
                continue
            example = out // (n_out // batch_groups) * per_batch + n
            channel = out // (n_out // groups) * per_group + c
            result[(n, out, *steps)] += x[(example, channel, *sites)] * kernel[(out, c, *taps)]
    return result


def convolution(rng: np.random.Generator) -> Contraction:
    """A convolution of any layout, window and grouping over one or two spatial axes."""
    along = [random_window(rng) for _ in range(rng.integers(1, 3))]
    groups, batch_groups = rng.choice([(1, 1), (1, 1), (2, 1), (3, 1), (1, 2)]).tolist()
    per_group, per_batch, width = rng.integers(1, 3, 3).tolist()
    x = (per_batch * batch_groups, per_group * groups, *(window.size for window in along))
    kernel = (width * groups * batch_groups, per_group, *(window.taps for window in along))
    orders = [rng.permutation(len(x)).tolist() for _ in range(3)]
    specs = tuple(tuple(np.argsort(order).tolist()) for order in orders)

    def apply(lhs: Any, rhs: Any) -> Any:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides=[window.stride for window in along],
            padding=[window.padding for window in along],
            lhs_dilation=[window.dilation for window in along],
            rhs_dilation=[window.kernel_dilation for window in along],
            dimension_numbers=lax.ConvDimensionNumbers(*specs),
            feature_group_count=groups,
            batch_group_count=batch_groups,
        )

    def reference(lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
        lhs, rhs = lhs.transpose(specs[0]), rhs.transpose(specs[1])
        return convolve(lhs, rhs, along, groups, batch_groups).transpose(orders[2])

    shapes = tuple(
        tuple(shape[i] for i in order) for shape, order in zip((x, kernel), orders[:2], strict=True)
    )
    return Contraction(
        apply,
        reference,
        shapes,
        tuple(uniform_along_some(rng, shape) for shape in shapes),
        inputs=(specs[1][1],),
        outputs=(specs[1][0],),
        taps=tuple(sorted(specs[1][2:])),
        groups=groups * batch_groups,
    )


# Drawn by a seed: so every example is another operation, of sizes that need no shrinking.
contractions = st.builds(
    lambda make, seed: make(np.random.default_rng(seed)),
    st.sampled_from((dot_product, convolution)),
    st.integers(0, 2**32 - 1),
)
few, fewer = settings(max_examples=12), settings(max_examples=8)


def held_flow(contraction: Contraction, side: int, **properties: Any) -> tuple[Flow, np.ndarray]:
    """A flow on one side, and its counts written out."""
    array = draw(side, *contraction.held[side])
    value = flow(array, contraction.shapes[side], **properties)
    return value, np.broadcast_to(array, contraction.shapes[side])


@few
@given(contractions)
def test_of_a_flow_and_a_kernel_is_the_contraction_of_counts_and_mask(contraction):
    array, mask = draw(0, *contraction.held[0]), draw(1, *contraction.shapes[1])
    x = np.broadcast_to(array, contraction.shapes[0])
    exact = contraction.reference(x, mask)
    results = []

    def apply(array: Any, mask: Any) -> Flow:
        value = flow(array, contraction.shapes[0])
        results.append(evaluate(contraction.apply, value, weight(mask)))
        return results[-1]

    apply(array, mask)
    assert_normal(results[0])
    np.testing.assert_array_equal(counts(results[0]), exact)

    # The form is linear in each operand: its gradient, applied to any other, is its value there.
    probe = draw(2, *exact.shape)
    of_array, of_mask = gradients(apply, probe, array, mask)
    array, mask_2 = draw(3, *array.shape), draw(4, *mask.shape)
    moved = contraction.reference(np.broadcast_to(array, x.shape), mask)
    assert np.sum(of_array * array) == np.sum(probe * moved)
    assert np.sum(of_mask * mask_2) == np.sum(probe * contraction.reference(x, mask_2))


@fewer
@given(contractions)
def test_of_a_kernel_and_a_flow_is_the_same(contraction):
    mask = draw(3, *contraction.shapes[0])
    value, y = held_flow(contraction, 1)
    result = evaluate(contraction.apply, weight(mask), value)
    np.testing.assert_array_equal(counts(result), contraction.reference(mask, y))


@fewer
@given(contractions, st.booleans())
def test_values_that_no_path_passes_count_as_ones(contraction, flow_first):
    side = 0 if flow_first else 1
    value, x = held_flow(contraction, side)
    free = Independent(contraction.shapes[1 - side])
    ones = np.ones(contraction.shapes[1 - side])
    pair, arrays = ((value, free), (x, ones)) if flow_first else ((free, value), (ones, x))
    result = evaluate(contraction.apply, *pair)
    np.testing.assert_array_equal(counts(result), contraction.reference(*arrays))


@fewer
@given(contractions, st.sampled_from(["jacobian", "balanced", "signal"]), st.booleans())
def test_of_two_flows_sums_the_terms_of_the_product(contraction, gates, alive):
    a, _ = held_flow(contraction, 0)
    b, _ = held_flow(contraction, 1, exponent=3, at_zero=0.5 if alive else 0.0)
    result = evaluate(contraction.apply, a, b, gates=gates)
    x, y = factors(a, b, gates)
    alive_a, alive_b = (counts(a) > 0).astype(float), (counts(b) > 0) | alive
    exact = contraction.reference(x, alive_b.astype(float)) + contraction.reference(alive_a, y)
    np.testing.assert_allclose(counts(result), exact, rtol=1e-6)
    assert_normal(result)


def test_a_gradient_reaches_a_dead_factor_of_a_contraction():
    """Where the other side is alive, one path more on the dead side is one path more."""
    b = flow([[1.0, 0.0], [2.0, 3.0]])
    (slope,) = gradients(lambda a: evaluate(jnp.matmul, flow(a), b), [[1.0, 2.0]], [[0.0, 0.0]])
    np.testing.assert_array_equal(slope, [[1.0 * 1 + 2.0 * 0, 1.0 * 1 + 2.0 * 1]])


@pytest.mark.parametrize("rests", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_of_two_flows_is_alive_at_zero_where_both_are(rests):
    a, b = flow(draw(0, 2, 3), at_zero=rests[0]), flow(draw(1, 3, 2), at_zero=rests[1])
    assert evaluate(jnp.matmul, a, b).always_alive == all(rests)


def test_a_kernel_ends_what_a_unit_gives_at_zero_and_its_ancestry():
    x = flow(draw(0, 2, 3), unit="x", ancestors=["input"], at_zero=0.5)
    result = evaluate(jnp.matmul, x, weight(draw(1, 3, 2)))
    assert not result.always_alive
    assert not result.ancestors
    assert result.unit != "x"


def test_what_a_matrix_of_known_numbers_gives_is_a_statistic():
    """A mean or a rotation by a constant matrix, combined with its input, is normalisation."""
    x = flow(draw(0, 2, 3), unit="x")
    result = evaluate(lambda x: x - x @ jnp.full((3, 3), 1 / 3), x)
    assert result.unit == "x"
    np.testing.assert_array_equal(counts(result), counts(x))
    rotated = evaluate(lambda x, free: x + x @ free, x, Independent((3, 3)))
    exact = counts(x) + counts(x) @ np.ones((3, 3))
    np.testing.assert_array_equal(counts(rotated), exact)


def test_known_zeros_pass_no_path():
    """Sums by a matrix, a choice of rows, patches of an image: entries that are zero stay apart."""
    lower = np.tril(np.ones((3, 3), np.float32))
    x = flow(draw(0, 2, 1), (2, 3))
    np.testing.assert_array_equal(counts(evaluate(lambda x: x @ lower, x)), counts(x) @ lower)
    rows = evaluate(lambda x: jax.nn.one_hot(jnp.asarray([1, 0, 1]), 2) @ x, x)
    np.testing.assert_array_equal(counts(rows), counts(x)[[1, 0, 1]])
    image = flow(draw(1, 1, 2, 3, 3))
    patches = evaluate(
        lambda x: lax.conv_general_dilated_patches(x, (2, 2), (1, 1), "VALID"), image
    )
    shifts = [counts(image)[:, :, i : i + 2, j : j + 2] for i in range(2) for j in range(2)]
    exact = np.stack(shifts, 2).reshape(1, 8, 2, 2)
    np.testing.assert_array_equal(counts(patches), exact)


def test_of_a_flow_with_itself_is_a_product_of_two_units():
    """A Gram matrix: entry i, j is the sum over k of x_ik x_jk, whose terms both give paths."""
    x = flow(draw(0, 3, 2))
    alive = (counts(x) > 0).astype(float)
    exact = counts(x) @ alive.T + alive @ counts(x).T
    np.testing.assert_array_equal(counts(evaluate(lambda x: x @ x.T, x)), exact)


def test_without_a_flow_only_the_shape_is_left():
    result = evaluate(jnp.matmul, weight(draw(0, 2, 3)), Independent((3, 4)))
    assert isinstance(result, Independent)
    assert result.known is None
    assert isinstance(
        evaluate(jnp.matmul, weight(draw(0, 2, 3)), weight(draw(1, 3, 4))), Independent
    )


@fewer
@given(contractions)
def test_saturating_tells_which_results_a_path_reaches(contraction):
    x, mask = (draw(i, *shape) > 1 for i, shape in enumerate(contraction.shapes))
    result = evaluate(contraction.apply, binary(x), weight(mask), saturating=True)
    exact = contraction.reference(np.float64(x), np.float64(mask)) > 0
    np.testing.assert_array_equal(np.float64(result.mantissa), np.float64(exact))


@few
@given(contractions)
def test_the_kernels_axes_are_found(contraction):
    def fn(kernel: Any, x: Any) -> Any:
        return contraction.apply(x, kernel)

    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in contraction.shapes)
    if len(kernel.shape) < 2:
        return
    (layer,) = dpai.trace(fn, kernel, x).layers
    assert layer.inputs == contraction.inputs
    assert layer.outputs == contraction.outputs
    assert layer.taps == contraction.taps
    assert layer.groups == contraction.groups
    assert layer.stack == ()


def test_counts_keep_their_precision_over_many_layers():
    """Two hundred layers of width eight: 8^200 paths, far beyond float32's range."""
    value = v.replace(flow(np.ones((1, 8))), unit="x")
    for _ in range(200):
        value = evaluate(jnp.matmul, value, weight(np.ones((8, 8))))
    assert float(value.mantissa[0, 0]) * 2 ** (int(value.exponent) - 600) == 1.0


def ragged(x: np.ndarray, kernels: np.ndarray, sizes: Any) -> np.ndarray:
    """Each row by its group's kernel, row by row; rows past the last group give zeros."""
    group = np.repeat(np.arange(len(kernels)), sizes)
    rows = [x[i] @ kernels[g] for i, g in enumerate(group)]
    return np.stack([*rows, *np.zeros((len(x) - len(rows), kernels.shape[2]))])


@pytest.mark.parametrize("held", [(5, 3), (1, 3), (5, 1)])
@pytest.mark.parametrize("sizes", [(2, 3), (0, 5), (1, 2)])
def test_rows_are_multiplied_by_the_kernel_of_their_group(sizes, held):
    x, kernels = flow(draw(0, *held), (5, 3), exponent=2), draw(1, 2, 3, 4)
    groups = jnp.asarray(sizes)
    result = evaluate(lambda x, k: lax.ragged_dot(x, k, groups), x, weight(kernels))
    np.testing.assert_array_equal(counts(result), ragged(counts(x), kernels, sizes))
    both = evaluate(lambda x, k: lax.ragged_dot(x, k, groups), x, flow(kernels))
    alive = ragged(np.float64(counts(x) > 0), kernels, sizes)
    exact = ragged(counts(x), np.float64(kernels > 0), sizes) + alive
    np.testing.assert_array_equal(counts(both), exact)


@pytest.mark.parametrize("held", [(5, 3), (1, 3), (5, 1)])
def test_rows_of_unknown_groups_may_be_in_any(held):
    x, kernels = flow(draw(0, *held), (5, 3)), draw(1, 2, 3, 4)
    dtypes = [jnp.float32, jnp.float32, jnp.int32]
    result = evaluate(lax.ragged_dot, x, weight(kernels), Independent((2,)), dtypes=dtypes)
    np.testing.assert_array_equal(counts(result), np.einsum("nd,edf->nf", counts(x), kernels))
    batched = evaluate(
        jax.vmap(lax.ragged_dot),
        flow(np.stack([counts(x), 2 * counts(x)])),
        weight(np.stack([kernels, kernels])),
        Independent((2, 2)),
        dtypes=dtypes,
    )
    np.testing.assert_array_equal(counts(batched), np.stack([counts(result), 2 * counts(result)]))


def test_each_group_sums_over_its_own_rows():
    """`lax.ragged_dot_general` with ragged contracted rows, as in the gradient of a kernel."""
    x, y, sizes = draw(0, 5, 3), draw(1, 5, 4), np.asarray([2, 3])
    numbers = lax.RaggedDotDimensionNumbers(((((0,), (0,)), ((), ()))), [0], [])

    def fn(x: Any, y: Any) -> Any:
        return lax.ragged_dot_general(x, y, jnp.asarray(sizes), numbers)

    exact = np.stack([x[:2].T @ y[:2], x[2:].T @ y[2:]])
    np.testing.assert_array_equal(counts(evaluate(fn, flow(x), weight(y))), exact)


@pytest.mark.parametrize("known", [True, False])
def test_experts_are_groups_of_one_layer(known):
    params = {"experts": jnp.ones((2, 3, 4)), "sizes": jnp.asarray([2, 3])}

    def fn(params: Any, x: Any) -> Any:
        sizes = jnp.asarray([2, 3]) if known else params["sizes"]
        return lax.ragged_dot(x, params["experts"], sizes)

    (layer,) = dpai.trace(fn, params, jnp.ones((5, 3))).layers
    assert (layer.inputs, layer.outputs, layer.groups) == ((1,), (0, 2), 2)
