"""Repair: every kept weight on a path where that is possible, held against searches of graphs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dpai_jax as dpai
from dpai_jax import repairing
from dpai_jax.counts import reached
from dpai_jax.methods.noise import normal_scores
from dpai_jax.repairing import repair
from tests.support.graphs import NETWORKS, Shapes, mlp, read_twice
from tests.support.networks import by_name
from tests.support.reference import Graph, JaxLayers, Layers, Masks, Network


def drawn(shapes: Shapes, counts: Any, rng: np.random.Generator) -> Masks:
    """Masks with so many weights in each layer, anywhere."""
    places = {name: rng.permutation(int(np.prod(shape))) for name, shape in shapes.items()}
    return {
        name: (places[name] < count).reshape(shapes[name])
        for name, count in zip(sorted(shapes), counts, strict=True)
    }


def totals(masks: Any) -> list[int]:
    """How many weights each layer has, in the order of their names."""
    return [int(np.sum(masks[name])) for name in sorted(masks)]


def of_stacked(net: dpai.Network, masks: Any) -> list[Any]:
    """How many weights each layer has, layers stacked in one kernel counted one by one."""
    return [
        np.sum(m, tuple(i for i in range(m.ndim) if i not in layer.stack)).tolist()
        for layer, m in zip(net.layers, map(np.asarray, net.leaves(masks)), strict=True)
    ]


def as_numpy(masks: Any) -> Masks:
    return {name: np.asarray(mask) for name, mask in masks.items()}


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a: Any, b: Any) -> bool:
    return any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# Against a search through the graph of units.


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97, 0.99])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_all_that_is_kept_is_effective_if_a_path_can_pass_it(
    network: Network, sparsity: float
) -> None:
    shapes, _ = NETWORKS[network]
    net, graph = read_twice(network)
    # Some taps only ever see padding.
    possible = graph.effective({name: np.ones(shape, bool) for name, shape in shapes.items()})
    rng = np.random.default_rng(0)
    counts = totals(dpai.erk(net, sparsity))
    for seed in range(2):
        masks = drawn(shapes, counts, rng)
        scores = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        repaired = as_numpy(repair(net, masks, scores, jax.random.key(seed)))
        assert totals(repaired) == counts
        effective = graph.effective(repaired)
        expected = np.minimum(counts, totals(possible)).tolist()
        assert totals(effective) == expected
        # What can't be placed stays where it was.
        for name in shapes:
            assert not np.any(repaired[name] & ~effective[name] & ~masks[name])


def deep(layers: Layers, x: Any) -> Any:
    return layers.dense("3", mlp(layers, x))


def residual(layers: Layers, x: Any) -> Any:
    x = layers.dense("0", x)
    x = layers.add(x, layers.dense("2", layers.dense("1", x)))
    return layers.dense("3", x)


def traced(network: Network, shapes: Shapes) -> dpai.Network:
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((1, shapes["0"][0]), jnp.float32)
    return dpai.trace(lambda params, x: network(JaxLayers(params), x), params, x)


@pytest.mark.parametrize(
    ("network", "shapes"),
    [
        (mlp, {"0": (2, 2), "1": (2, 2), "2": (2, 2)}),
        (mlp, {"0": (1, 3), "1": (3, 2), "2": (2, 1)}),
        (mlp, {"0": (2, 2), "1": (2, 3), "2": (3, 1)}),
        (deep, {"0": (1, 2), "1": (2, 2), "2": (2, 2), "3": (2, 1)}),
        (residual, {"0": (1, 2), "1": (2, 2), "2": (2, 2), "3": (2, 1)}),
    ],
)
def test_whatever_any_masks_of_the_same_counts_can_do_is_done(
    network: Network, shapes: Shapes
) -> None:
    net, graph = traced(network, shapes), Graph(network, shapes, (1, shapes["0"][0]))
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    possible = set()
    for flags in itertools.product([False, True], repeat=sum(sizes)):
        parts = np.split(np.array(flags), np.cumsum(sizes)[:-1])
        masks = {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        if totals(graph.effective(masks)) == totals(masks):
            possible.add(tuple(totals(masks)))

    rng = np.random.default_rng(0)
    for counts in itertools.product(*(range(1, size + 1) for size in sizes)):
        masks = drawn(shapes, counts, rng)
        before = totals(graph.effective(masks))
        repaired = as_numpy(repair(net, masks, None, jax.random.key(0)))
        after = totals(graph.effective(repaired))
        assert totals(repaired) == list(counts)
        assert all(a >= b for a, b in zip(after, before, strict=True))
        assert (after == list(counts)) == (counts in possible), counts


def test_attention_is_effective_throughout() -> None:
    """Logits pass where both queries and keys live, and only to where a value does."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = (x @ params[name] for name in "qkv")
        return (jax.nn.softmax(q @ k.T) @ v) @ params["o"]

    shapes: Shapes = {"k": (6, 5), "o": (7, 4), "q": (6, 5), "v": (6, 7)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    net = dpai.trace(fn, params, jnp.ones((3, 6)))
    rng = np.random.default_rng(0)
    for counts in [(15, 14, 15, 21), (3, 5, 4, 3), (2, 1, 2, 6), (1, 1, 1, 1)]:
        repaired = as_numpy(repair(net, drawn(shapes, counts, rng), None, jax.random.key(0)))
        assert totals(repaired) == list(counts)
        np.testing.assert_array_equal(repaired["q"].any(0), repaired["k"].any(0))
        np.testing.assert_array_equal(repaired["v"].any(0), repaired["o"].any(1))


def test_stacked_layers_keep_a_count_each() -> None:
    """Layers of a scan, held against the graph of the same layers one after another."""
    depth, width, counts = 6, 8, [3, 20, 2, 2, 30, 5]

    def fn(params: Any, x: jax.Array) -> jax.Array:
        step = lambda x, kernel: (jax.nn.relu(x @ kernel), None)  # noqa: E731
        return lax.scan(step, x, params["stack"])[0]

    def unrolled(layers: Layers, x: Any) -> Any:
        for i in range(depth):
            x = layers.dense(str(i), x)
        return x

    shapes: Shapes = {str(i): (width, width) for i in range(depth)}
    graph = Graph(unrolled, shapes, (1, width))
    params = {"stack": jnp.ones((depth, width, width))}
    net = dpai.trace(fn, params, jnp.ones((1, width)))
    masks = drawn(shapes, counts, np.random.default_rng(0))
    assert totals(graph.effective(masks)) != counts

    stacked = {"stack": np.stack(list(masks.values()))}
    repaired = np.asarray(repair(net, stacked, None, jax.random.key(0))["stack"])
    layers = dict(zip(shapes, repaired, strict=True))
    assert totals(layers) == counts
    # Between layers of two weights no more than two units live, and at most five before the last.
    assert totals(graph.effective(layers)) == [3, 3 * 2, 2, 2, 2 * 5, 5]


def test_no_path_at_all_becomes_one_weight_a_layer() -> None:
    """Through depth: each layer's only weight must meet those before and after it."""
    depth, width = 20, 5

    def network(layers: Layers, x: Any) -> Any:
        for i in range(depth):
            x = layers.dense(str(i), x)
        return x

    shapes: Shapes = {str(i): (width, width) for i in range(depth)}
    net, graph = traced(network, shapes), Graph(network, shapes, (1, width))
    masks = drawn(shapes, [1] * depth, np.random.default_rng(0))
    assert np.isneginf(dpai.log_paths(net, masks))
    repaired = as_numpy(repair(net, masks, None, jax.random.key(0)))
    assert totals(repaired) == totals(graph.effective(repaired)) == [1] * depth


def test_paths_through_gated_depthwise_convolutions_are_found_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a filter on a single pixel one tap counts, so each weight needs a channel of its own."""
    blocks, width, inner = 2, 16, 96

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        groups, layout = x.shape[-1] // kernel.shape[2], ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for block in params["blocks"]:
            y = jax.nn.silu(conv(x, block["expand"]))
            y = jax.nn.silu(conv(y, block["depthwise"]))
            gate = jax.nn.silu(conv(y.mean((1, 2), keepdims=True), block["squeeze"]))
            x = x + conv(y * jax.nn.sigmoid(conv(gate, block["excite"])), block["project"])
        return x.mean((1, 2)) @ params["head"]

    shapes = {
        "expand": (1, 1, width, inner),
        "depthwise": (5, 5, 1, inner),
        "squeeze": (1, 1, inner, 4),
        "excite": (1, 1, 4, inner),
        "project": (1, 1, inner, width),
    }
    params = {
        "blocks": [{name: jnp.ones(shape) for name, shape in shapes.items()}] * blocks,
        "head": jnp.ones((width, 10)),
    }
    net = dpai.trace(fn, params, jnp.ones((1, 1, 1, width)))
    scores = net.tree(normal_scores(net, jax.random.key(0), params), float)
    keep = dpai.erk(net, 0.92)
    masks = dpai.binarize(scores, keep)
    searches = []

    def searched(*args: Any, ahead: bool = False) -> Any:
        if not ahead:
            searches.append(args)
        return reached(*args, ahead=ahead)

    monkeypatch.setattr(repairing, "reached", searched)
    repaired = repair(net, masks, scores, jax.random.key(0))
    topology = dpai.topology(net, repaired)
    assert topology.effective == topology.weights == sum(net.leaves(keep))
    # One path after another takes ten or more for each weight of the depthwise filters: thousands.
    # Together they take 111, and 128 if only what the last masks reach is remembered.
    assert len(searches) < 120


# The zoo: no less than before on any network.


@pytest.mark.parametrize(
    "name",
    ["linen/vit_class_token", "linen/scanned_layers", "plain/lstm_scanned"],
)
def test_all_kinds_of_networks_keep_their_counts_and_lose_no_path(name: str) -> None:
    net = dpai.trace(*by_name(name).make())
    rng = np.random.default_rng(0)
    for sparsity in (0.5, 0.9, 0.97):
        keep = net.leaves(dpai.erk(net, sparsity))
        ranks = [rng.random(layer.shape, np.float32) for layer in net.layers]
        highest = [_highest(s, k) for s, k in zip(ranks, keep, strict=True)]
        scores, masks = net.tree(ranks, float), net.tree(highest, lambda: np.array(True))
        repaired = repair(net, masks, scores, jax.random.key(0))
        assert jax.tree.structure(repaired) == jax.tree.structure(masks)
        assert of_stacked(net, repaired) == of_stacked(net, masks)
        before, after = (of_stacked(net, dpai.effective_weights(net, m)) for m in (masks, repaired))
        assert all(np.all(np.array(a) >= b) for a, b in zip(after, before, strict=True))
        assert after == of_stacked(net, masks)
        assert_same(repair(net, repaired, scores, jax.random.key(1)), repaired)


def _highest(scores: np.ndarray, keep: Any) -> np.ndarray:
    """Masks of the highest scores of a layer, or of each of those stacked along its first axis."""
    rows = scores.reshape(np.size(keep), -1)
    ranks = np.argsort(np.argsort(-rows, axis=1), axis=1)
    return (ranks < np.reshape(keep, (-1, 1))).reshape(scores.shape)


# What is chosen.

WIDE: Shapes = {"0": (12, 40), "1": (40, 40), "2": (40, 6)}
SMALL: Shapes = {"0": (4, 6), "1": (6, 5), "2": (5, 3)}
# One path, and in the first layer three weights on none.
ONE_PATH: Masks = {
    "0": np.pad([[True], [False]], ((0, 2), (0, 5))) | np.eye(4, 6, 3, dtype=bool),
    "1": np.pad([[True]], ((0, 5), (0, 4))),
    "2": np.pad([[True]], ((0, 4), (0, 2))),
}


def test_places_of_the_highest_scores_are_taken() -> None:
    net = traced(mlp, SMALL)
    assert totals(ONE_PATH) == [4, 1, 1]
    # Weights from the other inputs to the one unit that lives are the only places.
    scores = {name: np.full(shape, 9, np.float32) for name, shape in SMALL.items()}
    scores["0"][:, 0] = [-8, -5, -np.inf, -4]
    masks = {**ONE_PATH, "0": ONE_PATH["0"] & (np.arange(6) < 5)}
    assert totals(masks) == [3, 1, 1]
    repaired = as_numpy(repair(net, masks, scores, jax.random.key(0)))
    assert repaired["0"][:, 0].tolist() == [True, True, False, True]
    repaired = as_numpy(repair(net, ONE_PATH, scores, jax.random.key(0)))
    assert repaired["0"][:, 0].tolist() == [True, True, True, True]


def test_equal_scores_are_told_apart_by_the_key_alone() -> None:
    net = traced(mlp, WIDE)
    masks = drawn(WIDE, [20, 20, 20], np.random.default_rng(0))
    equal = {name: jnp.zeros(shape) for name, shape in WIDE.items()}
    for scores in (None, equal):
        runs = [repair(net, masks, scores, jax.random.key(seed)) for seed in (0, 0, 1)]
        assert_same(runs[0], runs[1])
        assert differ(runs[0], runs[2])
    assert_same(repair(net, masks), repair(net, masks, None, jax.random.key(0)))


def test_distinct_scores_leave_the_key_no_say_where_single_weights_do() -> None:
    net = traced(mlp, WIDE)
    masks = drawn(WIDE, [150, 200, 60], np.random.default_rng(0))
    masks["1"][3] = False
    assert dpai.topology(net, masks).effective < sum(totals(masks))
    scores = net.tree(normal_scores(net, jax.random.key(0), masks), float)
    runs = [repair(net, masks, scores, jax.random.key(seed)) for seed in (0, 1)]
    assert differ(runs[0], masks)
    assert_same(*runs)


def test_masks_of_effective_weights_come_back() -> None:
    net = traced(mlp, SMALL)
    path = {name: np.zeros(shape, bool) for name, shape in SMALL.items()}
    for name, at in zip(SMALL, [(3, 2), (2, 4), (4, 1)], strict=True):
        path[name][at] = True
    for masks in (path, {name: np.ones(shape, bool) for name, shape in SMALL.items()}):
        assert_same(repair(net, masks, None, jax.random.key(0)), masks)
    floats = {name: mask.astype(np.float32) for name, mask in path.items()}
    assert_same(repair(net, floats, None, jax.random.key(0)), path)


def test_a_weight_that_can_be_spared_makes_way_for_a_path() -> None:
    """Both inputs enter one unit, and the last layer has more to keep than leaves it."""
    shapes: Shapes = {"0": (2, 2), "1": (2, 2), "2": (2, 1)}
    net, graph = traced(mlp, shapes), Graph(mlp, shapes, (1, 2))
    masks = {
        "0": np.array([[True, False], [True, False]]),
        "1": np.array([[True, False], [True, True]]),
        "2": np.array([[True], [True]]),
    }
    assert totals(graph.effective(masks)) == [2, 1, 1]
    repaired = as_numpy(repair(net, masks, None, jax.random.key(0)))
    assert totals(graph.effective(repaired)) == totals(repaired) == [2, 3, 2]


def test_masks_that_no_weight_can_repair_come_back() -> None:
    net = traced(mlp, SMALL)
    masks = drawn(SMALL, [6, 0, 4], np.random.default_rng(0))
    assert_same(repair(net, masks, None, jax.random.key(0)), masks)


def test_scores_of_any_float_dtype_will_do() -> None:
    net = traced(mlp, SMALL)
    masks = drawn(SMALL, [6, 6, 4], np.random.default_rng(0))
    scores = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in SMALL.items()}
    assert totals(repair(net, masks, scores, jax.random.key(0))) == [6, 6, 4]


# What is refused.


def test_masks_and_scores_of_another_network_are_refused() -> None:
    net = traced(mlp, SMALL)
    fitting = {name: np.ones(shape, np.float32) for name, shape in SMALL.items()}
    shorter = {name: x for name, x in fitting.items() if name != "2"}
    turned = {**fitting, "1": fitting["1"].T}
    for wrong, message in ((shorter, "tree structure"), (turned, r"shape \(6, 5\) at 1")):
        with pytest.raises(ValueError, match=f"masks must have .*{message}"):
            repair(net, wrong, fitting)
        with pytest.raises(ValueError, match=f"scores must have .*{message}"):
            repair(net, fitting, wrong)


def test_scores_that_are_no_numbers_are_refused() -> None:
    net = traced(mlp, SMALL)
    scores = {name: np.ones(shape, np.float32) for name, shape in SMALL.items()}
    scores["1"][2, 3] = np.nan
    with pytest.raises(ValueError, match="scores must be numbers, but 1 has a NaN"):
        repair(net, {name: score > -1 for name, score in scores.items()}, scores)
