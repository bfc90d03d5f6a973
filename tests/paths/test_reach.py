"""What is effective is what a search through the graph of units finds, free of rounding."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import dpai_jax as dpai
from tests.support.graphs import NETWORKS, Shapes, read_twice
from tests.support.reference import Graph, Masks, Network, random_masks


def sparse_masks(graph: Graph, shapes: Shapes, sparsity: float, whole: int, seed: int) -> Masks:
    """Random masks of some sparsity, and of some paths from an input to an output all weights."""
    rng = np.random.default_rng(seed)
    masks = random_masks(shapes, 1 - sparsity, rng)
    for _ in range(whole):
        for name, index in graph.random_path(rng):
            masks[name][index] = True
    return masks


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
@given(
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]),
    whole=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_topology_is_that_of_a_graph_search(
    network: Network, sparsity: float, whole: int, seed: int
) -> None:
    shapes, _ = NETWORKS[network]
    net, graph = read_twice(network)
    masks = sparse_masks(graph, shapes, sparsity, whole, seed)
    expected = graph.effective(masks)

    effective = dpai.effective_weights(net, masks)
    for name in shapes:
        np.testing.assert_array_equal(effective[name], expected[name], err_msg=name)

    found = dpai.topology(net, masks)
    assert np.isfinite(found.log_paths) == (found.effective > 0)
    for layer in found.layers:
        weights = [tuple(index) for index in np.argwhere(expected[layer.name])]
        assert layer.size == masks[layer.name].size
        assert layer.weights == np.sum(masks[layer.name])
        assert layer.effective == len(weights)
        assert layer.nodes == len({index[-1] for index in weights})
        assert layer.kernels == len({index[-2:] for index in weights})
    assert found.nodes == sum(layer.nodes for layer in found.layers)
    assert found.kernels == sum(layer.kernels for layer in found.layers)
    assert found.effective == sum(layer.effective for layer in found.layers)
    assert found.weights == sum(layer.weights for layer in found.layers)


# Branches whose numbers of paths lie too far apart for one float32 to tell.

DEPTH, WIDTH = 50, 16


def branches(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A thick and a thin chain of dense layers."""

    def step(carry: Any, kernels: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda x, kernel: jax.nn.relu(x @ kernel), carry, kernels), None

    return lax.scan(step, (x, x), (params["thick"], params["thin"]))[0]


def thin_masks(rng: np.random.Generator) -> np.ndarray:
    """A chain of layers with one path, and in each layer one more weight, which leads nowhere."""
    units = rng.permuted(np.tile(np.arange(WIDTH), (DEPTH + 1, 1)), axis=1)
    masks = np.zeros((DEPTH, WIDTH, WIDTH), bool)
    for layer, (before, after) in enumerate(pairwise(units)):
        masks[layer, before[0], after[0]] = True
        masks[layer, before[1], after[0]] = True
    return masks


def assert_thin_branch_is_effective(fn: Any, head: tuple[int, int]) -> None:
    shapes: Shapes = dict.fromkeys(["thick", "thin"], (DEPTH, WIDTH, WIDTH)) | {"head": head}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    net = dpai.trace(fn, params, jax.ShapeDtypeStruct((1, WIDTH), jnp.float32))
    thin = thin_masks(np.random.default_rng(0))
    masks = {"thick": np.ones(shapes["thick"], bool), "thin": thin, "head": np.ones(head, bool)}
    found = dpai.topology(net, masks)
    assert found.log_paths > 200 * np.log(2)
    effective = dpai.effective_weights(net, masks)
    # In the first layer both weights are read from the input; after it only the path is.
    expected = np.sum(thin, (1, 2)) - np.arange(DEPTH).astype(bool)
    np.testing.assert_array_equal(np.sum(effective["thin"], (1, 2)), expected)
    assert not np.any(effective["thin"] & ~thin)
    assert np.all(effective["thick"])
    assert np.all(effective["head"])


def test_thin_branch_is_effective_where_it_is_added_to_a_thick_one() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        thick, thin = branches(params, x)
        return (thick + thin) @ params["head"]

    assert_thin_branch_is_effective(fn, (WIDTH, 3))


def test_thin_branch_is_effective_where_it_is_concatenated_to_a_thick_one() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        thick, thin = branches(params, x)
        # A path reaches one of the thin branch's features, and so their sum.
        thin = jnp.sum(thin, axis=-1, keepdims=True)
        return jnp.concatenate([thick, thin], axis=-1) @ params["head"]

    assert_thin_branch_is_effective(fn, (WIDTH + 1, 3))
