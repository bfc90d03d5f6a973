"""The zoo of networks, each traced and counted as it stands, and held against itself and float64.

Every network is traced with the gates of the Jacobian, by which a weight counts wherever the real
network's output depends on it, and compiled once.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpai_jax as dpai
from tests.support.networks import CASES, Case, by_name
from tests.support.networks.case import Built
from tests.support.reference import Masks, quick_compilation, random_masks


# All tests of a network have its name first among their parameters, by which they are kept in one
# process (see tests/conftest.py).
def each_of(cases: Iterable[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


each_case = each_of(CASES)


@cache
def built(case: Case) -> Built:
    return case.make()


@cache
def traced(case: Case) -> dpai.Network:
    return dpai.trace(*built(case), gates="jacobian")


def abstract(tree: Any) -> Any:
    """The shapes and types of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def named_leaves(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def is_matrix(leaf: Any) -> bool:
    return leaf.ndim >= 2 and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def names(net: dpai.Network) -> list[str]:
    return sorted(layer.name for layer in net.layers)


def counting(net: dpai.Network) -> Callable[[Masks], tuple[float, Masks, Masks]]:
    """log R_P, its gradient, and which weights are reached, for masks by name."""

    def count(masks: list[jax.Array]) -> Any:
        return *jax.value_and_grad(net.log_count)(masks), net.reached(masks)

    compiled = jax.jit(count, compiler_options=quick_compilation())

    def run(masks: Masks) -> tuple[float, Masks, Masks]:
        arrays = [jnp.asarray(masks[layer.name], jnp.float32) for layer in net.layers]
        value, *trees = compiled(arrays)
        gradient, reached = (
            {layer.name: np.asarray(a) for layer, a in zip(net.layers, tree, strict=True)}
            for tree in trees
        )
        return float(value), gradient, {name: r > 0 for name, r in reached.items()}

    return run


@cache
def counted(case: Case) -> Callable[[Masks], tuple[float, Masks, Masks]]:
    return counting(traced(case))


def masks_of(net: dpai.Network, density: float, seed: int = 0) -> Masks:
    shapes = {name: next(a.shape for a in net.layers if a.name == name) for name in names(net)}
    return random_masks(shapes, density, np.random.default_rng(seed))


@each_case
def test_layers_are_the_leaves_that_contract_with_the_input(case: Case) -> None:
    assert names(traced(case)) == sorted(case.layers)
    matrices = {name for name, leaf in named_leaves(built(case)[1]).items() if is_matrix(leaf)}
    assert matrices - case.layers == case.free


@each_case
def test_the_real_network_s_output_depends_on_every_layer(case: Case) -> None:
    fn, params, x = built(case)
    run = jax.jit(fn, compiler_options=quick_compilation())
    leaves, treedef = jax.tree.flatten(params)
    # The other side of every threshold on a floating input; token ids stay.
    negated = jax.tree.map(lambda a: -a if jnp.issubdtype(a.dtype, jnp.floating) else a, x)

    def outputs(leaves: list[Any]) -> list[np.ndarray]:
        params = jax.tree.unflatten(treedef, leaves)
        return [np.asarray(y) for at in (x, negated) for y in jax.tree.leaves(run(params, at))]

    reference = outputs(leaves)
    assert all(np.all(np.isfinite(y)) for y in reference)
    noise = np.random.default_rng(2)
    for layer in traced(case).layers:
        leaf, moved = leaves[layer.index], list(leaves)
        draws = noise.standard_normal(leaf.shape).astype(leaf.dtype)
        moved[layer.index] = jnp.asarray(np.asarray(leaf) + draws)
        largest = max(
            np.max(np.abs(y - y0)) / np.max(np.abs(y0))
            for y, y0 in zip(outputs(moved), reference, strict=True)
        )
        assert largest > 1e-4, layer.name


@each_case
def test_layers_are_the_same_for_shapes_alone_and_for_all_gates(case: Case) -> None:
    fn, params, x = built(case)
    balanced = dpai.trace(fn, abstract(params), abstract(x), gates="balanced")
    signal = dpai.trace(fn, params, x, gates="signal")
    assert balanced.layers == signal.layers == traced(case).layers


@pytest.mark.parametrize("density", [1.0, 0.5])
@each_case
def test_gradient_is_finite_and_positive_where_a_weight_is_reached(
    case: Case, density: float
) -> None:
    value, gradient, reached = counted(case)(masks_of(traced(case), density))
    assert np.isfinite(value)
    assert value > 0
    for name in case.layers:
        assert np.all(np.isfinite(gradient[name])), name
        assert np.all(gradient[name] >= 0), name
        np.testing.assert_array_equal(gradient[name] > 0, reached[name], err_msg=name)


def assert_same_counts(
    first: tuple[float, Masks, Masks], second: tuple[float, Masks, Masks]
) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    for name, gradient in first[1].items():
        np.testing.assert_allclose(gradient, second[1][name], 1e-5, 1e-8, err_msg=name)
        np.testing.assert_array_equal(first[2][name], second[2][name], err_msg=name)


@each_of([by_name("plain/lstm_scanned")])
def test_a_scanned_lstm_counts_as_an_unrolled_one(case: Case) -> None:
    masks = masks_of(traced(case), 0.5)
    assert_same_counts(counted(case)(masks), counted(by_name("plain/lstm_unrolled"))(masks))


# A step of a GRU multiplies a gate by a bias, which a step of the first, empty state lacks; a
# switch inside of a loop counts all its branches. So neither counts as its unrolled loop does.
LOOPS = (
    "linen/conv_lstm",
    "linen/lstm",
    "linen/scanned_layers",
    "nnx/stacked_layers",
    "haiku/layer_stack",
    "equinox/stacked_layers",
    "plain/scanned_layers",
    "plain/indexed_layers",
)


@each_of(map(by_name, LOOPS))
def test_loops_count_as_their_steps_written_out(case: Case) -> None:
    fn, params, x = built(case)
    with jax.disable_jit():  # runs a scan step by step, also while it is traced
        net = dpai.trace(lambda params, x: fn(params, x), params, x, gates="jacobian")
    masks = masks_of(traced(case), 0.5)
    assert_same_counts(counted(case)(masks), counting(net)(masks))


def einsum_attention(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", x, params[name].reshape(8, 2, 4))
        for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2.0)
    heads = jnp.einsum("bhts,bshk->bthk", weights, v)
    return jnp.einsum("bthk,hkd->btd", heads, params["out"].reshape(2, 4, 8))


def library_attention(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = ((x @ params[name]).reshape(*x.shape[:2], 2, 4) for name in ("query", "key", "value"))
    return jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ params["out"]


@pytest.mark.parametrize("fn", [einsum_attention, library_attention])
@each_of([by_name("plain/fused_attention")])
def test_attention_counts_the_same_however_it_is_written(case: Case, fn: Any) -> None:
    _, params, x = built(case)
    masks = masks_of(traced(case), 0.4)
    other = dpai.trace(fn, params, x, gates="jacobian")
    assert_same_counts(counted(case)(masks), counting(other)(masks))


# Networks without normalisation, whose output is zero where their input and biases are, and none
# of whose branches depends on a value.
LINEAR_AT_ZERO = (
    "linen/remat",
    "linen/siamese",
    "linen/unet",
    "nnx/autoencoder",
    "nnx/lora",
    "haiku/audio",
    "haiku/lstm",
    "plain/mlp",
    "plain/uneven_convolutions",
    "plain/wavenet",
    "plain/pooling",
    "plain/super_resolution",
    "plain/generator",
    "plain/fused_attention",
    "plain/soft_mixture",
    "plain/scanned_layers",
    "plain/indexed_layers",
    "plain/lstm_unrolled",
    "plain/lstm_scanned",
    "plain/compiled_and_checkpointed",
)


@each_of(map(by_name, LINEAR_AT_ZERO))
def test_weight_is_effective_where_the_real_network_s_output_depends_on_it(case: Case) -> None:
    depends = dependence(case)
    for seed, density in enumerate((0.15, 0.3, 0.5)):
        masks = masks_of(traced(case), density, seed)
        _, _, reached = counted(case)(masks)
        expected = depends(masks)
        for layer, mask in masks.items():
            np.testing.assert_array_equal(mask & reached[layer], expected[layer], err_msg=layer)


def dependence(case: Case) -> Callable[[Masks], Masks]:
    """For masks by name, whether the network's output depends on each kept weight.

    The derivative of a random projection of the output is taken in float64, at random positive
    weights and inputs and biases of zero. Two draws of them leave nothing to chance cancelling.
    """
    fn, params, x = built(case)
    leaves, treedef = jax.tree.flatten(params)
    layers = {layer.index: layer.name for layer in traced(case).layers}
    outputs = [y.shape for y in jax.tree.leaves(jax.eval_shape(fn, params, x))]

    def projection(kernels: dict[str, Any], x: Any, directions: list[Any]) -> jax.Array:
        weights = [
            kernels[layers[i]] if i in layers else jnp.zeros(leaf.shape)
            for i, leaf in enumerate(leaves)
        ]
        ys = jax.tree.leaves(fn(treedef.unflatten(weights), x))
        return sum(jnp.vdot(y, d) for y, d in zip(ys, directions, strict=True))

    gradient = jax.jit(jax.grad(projection), compiler_options=quick_compilation())

    def run(masks: Masks) -> Masks:
        rng = np.random.default_rng(1)
        depends = {name: np.zeros(mask.shape, bool) for name, mask in masks.items()}
        for _ in range(2):
            # Of a size that no activation is driven to where it is flat.
            kernels = {
                name: mask * rng.uniform(0.5, 1.5, mask.shape) * mask.shape[-1] / mask.size**0.5 / 4
                for name, mask in masks.items()
            }
            point = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape), x)
            directions = [rng.normal(size=shape) for shape in outputs]
            found = gradient(kernels, point, directions)
            scale = max(np.max(np.abs(g)) for g in found.values())
            for name, mask in masks.items():
                depends[name] |= mask & (np.abs(np.asarray(found[name])) > 1e-12 * scale)
        return depends

    def run_in_float64(masks: Masks) -> Masks:
        with jax.enable_x64(True):
            return run(masks)

    return run_in_float64
