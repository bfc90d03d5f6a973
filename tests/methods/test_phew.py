"""PHEW's walks are paths, drawn by |θ|; what they pass is kept, exactly as much as asked for."""

import functools
import itertools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dpai_jax as dpai
from dpai_jax.methods.phew import PHEW, Walker
from dpai_jax.paths.channels import channels
from tests.support.graphs import SAME, Shapes, mlp, residual
from tests.support.networks import by_name
from tests.support.reference import Graph, JaxLayers, Layers, Network


def concatenated(layers: Layers, x: Any) -> Any:
    x = layers.conv("stem", x, SAME)
    y = layers.conv("1", layers.conv("0", x), SAME)
    return layers.dense("head", layers.numpy.concatenate([x, y], axis=-1))


NETWORKS: dict[Network, tuple[Shapes, tuple[int, ...]]] = {
    mlp: ({"0": (4, 6), "1": (6, 5), "2": (5, 3)}, (1, 4)),
    residual: (
        {
            "stem": (3, 3, 2, 3),
            "0": (3, 3, 3, 2),
            "1": (3, 3, 2, 3),
            "2": (3, 3, 3, 4),
            "3": (3, 3, 4, 4),
            "shortcut": (1, 1, 3, 4),
            "head": (36, 2),
        },
        (1, 12, 12, 2),
    ),
    concatenated: (
        {"stem": (3, 3, 2, 3), "0": (1, 1, 3, 4), "1": (3, 3, 4, 2), "head": (5, 2)},
        (1, 5, 5, 2),
    ),
}


def draw(shapes: Shapes, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


@functools.cache
def built(network: Network) -> tuple[Any, dict[str, jax.Array], jax.Array]:
    shapes, shape = NETWORKS[network]
    return lambda params, x: network(JaxLayers(params), x), draw(shapes), jnp.ones(shape)


def walkers(fn: Any, params: Any, x: Any) -> tuple[dpai.Network, Walker, Walker]:
    net = dpai.trace(fn, params, x)
    graph = channels(net).without_dead_ends()
    strength = np.concatenate([np.abs(np.asarray(w)).ravel() for w in net.leaves(params)])
    return net, Walker(graph, strength), Walker(graph.reversed(), strength)


def weight(net: dpai.Network, number: int) -> tuple[str, tuple[int, ...]]:
    """A weight by its number."""
    for layer in net.layers:
        if number < layer.size:
            return layer.name, tuple(int(i) for i in np.unravel_index(number, layer.shape))
        number -= layer.size
    raise AssertionError("no such weight")


def followers(graph: Graph) -> dict[Any, set[Any]]:
    """Which weights may come after which, from the edges between units; "input", "output"."""
    holds, after = defaultdict(set), defaultdict(set)
    into, out_of = {"input": set()}, {}
    for unit in graph.inputs.flat:
        holds[unit].add("input")
    for a, b, w in sorted(graph.edges, key=lambda edge: edge[1]):
        if w is None:
            holds[b] |= holds[a]
            continue
        # The feature a weight leads to stands for it, wherever on the map.
        out_of[w] = (w[0], w[1][-1])
        holds[b].add(out_of[w])
        for feature in holds[a]:
            into.setdefault(feature, set()).add(w)
    ending = set().union(*(holds[unit] for unit in graph.outputs.flat))
    after["input"] = into["input"]
    for w, feature in out_of.items():
        after[w] = into.get(feature, set()) | ({"output"} if feature in ending else set())
    return after


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_every_walk_is_a_path(network):
    net, forward, backward = walkers(*built(network))
    after = followers(Graph(network, *NETWORKS[network]))
    rng = np.random.default_rng(0)
    for walker, step in ((forward, 1), (backward, -1)):
        passed = walker.walks(np.arange(300), rng)
        for walk in passed:
            weights = [weight(net, n) for n in walk[walk >= 0]][::step]
            path = ["input", *weights, "output"]
            assert all(b in after[a] for a, b in itertools.pairwise(path)), path
        # Every layer is walked.
        assert {weight(net, n)[0] for n in passed[passed >= 0]} == set(NETWORKS[network][0])


def shares(walks: np.ndarray, numbers: Any) -> np.ndarray:
    """How often walks passed each of some weights."""
    return np.asarray([np.sum(walks == n) for n in np.ravel(numbers)])


def assert_drawn_by(counts: np.ndarray, chances: np.ndarray) -> None:
    """Counts of draws by these chances, as far as chance allows (five standard errors)."""
    chances = chances.ravel() / chances.sum()
    error = np.sqrt(counts.sum() * chances * (1 - chances))
    np.testing.assert_array_less(np.abs(counts - counts.sum() * chances), 5 * error + 1e-9)


def test_steps_of_an_mlp_are_drawn_by_strength():
    net, forward, backward = walkers(*built(mlp))
    first, second, last = (np.abs(np.asarray(w)) for w in net.leaves(built(mlp)[1]))
    rng, n = np.random.default_rng(0), 24000
    walks = forward.walks(np.arange(n), rng)
    numbers = np.arange(24).reshape(4, 6)
    for i in range(4):
        assert shares(walks[:, 0], numbers[i]).sum() == n // 4
        assert_drawn_by(shares(walks[:, 0], numbers[i]), first[i])
    numbers = 24 + np.arange(30).reshape(6, 5)
    for i in range(6):
        assert_drawn_by(shares(walks[:, 1], numbers[i]), second[i])
    walks = backward.walks(np.arange(n), rng)
    numbers = 54 + np.arange(15).reshape(5, 3)
    for o in range(3):
        assert shares(walks[:, 0], numbers[:, o]).sum() == n // 3
        assert_drawn_by(shares(walks[:, 0], numbers[:, o]), last[:, o])


def test_a_kernel_is_drawn_by_its_norm_and_the_tap_by_strength():
    params = draw({"conv": (3, 3, 2, 4), "head": (4, 2)})

    def fn(p, x):
        return JaxLayers(p).dense("head", JaxLayers(p).conv("conv", x, SAME))

    _, forward, _ = walkers(fn, params, jnp.ones((1, 6, 6, 2)))
    walks = forward.walks(np.arange(40000), np.random.default_rng(0))[:, 0]
    strength, numbers = np.abs(np.asarray(params["conv"])), np.arange(72).reshape(3, 3, 2, 4)
    for i in range(2):
        counts = shares(walks, numbers[:, :, i]).reshape(9, 4)
        assert_drawn_by(counts.sum(0), strength[:, :, i].sum((0, 1)))
        for o in range(4):
            assert_drawn_by(counts[:, o], strength[:, :, i, o])


def test_blocks_are_entered_or_passed_with_even_chances():
    """Two blocks around an identity, the second of two layers side by side, and a head."""

    def fn(p, x):
        x = x @ p["stem"]
        x = x + jnp.tanh(x @ p["block"])
        x = x + jnp.tanh(x @ p["left"]) + jnp.sin(x @ p["right"])
        return x @ p["head"]

    square = dict.fromkeys(("block", "left", "right"), (3, 3))
    params = draw({"stem": (2, 3), **square, "head": (3, 2)})
    net, forward, backward = walkers(fn, params, jnp.ones((1, 2)))
    rng = np.random.default_rng(0)
    for walker, expected in (
        # From the stem; from the head.
        (forward, {"block": 1 / 2, "left": 1 / 8, "right": 1 / 8, "head": 1 / 4}),
        (backward, {"left": 1 / 4, "right": 1 / 4, "block": 1 / 4, "stem": 1 / 4}),
    ):
        second = [weight(net, n)[0] for n in walker.walks(np.arange(8000), rng)[:, 1]]
        counts = np.asarray([second.count(name) for name in expected])
        assert counts.sum() == 8000
        assert_drawn_by(counts, np.asarray(list(expected.values())))


def test_walks_that_the_output_reads_on_the_way_end_there_or_go_on():
    def fn(p, x):
        x = x @ p["stem"]
        return x + jnp.tanh(x @ p["block"])

    _, forward, _ = walkers(fn, draw({"stem": (2, 3), "block": (3, 3)}), jnp.ones((1, 2)))
    walks = forward.walks(np.arange(8000), np.random.default_rng(0))
    assert_drawn_by(np.asarray([np.sum(walks[:, 1] < 0), np.sum(walks[:, 1] >= 0)]), np.ones(2))


def prune(where: Any, sparsity: float, seed: int = 0, **arguments: Any) -> dpai.Result:
    fn, params, x = where[:3]
    key = jax.random.key(seed)
    return dpai.prune(
        fn, params, x, sparsity, method=PHEW(), key=key, **{"progress": False} | arguments
    )


def arrays(net: dpai.Network, tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in net.leaves(tree)]


def all_weights(result: dpai.Result, tree: Any) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays(result.net, tree)])


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_of_one_walk_keeps_one_path_from_an_input_in_turn(seed):
    where = built(mlp)
    first, second, last = arrays(dpai.trace(*where), prune(where, 1 - 3 / 69, seed).masks)
    assert first.sum() == second.sum() == last.sum() == 1
    np.testing.assert_array_equal(first.any(1), np.arange(4) == 0)
    np.testing.assert_array_equal(first.any(0), second.any(1))
    np.testing.assert_array_equal(second.any(0), last.any(1))


@pytest.mark.parametrize(
    ("name", "sparsities"),
    [
        ("linen/scanned_layers", (0.3, 0.8)),
        ("nnx/soft_mixture_of_experts", (0.8,)),
        ("haiku/layer_stack", (0.8,)),
        ("equinox/tied_decoder", (0.5,)),
        ("plain/lstm_scanned", (0.8,)),
        ("plain/wavenet", (0.8,)),
    ],
)
def test_every_kept_weight_is_effective(name, sparsities):
    where = by_name(name).make()
    for sparsity in sparsities:
        result = prune(where, sparsity)
        assert result.topology.weights == dpai.weights_to_keep(result.net, sparsity)
        scores = all_weights(result, result.scores)
        np.testing.assert_array_equal(scores == np.round(scores), True)
        np.testing.assert_array_equal(scores > 0, all_weights(result, result.masks))
        # All but those of the walk that was cut.
        longest = sum(layer.copies for layer in result.net.layers)
        assert result.topology.weights - result.topology.effective <= longest
        assert not result.topology.collapsed


def test_masks_hang_on_the_key_and_the_strengths_alone():
    fn, params, x = where = built(mlp)
    results = [prune(where, 0.8, seed) for seed in (0, 0, 1)]
    same, again, other = (all_weights(r, r.masks) for r in results)
    np.testing.assert_array_equal(same, again)
    assert np.any(same != other)
    result = prune((fn, jax.tree.map(jnp.negative, params), x), 0.8)
    np.testing.assert_array_equal(all_weights(result, result.masks), same)


def test_strong_weights_are_preferred():
    fn, params, x = built(mlp)
    strength = np.concatenate([np.abs(np.asarray(params[name])).ravel() for name in "012"])
    kept = np.mean(
        [all_weights(r, r.masks) for r in (prune((fn, params, x), 0.6, s) for s in range(8))], 0
    )
    strong = strength > np.median(strength)
    assert kept[strong].mean() > 1.5 * kept[~strong].mean()


@pytest.mark.parametrize("zero", [["2"], ["0", "1", "2"]])
def test_kernels_that_are_zero_are_walked_evenly(zero):
    fn, params, x = built(mlp)
    params = params | {name: jnp.zeros_like(params[name]) for name in zero}
    result = prune((fn, params, x), 0.5)
    assert result.topology.weights == result.topology.effective == round(69 / 2)
    assert all(np.all(np.isfinite(s)) for s in arrays(result.net, result.scores))
    _, forward, _ = walkers(fn, params, x)
    last = forward.walks(np.arange(20000), np.random.default_rng(0))[:, 2]
    for i in range(5):
        assert_drawn_by(shares(last, 54 + 3 * i + np.arange(3)), np.ones(3))


def test_the_strongest_fill_what_walks_cannot_find():
    """A kernel of nine taps on a map of one position, of which a path passes the middle one."""

    def fn(p, x):
        return jax.nn.relu(JaxLayers(p).conv("conv", x, SAME)).reshape(1, -1) @ p["head"]

    params = draw({"conv": (3, 3, 2, 4), "head": (4, 2)})
    result = prune((fn, params, jnp.ones((1, 1, 1, 2))), 0.5)
    conv, head = (np.asarray(result.scores[name]) for name in ("conv", "head"))
    assert result.topology.weights == 40
    assert result.topology.effective == 16
    assert np.all(conv[1, 1] >= 1)
    assert np.all(head >= 1)
    rest = np.abs(np.asarray(params["conv"])).copy()
    rest[1, 1] = 0
    np.testing.assert_array_equal(conv == 0.5, rest >= np.sort(rest.ravel())[-24])


def test_a_sparsity_of_zero_keeps_all():
    result = prune(built(mlp), 0.0)
    assert result.topology.weights == 69


def test_walks_that_turn_out_to_be_no_paths_are_taken_back():
    """A walk through one factor of a product is a path where the other is alive."""

    def fn(p, x):
        y = jax.nn.relu(x @ p["up"]) * jax.nn.relu(x @ p["gate"])
        return y @ p["down"]

    params = draw({"up": (8, 64), "gate": (8, 64), "down": (64, 8)})
    for seed in range(3):
        topology = prune((fn, params, jnp.ones((1, 8))), 0.9, seed).topology
        assert topology.effective >= topology.weights - 3


def test_kernels_of_half_precision():
    fn, params, x = built(mlp)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    result = prune((fn, half, x.astype(jnp.bfloat16)), 0.5)
    assert result.topology.weights == round(69 / 2)
    assert all(s.dtype == np.float32 for s in arrays(result.net, result.scores))


def test_progress_is_reported():
    reports = []
    result = prune(built(mlp), 0.5, progress=lambda *report: reports.append(report))
    keep = result.topology.weights
    assert [step for step, _, _ in reports] == result.history["weights"].tolist()
    assert {steps for _, steps, _ in reports} == {keep}
    assert reports[-1][0] == keep
    assert all(numbers["walks"] > 0 for _, _, numbers in reports)


def test_parameters_must_be_finite_numbers():
    fn, params, x = built(mlp)
    with pytest.raises(ValueError, match="params must be numbers, but 1 has a NaN"):
        prune((fn, params | {"1": params["1"].at[0, 0].set(jnp.nan)}, x), 0.5)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    with pytest.raises(TypeError, match="params must hold values for this method"):
        prune((fn, shapes, x), 0.5)


def test_steps_of_a_loop_are_walked_in_their_order():
    def fn(p, x):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ p["stem"], p["stack"])
        return x @ p["head"]

    params = draw({"stem": (3, 4), "stack": (3, 4, 4), "head": (4, 2)})
    net, forward, backward = walkers(fn, params, jnp.ones((1, 3)))
    rng = np.random.default_rng(0)
    for walks in (forward.walks(np.arange(50), rng), backward.walks(np.arange(50), rng)[:, ::-1]):
        for walk in walks:
            stem, *stack, head = [weight(net, n)[1] for n in walk]
            assert [step for step, _, _ in stack] == [0, 1, 2]
            passed = [stem[1], *(i for _, *pair in stack for i in pair), head[0]]
            assert passed[::2] == passed[1::2]
