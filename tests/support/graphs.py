"""Networks that the library traces and that a graph of units is written out for."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

import dpai_jax as dpai
from tests.support.reference import Graph, JaxLayers, Layers, Network

Shapes = dict[str, tuple[int, ...]]
SAME = ((1, 1), (1, 1))


def mlp(layers: Layers, x: Any) -> Any:
    return layers.dense("2", layers.dense("1", layers.dense("0", x)))


def corners(layers: Layers, x: Any) -> Any:
    """Kernels larger than their maps: most taps only ever see some of the positions, or padding."""
    x = layers.conv("0", x, SAME)
    x = layers.conv("1", x, ((2, 2), (1, 1)), stride=2)
    x = layers.conv("2", x, ((3, 0), (0, 2)))
    return layers.dense("head", x)


def strided(layers: Layers, x: Any) -> Any:
    """Strides that skip positions, dilation that skips taps, groups, uneven padding."""
    x = layers.conv("0", x, ((0, 1), (1, 0)), stride=2)
    x = layers.conv("1", x, ((2, 1), (0, 2)), dilation=2, groups=2)
    x = layers.conv("2", x, stride=3)
    return layers.dense("head", x.reshape(1, -1))


def residual(layers: Layers, x: Any) -> Any:
    """A block around an identity, one around a projection, and maxima over windows."""
    x = layers.conv("stem", x, SAME)
    x = layers.add(x, layers.conv("1", layers.conv("0", x, SAME), SAME))
    x = layers.pool(x, 3, 2)
    y = layers.conv("3", layers.conv("2", x, SAME, stride=2), SAME)
    x = layers.add(y, layers.conv("shortcut", x, stride=2))
    return layers.dense("head", x.reshape(1, -1))


def separable(layers: Layers, x: Any) -> Any:
    """Depthwise convolutions, one of them of two features for each, between pointwise ones."""
    x = layers.conv("expand", x)
    x = layers.conv("depthwise", x, SAME, stride=2, groups=x.shape[-1])
    x = layers.conv("project", x)
    x = layers.conv("multiplied", x, SAME, groups=x.shape[-1])
    return layers.dense("head", x.reshape(1, -1))


def encoder_decoder(layers: Layers, x: Any) -> Any:
    """A transposed convolution, and a skip concatenated to its result."""
    skip = layers.conv("stem", x, SAME)
    x = layers.conv("down", skip, SAME, stride=2)
    x = layers.conv("up", x, ((1, 2), (1, 2)), spread=2)
    x = layers.numpy.concatenate([x, skip], axis=-1)
    return layers.conv("last", x)


NETWORKS: dict[Network, tuple[Shapes, tuple[int, ...]]] = {
    mlp: ({"0": (12, 40), "1": (40, 40), "2": (40, 6)}, (1, 12)),
    corners: (
        {"0": (3, 3, 3, 8), "1": (5, 3, 8, 8), "2": (4, 3, 8, 8), "head": (8, 4)},
        (1, 2, 2, 3),
    ),
    strided: (
        {"0": (2, 3, 3, 8), "1": (3, 2, 4, 8), "2": (1, 2, 8, 10), "head": (40, 4)},
        (1, 9, 10, 3),
    ),
    residual: (
        {
            "stem": (3, 3, 3, 6),
            "0": (3, 3, 6, 6),
            "1": (3, 3, 6, 6),
            "2": (3, 3, 6, 8),
            "3": (3, 3, 8, 8),
            "shortcut": (1, 1, 6, 8),
            "head": (8, 4),
        },
        (1, 5, 5, 3),
    ),
    separable: (
        {
            "expand": (1, 1, 3, 16),
            "depthwise": (3, 3, 1, 16),
            "project": (1, 1, 16, 8),
            "multiplied": (3, 3, 1, 16),
            "head": (64, 4),
        },
        (1, 4, 4, 3),
    ),
    encoder_decoder: (
        {"stem": (3, 3, 2, 6), "down": (3, 3, 6, 8), "up": (3, 3, 8, 6), "last": (1, 1, 12, 3)},
        (1, 4, 4, 2),
    ),
}


@cache
def read_twice(network: Network) -> tuple[dpai.Network, Graph]:
    shapes, shape = NETWORKS[network]
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    net = dpai.trace(lambda params, x: network(JaxLayers(params), x), params, x)
    return net, Graph(network, shapes, shape)
