"""Convolutions of counts against `lax.conv_general_dilated` and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dpai_jax.tools.convolutions import Convolution

# Eight features in one to eight groups. With eight each is by itself, and three are made of it.
every_number_of_groups = pytest.mark.parametrize("groups", [8, 4, 2, 1])
every_window = pytest.mark.parametrize(
    ("strides", "padding", "base_dilation", "dilation"),
    [
        ((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
        ((2, 1), ((1, 2), (0, -1)), (1, 2), (2, 3)),
        ((3, 2), ((0, 1), (2, 0)), (2, 1), (1, 2)),
    ],
)


# Narrow kernels of one group have a gradient of their own on CPUs.
every_width = pytest.mark.parametrize("outputs", [24, 8], ids=["wide", "narrow"])


def example(groups, *places, outputs=24):
    # Small whole numbers: any order of summation is free of rounding.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 4, (4, 9, 8, 8)), jnp.float32)
    kernel = jnp.asarray(rng.integers(0, 3, (3, 2, 8 // groups, outputs)), jnp.float32)
    dims = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "CNHW"))

    def expected(x, kernel):
        return lax.conv_general_dilated(x, kernel, *places, dims, groups)

    return Convolution(*places, dims, groups), expected, x, kernel


@every_window
@every_number_of_groups
def test_a_convolution_by_taps_is_that_at_once(groups, strides, padding, base_dilation, dilation):
    how, expected, x, kernel = example(groups, strides, padding, base_dilation, dilation)
    np.testing.assert_array_equal(how.by_taps(x, kernel), expected(x, kernel))
    np.testing.assert_array_equal(how.at_once(x, kernel), expected(x, kernel))


@every_window
@every_number_of_groups
@every_width
def test_first_and_second_derivatives_are_those_of_lax(
    outputs, groups, strides, padding, base_dilation, dilation
):
    places = strides, padding, base_dilation, dilation
    how, expected, x, kernel = example(groups, *places, outputs=outputs)
    towards = jax.tree.map(lambda a: jnp.round(jnp.cos(jnp.arange(a.size)) * 2), (x, kernel))
    towards = tuple(t.reshape(a.shape) for t, a in zip(towards, (x, kernel), strict=True))

    def first(x, kernel, convolve):
        return jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), (0, 1))(x, kernel)

    def along(x, kernel, convolve):
        pairs = zip(first(x, kernel, convolve), towards, strict=True)
        return sum(jnp.sum(gradient * direction) for gradient, direction in pairs)

    for derivatives in (first, jax.grad(along, (0, 1))):
        pairs = zip(
            derivatives(x, kernel, how.at_once), derivatives(x, kernel, expected), strict=True
        )
        for found, wanted in pairs:
            np.testing.assert_array_equal(found, wanted)


@every_window
def test_a_convolution_by_rows_is_that_at_once(strides, padding, base_dilation, dilation):
    how, expected, x, kernel = example(1, strides, padding, base_dilation, dilation)
    np.testing.assert_array_equal(how.by_rows(x, kernel), expected(x, kernel))


def test_a_convolution_along_one_axis_has_rows_of_single_positions():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 4, (2, 9, 3)), jnp.float32)
    kernel = jnp.asarray(rng.integers(0, 3, (3, 3, 5)), jnp.float32)
    dims = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHC", "HIO", "NHC"))
    how = Convolution((2,), ((1, 2),), (1,), (2,), dims, 1)
    expected, pull = jax.vjp(
        lambda k: lax.conv_general_dilated(x, k, (2,), ((1, 2),), (1,), (2,), dims), kernel
    )
    np.testing.assert_array_equal(how.by_rows(x, kernel), expected)
    found, pull_narrow = jax.vjp(lambda k: how.at_once(x, k), kernel)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(*(p(expected)[0] for p in (pull, pull_narrow)))


@pytest.mark.parametrize(("outputs", "is_narrow"), [(16, True), (17, False)])
def test_the_gradient_of_a_narrow_kernel_has_no_window_of_the_image(outputs, is_narrow):
    """XLA sums over such windows position by position."""
    rng = np.random.default_rng(0)
    x, kernel = jnp.ones((1, 12, 11, 4)), jnp.asarray(rng.random((3, 3, 4, outputs)), jnp.float32)
    dims = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    how = Convolution((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), dims, 1)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(how.at_once(x, k) ** 2)))
    program = gradient.lower(kernel).as_text(dialect="hlo")
    assert ("size=12x11" in program) != is_narrow
    assert ("size=12}" in program) == is_narrow


@pytest.mark.parametrize("groups", [8, 4])
def test_the_gradient_of_a_grouped_kernel_takes_no_dense_one(groups):
    """That of a dense kernel, of which blocks are picked, has many times the operations."""
    how, _, x, kernel = example(groups, (1, 1), ((1, 1), (0, 1)), (1, 1), (1, 1))
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(how.at_once(x, k) ** 2)))
    program = gradient.lower(kernel).compile().as_text()
    convolutions = [line for line in program.splitlines() if " convolution(" in line]
    assert convolutions
    assert all(f"feature_group_count={groups}" in line for line in convolutions)
