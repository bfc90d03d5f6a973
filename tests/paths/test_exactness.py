"""The number of paths and its gradient are exact to float32's rounding.

They are sums and products of numbers none of which is negative, so relative errors don't grow by
cancelling: they add up, at most 2^-24 = 6e-8 for each operation along a path, and mostly cancel as
roundings go both ways. 1e-5 is 170 of them, all of one sign; the deepest networks here stay below
half of that. Powers of two, which keep counts in range, round nothing. The logarithm, a float32, is
rounded once more, by 2^-24 of itself, and so is the multiple of log 2 in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

import dpai_jax as dpai
from tests.support.reference import (
    Graph,
    JaxLayers,
    Layers,
    Masks,
    count_paths,
    float64_chain,
    float64_log_count,
    quick_compilation,
    random_masks,
)

RELATIVE = 1e-5

Shapes = dict[str, tuple[int, ...]]
LogCount = Callable[[Masks], tuple[float, Masks]]


def traced(fn: Any, shapes: Shapes, shape: tuple[int, ...]) -> dpai.Network:
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return dpai.trace(fn, params, jax.ShapeDtypeStruct(shape, jnp.float32))


def log_count(net: dpai.Network, compiled: bool = True) -> LogCount:
    """log R_P and its gradient by the library, for masks by name."""
    value_and_grad = jax.value_and_grad(net.log_count)
    if compiled:
        value_and_grad = jax.jit(value_and_grad, compiler_options=quick_compilation())

    def run(masks: Masks) -> tuple[float, Masks]:
        arrays = [jnp.asarray(masks[layer.name], jnp.float32) for layer in net.layers]
        value, gradient = value_and_grad(arrays)
        named = zip(net.layers, gradient, strict=True)
        return float(value), {layer.name: np.asarray(g) for layer, g in named}

    return run


def assert_equal(
    actual: tuple[float, Masks], value: float, gradient: Masks, rtol: float = RELATIVE
) -> None:
    assert actual[0] == pytest.approx(value, rel=2**-22, abs=rtol)
    for name, expected in gradient.items():
        np.testing.assert_allclose(actual[1][name], expected, rtol, err_msg=name)


# Random graphs of dense layers, against the enumeration of their paths.


@dataclass(frozen=True)
class Step:
    """A dense layer: the values it reads side by side, its width, the value added to its result."""

    reads: tuple[int, ...]
    width: int
    skip: int | None


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, tuple[Step, ...]]:
    """The width of the input, and the layers of a directed acyclic graph in order."""
    widths = [draw(st.integers(1, 3))]
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        values = st.integers(0, len(widths) - 1)
        reads = draw(st.lists(values, min_size=1, max_size=2))
        width = draw(st.integers(1, 3))
        same = [i for i, other in enumerate(widths) if other == width]
        skip = draw(st.sampled_from([None, *same]))
        steps.append(Step(tuple(reads), width, skip))
        widths.append(width)
    return widths[0], tuple(steps)


def kernel_shapes(width: int, steps: tuple[Step, ...]) -> Shapes:
    widths = [width, *(step.width for step in steps)]
    return {
        str(i): (sum(widths[j] for j in step.reads), step.width) for i, step in enumerate(steps)
    }


def apply(layers: Layers, x: Any, steps: tuple[Step, ...]) -> Any:
    values = [x]
    for i, step in enumerate(steps):
        y = layers.dense(str(i), layers.numpy.concatenate([values[j] for j in step.reads], axis=-1))
        values.append(y if step.skip is None else layers.add(y, values[step.skip]))
    # Every layer has a path to the output.
    return layers.numpy.concatenate(values[1:], axis=-1)


@given(plans(), st.data())
def test_count_of_random_graphs_is_that_of_enumerated_paths(
    plan: tuple[int, tuple[Step, ...]], data: st.DataObject
) -> None:
    width, steps = plan
    shapes = kernel_shapes(width, steps)
    masks = {name: data.draw(hnp.arrays(bool, s), name) for name, s in shapes.items()}
    graph = Graph(lambda layers, x: apply(layers, x, steps), shapes, (1, width))
    total, derivative = count_paths(graph.paths(), masks)

    net = traced(lambda params, x: apply(JaxLayers(params), x, steps), shapes, (1, width))
    value, gradient = log_count(net, compiled=False)(masks)
    if total:
        # Counts below 2^24 are held as they are: only the gradient's quotients and log round.
        expected = {name: d.astype(float) / total for name, d in derivative.items()}
        assert_equal((value, gradient), np.log(total), expected, rtol=1e-6)
    else:
        assert value == -np.inf
        assert_proportional(gradient, derivative)


def assert_proportional(gradient: Masks, derivative: Masks) -> None:
    """A gradient is the derivative of the count but for one positive factor."""
    actual = np.concatenate([g.ravel() for g in gradient.values()])
    expected = np.concatenate([derivative[name].ravel() for name in gradient]).astype(float)
    np.testing.assert_array_equal(actual > 0, expected > 0)
    if expected.any():
        np.testing.assert_allclose(
            actual / actual.max(), expected / expected.max(), 1e-6, err_msg="gradient"
        )


# Convolutional and residual networks without norms, against the network itself in float64.


# On counts the identity, as is its derivative, which relu's is not at zero.
rectify = jax.nn.leaky_relu


def conv(x: jax.Array, kernel: jax.Array, **kwargs: Any) -> jax.Array:
    arguments = {"window_strides": (1, 1), "padding": "SAME"} | kwargs
    numbers = ("NHWC", "HWIO", "NHWC")
    return rectify(lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **arguments))


def plain_convolutions(p: Any, x: jax.Array) -> jax.Array:
    """Strides, even and oblong kernels, asymmetric and negative padding, dilation."""
    x = conv(x, p["even"], window_strides=(1, 2))
    x = conv(x, p["oblong"], padding=((2, 0), (1, 3)))
    x = conv(x, p["dilated"], rhs_dilation=(2, 1))
    x = conv(x, p["cropped"], padding=((0, -1), (1, 0)))
    return jnp.sum(x, axis=(1, 2)) @ p["head"]


def grouped_convolutions(p: Any, x: jax.Array) -> jax.Array:
    """A grouped, a depthwise convolution of multiplier two, a pointwise one, sums over windows."""
    x = conv(x, p["stem"])
    x = conv(x, p["grouped"], feature_group_count=2, window_strides=(2, 2))
    x = conv(x, p["depthwise"], feature_group_count=x.shape[-1])
    x = conv(x, p["pointwise"], padding="VALID")
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")


def encoder_decoder(p: Any, x: jax.Array) -> jax.Array:
    """Transposed convolutions of both conventions, and a concatenated skip."""
    skip = conv(x, p["stem"])
    x = conv(skip, p["down"], window_strides=(2, 2))
    x = lax.conv_transpose(x, p["up"], (2, 2), "SAME")
    x = jnp.concatenate([x, skip], axis=-1)
    x = lax.conv_transpose(x, p["wide"], (3, 2), "VALID", transpose_kernel=True)
    return conv(x, p["last"], padding="VALID")


def residual_network(p: Any, x: jax.Array) -> jax.Array:
    """A residual block with an identity and one with a projection, and a dense head."""
    x = conv(x, p["stem"])
    x = rectify(x + conv(conv(x, p["conv1"]), p["conv2"]))
    y = conv(conv(x, p["conv3"], window_strides=(2, 2)), p["conv4"])
    x = rectify(y + conv(x, p["shortcut"], window_strides=(2, 2), padding="VALID"))
    return x.reshape(x.shape[0], -1) @ p["head"]


def volumes_and_sequences(p: Any, x: jax.Array) -> jax.Array:
    """A convolution over volumes, then a causal one over their first axis as a sequence."""
    x = lax.conv_general_dilated(
        x, p["volume"], (1, 2, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    x = rectify(x).reshape(x.shape[0], x.shape[1], -1)
    return lax.conv_general_dilated(
        x,
        p["causal"],
        (1,),
        ((4, 0),),
        rhs_dilation=(2,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )


NETWORKS: dict[Any, tuple[Shapes, tuple[int, ...]]] = {
    plain_convolutions: (
        {
            "even": (2, 4, 3, 5),
            "oblong": (3, 1, 5, 4),
            "dilated": (3, 3, 4, 4),
            "cropped": (2, 3, 4, 5),
            "head": (5, 4),
        },
        (2, 8, 9, 3),
    ),
    grouped_convolutions: (
        {
            "stem": (3, 3, 3, 6),
            "grouped": (3, 3, 3, 4),
            "depthwise": (3, 3, 1, 8),
            "pointwise": (1, 1, 8, 5),
        },
        (1, 7, 7, 3),
    ),
    encoder_decoder: (
        {
            "stem": (3, 3, 2, 4),
            "down": (3, 3, 4, 6),
            "up": (2, 2, 6, 4),
            "wide": (4, 3, 5, 8),
            "last": (2, 2, 5, 3),
        },
        (1, 6, 6, 2),
    ),
    residual_network: (
        {
            "stem": (3, 3, 3, 4),
            "conv1": (3, 3, 4, 4),
            "conv2": (3, 3, 4, 4),
            "conv3": (3, 3, 4, 6),
            "conv4": (3, 3, 6, 6),
            "shortcut": (1, 1, 4, 6),
            "head": (96, 5),
        },
        (1, 8, 8, 3),
    ),
    volumes_and_sequences: (
        {"volume": (2, 3, 3, 2, 3), "causal": (3, 24, 4)},
        (2, 4, 4, 4, 2),
    ),
}


@cache
def both_counts(fn: Any) -> tuple[LogCount, LogCount]:
    shapes, shape = NETWORKS[fn]
    return log_count(traced(fn, shapes, shape)), float64_log_count(fn, shape)


@pytest.mark.parametrize("fn", NETWORKS, ids=lambda fn: fn.__name__)
@given(st.sampled_from([0.3, 0.6, 0.9, 1.0]), st.integers(0, 2**32 - 1))
def test_count_of_convolutions_is_that_of_the_network_in_float64(
    fn: Any, density: float, seed: int
) -> None:
    masks = random_masks(NETWORKS[fn][0], density, np.random.default_rng(seed))
    actual, expected = (run(masks) for run in both_counts(fn))
    if np.isfinite(expected[0]):
        assert_equal(actual, *expected)
    else:
        assert actual[0] == -np.inf


# Networks whose counts are beyond float32's range, against the same sums in float64.


def test_count_of_a_chain_of_100_dense_layers_is_right() -> None:
    shapes: Shapes = {f"{i:02}": (16, 16) for i in range(100)}

    def chain(params: Any, x: jax.Array) -> jax.Array:
        for name in shapes:
            x = rectify(x @ params[name])
        return x

    assert_equals_chain(log_count(traced(chain, shapes, (1, 16)), compiled=False), shapes, 0.5)


def test_count_of_a_chain_of_100_convolutions_is_right() -> None:
    shapes: Shapes = {f"{i:02}": (3, 3, 4, 4) for i in range(100)}

    def chain(params: Any, x: jax.Array) -> jax.Array:
        for name in shapes:
            x = conv(x, params[name])
        return x

    net = traced(chain, shapes, (1, 6, 6, 4))
    assert_equals_chain(log_count(net, compiled=False), shapes, 0.3, size=6)


def test_count_of_vgg19_is_right() -> None:
    widths = (64, 64, 128, 128, *(256,) * 4, *(512,) * 8)
    pooled = (1, 3, 7, 11, 15)
    shapes: Shapes = {f"{i:02}": (3, 3, *pair) for i, pair in enumerate(pairwise((3, *widths)))}
    shapes["head"] = (512, 10)

    def vgg19(params: Any, x: jax.Array) -> jax.Array:
        for i in range(len(widths)):
            x = conv(x, params[f"{i:02}"])
            if i in pooled:
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.reshape(x.shape[0], -1) @ params["head"]

    net = traced(vgg19, shapes, (1, 32, 32, 3))
    assert_equals_chain(log_count(net), shapes, 0.1, size=32, pooled=pooled)


def assert_equals_chain(
    count: LogCount, shapes: Shapes, density: float, size: int = 1, pooled: Sequence[int] = ()
) -> None:
    masks = random_masks(shapes, density, np.random.default_rng(0))
    features = shapes["00"][-2]
    kernels = [mask.astype(float) for mask in masks.values()]
    value, gradients = float64_chain(kernels, (size, size, features), pooled)
    assert value > np.log(np.finfo(np.float32).max)
    assert_equal(count(masks), value, dict(zip(masks, gradients, strict=True)))


# No path at all.


def test_gradient_without_any_path_is_positive_where_one_weight_would_make_one() -> None:
    def network(layers: Layers, x: Any) -> Any:
        y = layers.conv("first", x, ((1, 1), (1, 1)))
        y = layers.conv("second", layers.add(x, y), ((0, 1), (1, 0)), stride=2)
        return layers.dense("third", y)

    shapes: Shapes = {"first": (3, 3, 2, 2), "second": (2, 2, 2, 3), "third": (3, 2)}
    graph = Graph(network, shapes, (1, 3, 3, 2))
    net = traced(lambda params, x: network(JaxLayers(params), x), shapes, (1, 3, 3, 2))
    masks = random_masks(shapes, 0.5, np.random.default_rng(0))
    masks["third"] = np.array([[True, False], [False, False], [False, False]])
    masks["second"][..., 0] = False
    total, derivative = count_paths(graph.paths(), masks)
    assert total == 0
    assert all(derivative[name].any() for name in ("second", "third"))
    value, gradient = log_count(net)(masks)
    assert value == -np.inf
    assert_proportional(gradient, derivative)


def test_gradient_where_two_weights_are_missing_is_zero() -> None:
    shapes: Shapes = {"first": (3, 4), "second": (4, 2)}
    net = traced(lambda p, x: rectify(x @ p["first"]) @ p["second"], shapes, (1, 3))
    value, gradient = log_count(net)({name: np.zeros(s, bool) for name, s in shapes.items()})
    assert value == -np.inf
    assert not any(g.any() for g in gradient.values())
