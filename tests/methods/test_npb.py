"""NPB's optimum against brute force and the program as published, and what it owes on networks."""

import functools
import itertools
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

import dpai_jax as dpai
from dpai_jax.methods import npb
from dpai_jax.methods.npb import NPB
from dpai_jax.paths.counting import Counting
from tests.support.networks import by_name


def prune(fn: Any, params: Any, x: Any, sparsity: float, seed: int = 0, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return dpai.prune(fn, params, x, sparsity, method=NPB(**settings), key=jax.random.key(seed))


def objective(m: np.ndarray, paths: np.ndarray, taps: int, alpha: float, beta: float) -> float:
    """The paper's objective of counts (..., inputs, outputs), term by term, without groups."""
    inputs, outputs = m.shape[-2:]
    into = m * paths[:, None]
    nodes = np.minimum(into.sum(-1), 1).sum(-1) + np.minimum(into.sum(-2), 1).sum(-1)
    kernels = np.minimum(m - 1, 0).sum((-2, -1))
    all_paths = taps * outputs * paths.sum()
    return (
        alpha * nodes / (inputs + outputs)
        + (1 - alpha) * into.sum((-2, -1)) / all_paths
        + beta * kernels / (inputs * outputs)
    )


def chosen(
    paths: np.ndarray, outputs: int, taps: int, keep: int, alpha: float, beta: float, seed: int = 0
) -> np.ndarray:
    """The counts (inputs, outputs) that NPB chooses for one layer."""
    rng = np.random.default_rng(seed)
    rows = npb.balanced(paths[None], np.asarray([outputs]), taps, keep, alpha, beta, rng)
    return npb._spread_over(rows[0], paths, outputs, rng)


layers = st.tuples(
    st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(any),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
).filter(lambda layer: (layer[2] + 1) ** (len(layer[0]) * layer[1]) < 70_000)


@given(
    layer=layers,
    density=st.floats(0, 1),
    alpha=st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0]),
    beta=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 3),
)
def test_optimum_is_that_of_all_masks_of_a_tiny_layer(layer, density, alpha, beta, seed):
    numbers, outputs, taps = layer
    paths = np.asarray(numbers, float)
    size = len(numbers) * outputs
    keep = max(round(density * size * taps), 1)
    every = np.stack(list(itertools.product(range(taps + 1), repeat=size)))
    every = every[every.sum(1) <= keep].reshape(-1, len(numbers), outputs)
    best = objective(every, paths, taps, alpha, beta).max()
    m = chosen(paths, outputs, taps, keep, alpha, beta, seed)
    assert m.sum() == keep
    assert 0 <= m.min() <= m.max() <= taps
    np.testing.assert_allclose(objective(m, paths, taps, alpha, beta), best, rtol=1e-6, atol=1e-9)


def published_optimum(
    paths: np.ndarray, outputs: int, taps: int, keep: int, alpha: float, beta: float
) -> float:
    """The optimum of the integer program with a variable for every kernel, by HiGHS."""
    inputs = len(paths)
    kernels = inputs * outputs
    # Counts; then for inputs, outputs and kernels the minimum with one.
    cost = [
        np.repeat((1 - alpha) * paths / (taps * outputs * paths.sum()), outputs),
        np.full(inputs + outputs, alpha / (inputs + outputs)),
        np.full(kernels, beta / kernels),
    ]
    rows = np.kron(np.diag(paths), np.ones(outputs))
    columns = np.kron(paths, np.eye(outputs))
    at_most = np.block(
        [
            [np.concatenate([rows, columns, np.eye(kernels)]), -np.eye(inputs + outputs + kernels)],
            [-np.ones((1, kernels)), np.zeros((1, inputs + outputs + kernels))],
        ]
    )
    lower = np.r_[np.zeros(inputs + outputs + kernels), -keep]
    solution = optimize.milp(
        -np.concatenate(cost) * kernels,
        integrality=1,
        bounds=optimize.Bounds(0, np.r_[np.full(kernels, taps), np.ones(len(lower) - 1)]),
        constraints=optimize.LinearConstraint(at_most, lower, np.inf),
        options={"mip_rel_gap": 0.0},
    )
    return float(-solution.fun / kernels - beta)


@pytest.mark.parametrize("seed", range(6))
def test_optimum_is_that_of_the_program_with_a_variable_for_every_kernel(seed):
    rng = np.random.default_rng(seed)
    inputs, outputs, taps = 9, 7, (1, 9)[seed % 2]
    paths = rng.integers(0, 40, inputs).astype(float)
    for density, alpha, beta in itertools.product((0.03, 0.1, 0.4), (0.01, 0.5), (0.01, 1.0)):
        keep = max(round(density * inputs * outputs * taps), 1)
        m = chosen(paths, outputs, taps, keep, alpha, beta)
        best = published_optimum(paths, outputs, taps, keep, alpha, beta)
        np.testing.assert_allclose(
            objective(m, paths, taps, alpha, beta), best, rtol=1e-6, atol=1e-7
        )


def test_groups_share_the_budget_and_nothing_else():
    """Two groups of two input features and of one and two output features, by brute force."""
    paths, widths, taps = np.asarray([[5.0, 0.0], [3.0, 1.0]]), (1, 2), 2
    every = np.stack(list(itertools.product(range(taps + 1), repeat=6)))
    first, second = every[:, :2].reshape(-1, 2, 1), every[:, 2:].reshape(-1, 2, 2)

    def parts(m: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, ...]:
        into = m * p[:, None]
        nodes = np.minimum(into.sum(-1), 1).sum(-1) + np.minimum(into.sum(-2), 1).sum(-1)
        return nodes, into.sum((-2, -1)), np.minimum(m - 1, 0).sum((-2, -1))

    def value(m0: np.ndarray, m1: np.ndarray, alpha: float) -> np.ndarray:
        nodes, counts, empty = map(np.add, parts(m0, paths[0]), parts(m1, paths[1]))
        return alpha * nodes / 7 + (1 - alpha) * counts / (taps * (5 + 4 * 2)) + empty / 6

    for keep, alpha in itertools.product(range(1, 12), (0.01, 0.5, 1.0)):
        rng = np.random.default_rng(keep)
        rows = npb.balanced(paths, np.asarray(widths), taps, keep, alpha, 1.0, rng)
        m = [npb._spread_over(rows[g], paths[g], widths[g], rng) for g in (0, 1)]
        affordable = every.sum(1) <= keep
        best = value(first[affordable], second[affordable], alpha).max()
        assert rows.sum() == keep
        np.testing.assert_allclose(value(*m, alpha), best, rtol=1e-6)


def segments(sizes: tuple[int, ...]) -> Any:
    """A layer whose input feature i is the sum of sizes[i] inputs, and so has as many paths."""
    ends = np.cumsum(sizes)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        sums = [x[:, end - size : end].sum(1) for size, end in zip(sizes, ends, strict=True)]
        return jnp.stack(sums, 1) @ params["w"]

    return fn


@pytest.mark.parametrize(("alpha", "sparsity"), [(0.01, 0.5), (0.9, 0.5), (0.3, 0.75)])
def test_masks_of_a_dense_layer_are_the_optimum_for_the_paths_into_it(alpha, sparsity):
    sizes, outputs = (1, 4, 2, 6), 4
    params = {"w": jnp.ones((4, outputs))}
    result = prune(segments(sizes), params, jnp.ones((1, 13)), sparsity, alpha=alpha)
    every = np.stack(list(itertools.product((0, 1), repeat=16)))
    every = every[every.sum(1) <= 16 - 16 * sparsity].reshape(-1, 4, outputs)
    paths = np.asarray(sizes, float)
    best = objective(every, paths, 1, alpha, 1.0).max()
    mask = np.asarray(result.masks["w"]).astype(int)
    np.testing.assert_allclose(objective(mask, paths, 1, alpha, 1.0), best, rtol=1e-6)


def test_masks_of_a_convolution_are_the_optimum_for_the_paths_into_it():
    """2x2 kernels, of which the counts are the variables; two of the three inputs are sums."""
    sizes, outputs, keep = (3, 1), 2, 6

    def fn(params: Any, x: jax.Array) -> jax.Array:
        image = jnp.stack([x[..., :3].sum(-1), x[..., 3]], -1)
        return jax.lax.conv_general_dilated(
            image, params["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    result = prune(
        fn, {"w": jnp.ones((2, 2, 2, outputs))}, jnp.ones((1, 4, 4, 4)), 1 - keep / 16, beta=0.1
    )
    every = np.stack(list(itertools.product(range(5), repeat=4))).reshape(-1, 2, outputs)
    every = every[every.sum((1, 2)) <= keep]
    best = objective(every, np.asarray(sizes, float), 4, 0.01, 0.1).max()
    counts = np.asarray(result.masks["w"]).sum((0, 1))
    assert counts.sum() == keep
    value = objective(counts, np.asarray(sizes, float), 4, 0.01, 0.1)
    np.testing.assert_allclose(value, best, rtol=1e-6)


def test_a_large_layer_is_solved_in_chunks_of_its_output_features():
    """One path into every feature: each chunk fills its kernels with its share of the budget."""
    params, x = {"w": jnp.ones((70, 64))}, jnp.ones((1, 70))
    for sparsity in (0.95, 0.9):
        result = prune(lambda p, x: x @ p["w"], params, x, sparsity)
        mask = np.asarray(result.masks["w"]).astype(int)
        parts = np.split(mask, 2, axis=1)
        assert [part.sum() for part in parts] == [mask.sum() // 2] * 2
        for part in parts:
            # All 70 inputs and all 32 outputs have a weight, as far as these reach.
            assert part.any(1).sum() == min(70, part.sum())
            assert part.any(0).all()
    fewer = prune(lambda p, x: x @ p["w"], params, x, 1 - 3 / 4480, chunk=8)
    assert fewer.topology.weights == 3


ZOO = [
    "linen/siamese",
    "linen/scanned_layers",
    "nnx/soft_mixture_of_experts",
    "plain/einsum_attention",
    "plain/convolution_ensemble",
]


@pytest.mark.parametrize("name", ZOO)
def test_networks_keep_their_shares_and_no_dead_weight_that_has_a_place(name):
    fn, params, x = by_name(name).make()
    result = prune(fn, params, x, 0.8)
    net, shares = result.net, dpai.erk(result.net, 0.8)
    masks = [np.asarray(m) for m in net.leaves(result.masks)]
    effective = [np.asarray(m) for m in net.leaves(dpai.effective_weights(net, result.masks))]
    reached = npb._reached(net, [jnp.asarray(e, jnp.float32) for e in effective])
    for i, (layer, share) in enumerate(zip(net.layers, net.leaves(shares), strict=True)):
        within = tuple(axis for axis in range(masks[i].ndim) if axis not in layer.stack)
        np.testing.assert_array_equal(masks[i].sum(within).ravel(), np.ravel(share))
        dead = (masks[i] & ~effective[i]).any(within)
        room = (~masks[i] & (np.asarray(reached[i]) > 0)).any(within)
        assert not np.any(dead & room), layer.name
    from_scores = dpai.binarize(result.scores, shares)
    jax.tree.map(np.testing.assert_array_equal, result.masks, from_scores)


def test_the_same_key_gives_the_same_masks_and_another_key_others():
    params = {"first": jnp.ones((3, 3, 2, 8)), "head": jnp.ones((8, 4))}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x, params["first"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(x).sum((1, 2)) @ params["head"]

    first, again, other = (
        prune(fn, params, jnp.ones((1, 6, 6, 2)), 0.7, seed=seed).masks for seed in (1, 1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any(np.any(first[name] != other[name]) for name in params)


def test_dead_weights_move_to_the_kernels_of_most_effective_weights():
    """Kernels of one, two and four weights, of which the last has two where no path passes."""
    kept = np.zeros((1, 3, 4), np.float32)
    kept[0, 0, :1] = kept[0, 1, :2] = kept[0, 2] = 1
    reached = np.ones((1, 3, 4), bool)
    reached[0, 2, 2:] = False
    assert npb._move(kept, (kept > 0) & reached, reached, np.random.default_rng(0)) == 2
    np.testing.assert_array_equal(kept, [[[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]])


def test_dead_weights_of_a_dense_layer_move_to_the_input_of_most_weights_or_stay():
    kept = np.asarray([[1, 1, 0], [1, 0, 0], [0, 1, 1]], np.float32)[..., None]
    reached = np.asarray([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)[..., None]
    assert npb._move(kept, (kept > 0) & reached, reached, np.random.default_rng(0)) == 1
    np.testing.assert_array_equal(kept[:2, :, 0], [[1, 1, 1], [1, 0, 0]])
    assert kept.sum() == 5


def test_no_weight_moves_to_a_place_that_counts_on_a_dead_one():
    """Nothing leads to the second hidden unit: a weight to it would need the dead one behind it."""
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    net = dpai.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 2)))
    first = jnp.asarray([[1, 0, 0], [1, 0, 1]], jnp.float32)
    second = jnp.asarray([[1, 0], [0, 1], [0, 0]], jnp.float32)
    a, b = npb._moved(net, [first, second], np.random.default_rng(0))
    # Beside the living path there is a place in the second layer alone.
    np.testing.assert_array_equal(a, [[1, 0, 0], [1, 0, 1]])
    np.testing.assert_array_equal(b, [[1, 1], [0, 0], [0, 0]])


def test_a_weight_is_not_placed_where_its_tap_reads_padding_alone():
    """A 3x3 kernel on a map of one position sees it through its middle alone."""
    result = prune(
        lambda p, x: nn.Conv(8, (3, 3), use_bias=False).apply({"params": p}, x),
        {"kernel": jnp.ones((3, 3, 4, 8))},
        jnp.ones((1, 1, 1, 4)),
        1 - 20 / 288,
    )
    assert result.topology.effective == 20


class ResNet(nn.Module):
    """Width 8 and 16, four blocks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(x: jax.Array, width: int, stride: int = 1, size: int = 3) -> jax.Array:
            return nn.Conv(width, (size, size), stride, use_bias=False)(x)

        x = nn.relu(conv(x, 8))
        for width, stride in ((8, 1), (8, 1), (16, 2), (16, 1)):
            y = conv(nn.relu(conv(x, width, stride)), width)
            x = nn.relu(y + (conv(x, width, stride, 1) if x.shape != y.shape else x))
        return nn.Dense(10)(x.mean((1, 2)))


def test_at_98_percent_paths_and_effective_weights_are_more_than_by_chance():
    """Over three seeds. At the published alpha it gives up nodes for paths; at .1 both are more."""
    module, x = ResNet(), jnp.ones((1, 8, 8, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    for seed in range(3):
        key = jax.random.key(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            random, published, nodes = (
                dpai.prune(module.apply, params, x, 0.98, method=method, key=key).topology
                for method in (dpai.Random(), NPB(), NPB(alpha=0.1))
            )
        assert published.log_paths > nodes.log_paths > random.log_paths
        assert nodes.nodes > random.nodes
        assert published.effective == nodes.effective == random.weights
        assert random.effective < 0.9 * random.weights


def test_the_products_evaluated_grow_linearly_with_depth(monkeypatch):
    counted = []
    dot = Counting.dot

    def counting(*args):
        counted.append(1)
        return dot(*args)

    monkeypatch.setattr(Counting, "dot", counting)

    def products(depth):
        def fn(params, x):
            return functools.reduce(lambda x, w: jax.nn.relu(x @ w), params, x)

        counted.clear()
        dpai.prune(fn, [jnp.ones((6, 6))] * depth, jnp.ones((1, 6)), 0.5, method=NPB())
        return len(counted)

    shallow, middle, deep = map(products, (4, 8, 12))
    assert deep - middle == middle - shallow > 0


def test_progress_is_told_layer_by_layer():
    steps = []
    dpai.prune(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
        {"a": jnp.ones((4, 5)), "b": jnp.ones((5, 3))},
        jnp.ones((1, 4)),
        0.5,
        method=NPB(),
        progress=lambda step, total, numbers: steps.append((step, total, set(numbers))),
    )
    assert steps == [(1, 2, {"nodes", "kernels"}), (2, 2, {"nodes", "kernels"})]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"beta": -1.0}, "beta must be zero or more, got -1.0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NPB(**settings)


def test_an_allocation_may_leave_a_layer_empty():
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}
    result = prune(
        lambda p, x: x @ p["a"] + x @ p["b"], params, jnp.ones((1, 4)), 0.75,
        allocation=lambda net, sparsity: {"a": 0, "b": 10},
    )  # fmt: skip
    assert [layer.weights for layer in result.topology.layers] == [0, 10]


def test_an_allocation_for_all_layers_together_is_refused():
    with pytest.raises(ValueError, match="allocation must give a number for each layer, got 10"):
        prune(
            lambda p, x: x @ p["w"], {"w": jnp.ones((4, 5))}, jnp.ones((1, 4)), 0.5,
            allocation=dpai.global_threshold,
        )  # fmt: skip
