"""The pure functions give the same inside and outside of `jax.jit`, for arrays of JAX and NumPy.

Each is held against its formula for a network of two layers, in float64.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

import dpai_jax as dpai

SHAPES = {"first": (4, 6), "second": (6, 3)}
KEEP = {"first": 9, "second": 7}
ALPHA, BETA = 0.6, 0.3
# log R_P and its gradient are sums and products of a dozen terms, each rounded once.
ROUNDING = 1e-5

Arrays = dict[str, Any]


def network(params: Arrays, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def traced() -> dpai.Network:
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    return dpai.trace(network, params, jax.ShapeDtypeStruct((1, 4), jnp.float32))


def draw(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def highest(scores: Arrays) -> Arrays:
    """Masks of the `KEEP` highest scores, by sorting."""
    return {name: s >= np.sort(s, axis=None)[-KEEP[name]] for name, s in scores.items()}


def count(masks: Arrays) -> tuple[float, Arrays]:
    """The number of paths, and the share of them that passes each weight if it is kept."""
    first, second = (np.asarray(masks[name], np.float64) for name in SHAPES)
    paths = (first @ second).sum()
    return paths, {
        "first": np.broadcast_to(second.sum(1), first.shape) / paths,
        "second": np.broadcast_to(first.sum(0)[:, None], second.shape) / paths,
    }


def direction(scores: Arrays) -> Arrays:
    """Lines 5 to 8 of DPaI's Algorithm 1 with sharp indicators, where a kernel is a weight."""
    masks = highest({name: np.abs(s) for name, s in scores.items()})
    _, shares = count(masks)

    def of_layer(mask: np.ndarray, share: np.ndarray, score: np.ndarray) -> np.ndarray:
        passed = mask * share
        no_node, no_kernel = passed.sum(0, keepdims=True) == 0, passed == 0
        bracket = (1 - BETA) * no_node + BETA * no_kernel
        return ((1 - ALPHA) + ALPHA * bracket) * share * np.sign(score)

    return jax.tree.map(of_layer, masks, shares, scores)


def in_float32(tree: Arrays) -> Arrays:
    return jax.tree.map(np.float32, tree)


class PureFunctions(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_binarize_keeps_the_highest_scores(self) -> None:
        masks = self.variant(lambda scores: dpai.binarize(scores, KEEP))(draw())
        chex.assert_trees_all_equal(masks, highest(draw()))

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_apply_masks_zeroes_what_is_pruned_and_keeps_types(self) -> None:
        params, masks = draw(), highest(draw(1))
        masked = self.variant(dpai.apply_masks)(params, masks)
        chex.assert_trees_all_equal(masked, jax.tree.map(np.multiply, params, masks))
        chex.assert_trees_all_equal_shapes_and_dtypes(masked, params)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_log_paths_is_the_log_of_the_number_of_paths(self) -> None:
        net, masks = traced(), highest(draw())
        found = self.variant(lambda masks: dpai.log_paths(net, masks))(masks)
        chex.assert_shape(found, ())
        chex.assert_trees_all_close(np.float64(found), np.log(count(masks)[0]), rtol=ROUNDING)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_its_gradient_is_the_share_of_paths_through_each_weight(self) -> None:
        net = traced()
        masks = {name: np.float32(mask) for name, mask in highest(draw()).items()}
        found = self.variant(jax.grad(lambda masks: dpai.log_paths(net, masks)))(masks)
        chex.assert_tree_all_finite(found)
        chex.assert_trees_all_close(found, in_float32(count(masks)[1]), rtol=ROUNDING)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_ascent_is_the_direction_of_algorithm_1(self) -> None:
        net, scores = traced(), draw()
        found = self.variant(lambda scores: dpai.ascent(net, scores, KEEP, ALPHA, BETA))(scores)
        chex.assert_trees_all_close(found, in_float32(direction(scores)), rtol=ROUNDING)

    def test_other_arrays_of_the_same_shapes_compile_nothing_anew(self) -> None:
        net = traced()

        @jax.jit
        @chex.assert_max_traces(n=1)
        def steps(scores: Arrays) -> Any:
            moved = jax.tree.map(jnp.add, scores, dpai.ascent(net, scores, KEEP))
            masks = dpai.binarize(moved, KEEP)
            return dpai.apply_masks(moved, masks), dpai.log_paths(net, masks)

        for seed in range(3):
            chex.assert_tree_all_finite(steps(draw(seed)))
