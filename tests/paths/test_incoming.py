"""The paths that enter a layer are those counted from the input on, unit by unit."""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dpai_jax as dpai
from dpai_jax.methods import npb
from dpai_jax.paths import Interpreter, KernelUse
from dpai_jax.paths.channels import numbered_weights
from tests.support.graphs import SAME, Shapes, residual
from tests.support.reference import Graph, JaxLayers, Layers, Masks, Network


def grouped(layers: Layers, x: Any) -> Any:
    """Groups, depthwise features, dilation, uneven padding."""
    x = layers.conv("0", x, ((0, 1), (1, 0)), stride=2)
    x = layers.conv("1", x, ((2, 1), (0, 2)), dilation=2, groups=2)
    x = layers.conv("depthwise", x, SAME, groups=x.shape[-1])
    return layers.conv("last", x)


NETWORKS: dict[Network, tuple[Shapes, tuple[int, ...]]] = {
    residual: (
        {
            "stem": (3, 3, 2, 4),
            "0": (3, 3, 4, 4),
            "1": (3, 3, 4, 4),
            "2": (3, 3, 4, 5),
            "3": (3, 3, 5, 5),
            "shortcut": (1, 1, 4, 5),
            "head": (20, 3),
        },
        (1, 8, 8, 2),
    ),
    grouped: (
        {"0": (2, 3, 3, 4), "1": (3, 2, 2, 6), "depthwise": (3, 3, 1, 12), "last": (1, 1, 12, 2)},
        (1, 9, 10, 3),
    ),
}


def entering(graph: Graph, shapes: Shapes, masks: Masks) -> Masks:
    """The number of paths into the start of every weight, edge by edge in Python integers."""
    counts: dict[int, int] = defaultdict(int, dict.fromkeys(graph.inputs.flat, 1))
    enters = {name: np.zeros(shape, object) for name, shape in shapes.items()}
    # Edges are listed layer by layer, so that all that lead to a unit come before those from it.
    for start, end, weight in graph.edges:
        if weight is not None:
            enters[weight[0]][weight[1]] += counts[start]
        if weight is None or masks[weight[0]][weight[1]]:
            counts[end] += counts[start]
    return enters


def relative(counts: np.ndarray) -> np.ndarray:
    return (counts / max(counts.max(), 1)).astype(float)


def incoming(net: dpai.Network, masks: Masks) -> dict[str, np.ndarray]:
    net = net.unrolled()
    numbers = iter(numbered_weights(net, lambda use: use.weight.array)[0])
    total = np.zeros(net.size, np.float32)

    def add_up(use: KernelUse) -> Any:
        here = next(numbers)
        total[here[here >= 0]] += npb._entering(use)[here >= 0]
        return use.count()

    arrays = [jnp.asarray(masks[layer.name], jnp.float32) for layer in net.layers]
    net.evaluate(arrays, Interpreter(net.gates, at_kernel=add_up))
    found = zip(net.layers, net.unravel(total), strict=True)
    return {layer.name: array / max(array.max(), 1e-30) for layer, array in found}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_paths_into_every_weight_are_those_counted_edge_by_edge(network, density):
    shapes, size = NETWORKS[network]
    net = dpai.trace(
        lambda p, x: network(JaxLayers(p), x),
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()},
        jax.ShapeDtypeStruct(size, jnp.float32),
    )
    rng = np.random.default_rng(int(10 * density))
    masks = {name: rng.random(shape) < density for name, shape in shapes.items()}
    expected = entering(Graph(network, shapes, size), shapes, masks)
    for name, found in incoming(net, masks).items():
        np.testing.assert_allclose(found, relative(expected[name]), rtol=1e-5)


def test_layers_behind_have_no_part():
    shapes, size = NETWORKS[residual]
    net = dpai.trace(
        lambda p, x: residual(JaxLayers(p), x),
        {name: jnp.ones(shape) for name, shape in shapes.items()},
        jnp.ones(size),
    )
    masks = {name: np.ones(shape) for name, shape in shapes.items()}
    before = incoming(net, masks)
    after = incoming(net, masks | {"2": np.zeros(shapes["2"]), "head": np.zeros(shapes["head"])})
    for name in ("stem", "0", "1", "2", "shortcut"):
        np.testing.assert_array_equal(before[name], after[name])


def test_numbers_of_a_deep_chain_are_those_in_float64():
    """10^46 paths, out of the range of float32."""
    depth, width = 30, 40
    rng = np.random.default_rng(0)
    masks = {f"{i:02}": rng.random((width, width)) < 0.9 for i in range(depth)}

    def chain(params, x):
        for name in sorted(params):
            x = jax.nn.relu(x @ params[name])
        return x

    net = dpai.trace(
        chain, {name: jnp.ones(m.shape) for name, m in masks.items()}, jnp.ones((1, width))
    )
    found = incoming(net, masks)
    paths = np.ones(width)
    for name, mask in masks.items():
        expected = np.broadcast_to(paths[:, None] / paths.max(), mask.shape)
        np.testing.assert_allclose(found[name], expected, rtol=1e-4)
        paths = paths @ mask


def test_layers_stacked_in_a_scan_are_those_one_after_another():
    rng = np.random.default_rng(0)
    stacked = (rng.random((3, 5, 5)) < 0.6).astype(np.float32)

    def scanned(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    net = dpai.trace(scanned, {"layers": jnp.ones((3, 5, 5))}, jnp.ones((2, 5)))
    found = incoming(net, {"layers": stacked})["layers"]
    paths = np.ones(5)
    for mask, entries in zip(stacked, found, strict=True):
        expected = np.broadcast_to(paths[:, None] / paths.max(), mask.shape)
        np.testing.assert_allclose(entries / entries.max(), expected, rtol=1e-5)
        paths = paths @ mask


def test_the_uses_of_one_kernel_add_up_each_in_its_own_units():
    mask = np.asarray([[1, 1, 1], [0, 1, 1], [0, 0, 1]], np.float32)
    net = dpai.trace(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": jnp.ones((3, 3))}, jnp.ones((1, 3))
    )
    found = incoming(net, {"w": mask})["w"]
    uses = np.ones(3) + np.asarray([1, 2, 3]) / 3
    np.testing.assert_allclose(found, np.broadcast_to(uses[:, None] / 2, (3, 3)), rtol=1e-6)


def test_a_weight_that_a_constant_takes_away_has_no_path():
    triangle = np.tril(np.ones((3, 3), np.float32))
    net = dpai.trace(
        lambda p, x: x @ (p["w"] * triangle), {"w": jnp.ones((3, 3))}, jnp.ones((1, 3))
    )
    np.testing.assert_array_equal(incoming(net, {"w": np.ones((3, 3))})["w"], triangle)
