"""Structured sparsity: masks by kernels, by channels and by N of M, held against plain loops."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

import dpai_jax as dpai
from dpai_jax.granularity import in_groups
from dpai_jax.paths.channels import are_outputs
from tests.support import sharded
from tests.support.graphs import NETWORKS, read_twice, separable
from tests.support.reference import JaxLayers

# What the axes of each kernel of `fn` are: over input features, taps and stacked layers.
AXES = {
    "conv": ((2,), (0, 1), ()),
    "grouped": ((2,), (0, 1), ()),
    "heads": ((0,), (), ()),
    "joined": ((0, 1), (), ()),
    "stack": ((1,), (), (0,)),
    "head": ((0,), (), ()),
}
SHAPES = {
    "conv": (3, 3, 2, 8),
    "grouped": (3, 3, 4, 12),
    "heads": (12, 2, 5),
    "joined": (2, 5, 7),
    "stack": (2, 7, 7),
    "head": (7, 3),
}


def convolve(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def fn(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(convolve(x, params["conv"]))
    x = jax.nn.relu(convolve(x, params["grouped"], 2)).mean((1, 2))
    x = jnp.tanh(jnp.einsum("bi,ihd->bhd", x, params["heads"]))
    x = jnp.einsum("bhd,hdo->bo", x, params["joined"])
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["stack"])
    return x @ params["head"]


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.square(fn(params, batch) - 1.0))


RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.standard_normal(shape) / 3, jnp.float32) for name, shape in SHAPES.items()
}
X = jnp.asarray(RNG.standard_normal((2, 4, 4, 2)), jnp.float32)
SIZE = sum(p.size for p in PARAMS.values())

METHODS = {
    "DPaI": dpai.DPaI(steps=3),
    "DPaI, global": dpai.DPaI(
        strength="one",
        schedule="constant",
        balance="indicator",
        steps=3,
        optimizer=optax.sgd(0.01),
        normalize=True,
        allocation=dpai.global_threshold,
    ),
    "Random": dpai.Random(),
    "Magnitude": dpai.Magnitude(),
    "Magnitude, ERK": dpai.Magnitude(dpai.erk),
    "SNIP": dpai.SNIP(),
    "iterative SNIP": dpai.IterativeSNIP(3),
    "FORCE": dpai.FORCE(2),
    "GraSP": dpai.GraSP(),
    "SynFlow": dpai.SynFlow(3),
    "NTK-SAP": dpai.NTKSAP(2),
    "ProsPr": dpai.ProsPr(1),
}
SPARSITIES = {"kernel": 0.8, "channel": 0.6, "2:4": 0.5, "1:3": 0.667}


@functools.cache
def pruned(granularity: str, name: str) -> dpai.Result:
    return prune(granularity, METHODS[name])


def prune(granularity: str, method: Any, **arguments: Any) -> dpai.Result:
    call = {"params": PARAMS, "sparsity": SPARSITIES.get(granularity, 0.5), "progress": False}
    if type(method).__name__ in ("SNIP", "IterativeSNIP", "FORCE", "GraSP", "ProsPr"):
        call |= {"loss_fn": loss, "batches": [X]}
    return dpai.prune(fn, x=X, method=method, granularity=granularity, **call | arguments)


def axes_of_group(name: str, granularity: str) -> tuple[int, ...]:
    inputs, taps, _ = AXES[name]
    return taps if granularity == "kernel" else (*inputs, *taps)


def groups(array: np.ndarray, axes: tuple[int, ...]) -> dict[tuple[int, ...], np.ndarray]:
    """The entries of each group, by the place of its first one, in C order."""
    firsts = [range(1 if i in axes else n) for i, n in enumerate(array.shape)]
    return {
        at: array[tuple(slice(None) if i in axes else at[i] for i in range(array.ndim))].ravel()
        for at in itertools.product(*firsts)
    }


def rows(array: np.ndarray, name: str) -> np.ndarray:
    """The weights into each place along the inputs, in C order: (row, inputs)."""
    inputs = AXES[name][0]
    rest = [i for i in range(array.ndim) if i not in inputs]
    width = int(np.prod([array.shape[i] for i in inputs]))
    return array.transpose(*rest, *inputs).reshape(-1, width)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("granularity", ["kernel", "channel"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:no path passes")
def test_groups_are_kept_or_removed_whole_and_as_many_weights_as_their_sizes_allow(
    name, granularity
):
    result, largest = pruned(granularity, name), 0
    for layer, mask in result.masks.items():
        found = groups(np.asarray(mask), axes_of_group(layer, granularity))
        assert all(group.all() or not group.any() for group in found.values())
        largest = max(largest, *(group.size for group in found.values()))
        # No layer, and no copy of one, loses its last group.
        assert (
            np.asarray(mask).reshape(-1, mask[0].size if AXES[layer][2] else mask.size).any(1).all()
        )
    kept = sum(int(mask.sum()) for mask in result.masks.values())
    assert result.topology.weights == kept
    assert abs(kept - (1 - SPARSITIES[granularity]) * SIZE) <= largest / 2 + 0.5
    assert result.settings["granularity"] == granularity
    if granularity == "channel":
        assert result.masks["head"].all()
        assert not result.masks["conv"].all()


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("granularity", "name"), [*(("2:4", name) for name in METHODS), ("1:3", "SynFlow")]
)
@pytest.mark.filterwarnings("ignore:no path passes")
def test_n_of_every_m_weights_along_the_inputs_are_kept(granularity, name):
    n, m = map(int, granularity.split(":"))
    result, kept = pruned(granularity, name), 0
    for layer, mask in result.masks.items():
        for row in rows(np.asarray(mask), layer):
            for start in range(0, len(row), m):
                block = row[start : start + m]
                assert block.sum() == -(-n * len(block) // m)
                kept += block.sum()
    assert result.topology.weights == kept


def highest(scores: dict[Any, float], number: int) -> set[Any]:
    """The keys of the highest scores, of equal ones the first."""
    return set(sorted(scores, key=lambda key: -scores[key])[:number])


def strengths(layer: str, granularity: str) -> dict[tuple[int, ...], float]:
    """The sum of |θ| over each group, in float64."""
    weights = np.abs(np.asarray(PARAMS[layer], np.float64))
    found = groups(weights, axes_of_group(layer, granularity))
    return {at: group.sum() for at, group in found.items()}


@pytest.mark.parametrize("granularity", ["kernel", "channel"])
def test_those_of_the_highest_sums_are_kept_in_each_layer(granularity):
    masks = pruned(granularity, "Magnitude, ERK").masks
    for layer, (_, _, stack) in AXES.items():
        mask, sums = np.asarray(masks[layer]), strengths(layer, granularity)
        for copy in range(SHAPES[layer][0]) if stack else [None]:
            own = {at: s for at, s in sums.items() if copy is None or at[0] == copy}
            kept = {at for at in own if mask[at]}
            assert kept == highest(own, len(kept))


@pytest.mark.parametrize("granularity", ["kernel", "channel"])
def test_one_threshold_goes_by_the_mean_of_a_group_and_ends_nearest_to_what_was_asked(granularity):
    masks = pruned(granularity, "Magnitude").masks
    means, sizes, first = {}, {}, set()
    for layer, (_, _, stack) in AXES.items():
        own = strengths(layer, granularity)
        size = PARAMS[layer].size // len(own)
        sizes |= {(layer, at): size for at in own}
        means |= {(layer, at): s / size for at, s in own.items()}
        for copy in range(SHAPES[layer][0]) if stack else [None]:
            each = {(layer, at): own[at] for at in own if copy is None or at[0] == copy}
            all_stay = granularity == "channel" and layer == "head"
            first |= highest(each, len(each) if all_stay else 1)
    asked = round((1 - SPARSITIES[granularity]) * SIZE)
    kept, total = set(first), sum(sizes[group] for group in first)
    for group in sorted(set(means) - first, key=lambda group: -means[group]):
        if abs(total + sizes[group] - asked) > abs(total - asked):
            break
        kept.add(group)
        total += sizes[group]
    found = {(layer, at) for layer, at in means if np.asarray(masks[layer])[at]}
    assert found == kept


@pytest.mark.parametrize("granularity", ["2:4", "1:3"])
def test_the_largest_weights_of_each_block_are_kept(granularity):
    n, m = map(int, granularity.split(":"))
    masks = pruned(granularity, "Magnitude").masks
    for layer in AXES:
        weights = rows(np.abs(np.asarray(PARAMS[layer])), layer)
        mask = rows(np.asarray(masks[layer]), layer)
        for i, start in np.ndindex(len(weights), -(-weights.shape[1] // m)):
            block = slice(start * m, start * m + m)
            number = -(-n * len(weights[i, block]) // m)
            best = highest(dict(enumerate(weights[i, block].tolist())), number)
            assert set(np.flatnonzero(mask[i, block]).tolist()) == best


def test_of_equal_weights_the_first_are_kept():
    params = {"w": jnp.ones((6, 2))}
    call = {"method": dpai.Magnitude(), "progress": False}
    result = dpai.prune(
        lambda p, x: x @ p["w"], params, jnp.ones((1, 6)), 0.5, granularity="2:4", **call
    )
    assert result.masks["w"].T.tolist() == [[True, True, False, False, True, False]] * 2


numbers = st.integers(1, 12)


@given(st.data())
def test_shares_are_rounded_to_the_total_that_comes_nearest(data):
    n = data.draw(st.integers(1, 6))
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 9, 18]), min_size=n, max_size=n))
    groups_of = data.draw(st.lists(numbers, min_size=n, max_size=n))
    whole = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    most = [size * number for size, number in zip(sizes, groups_of, strict=True)]
    least = [a if w else s for a, s, w in zip(most, sizes, whole, strict=True)]
    shares = [data.draw(st.integers(1, a)) for a in most]
    while sum(shares) < sum(least):
        shares = [min(a, share + 1) for a, share in zip(most, shares, strict=True)]
    total = sum(shares)
    found = in_groups(total, shares, sizes, least)
    kept = [number * size for number, size in zip(found, sizes, strict=True)]
    assert all(a <= k <= b for a, k, b in zip(least, kept, most, strict=True))
    # The scale that makes room for the least, by bisection.
    low, high = 0.0, 1.0
    for _ in range(60):
        scale = (low + high) / 2
        sum_now = sum(max(a, scale * s) for a, s in zip(least, shares, strict=True))
        low, high = (scale, high) if sum_now < total else (low, scale)
    ideal = [max(a, high * s) for a, s in zip(least, shares, strict=True)]
    ways = [
        {size * int(np.floor(x / size + 1e-9)), size * int(np.ceil(x / size - 1e-9))}
        for x, size in zip(ideal, sizes, strict=True)
    ]
    assert all(k in way for k, way in zip(kept, ways, strict=True))
    nearest = min(abs(sum(choice) - total) for choice in itertools.product(*ways))
    assert abs(sum(kept) - total) == nearest


@pytest.mark.parametrize("granularity", ["kernel", "channel", "2:4"])
def test_the_topology_of_structured_masks_is_that_of_a_graph_search(granularity):
    net, graph = read_twice(separable)
    shapes, shape = NETWORKS[separable]
    rng = np.random.default_rng(1)
    params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    result = dpai.prune(
        lambda params, x: separable(JaxLayers(params), x),
        params,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        0.5,
        method=dpai.Random(),
        granularity=granularity,
        progress=False,
    )
    masks = {name: np.asarray(mask) for name, mask in result.masks.items()}
    effective = graph.effective(masks)
    assert granularity != "channel" or any((masks[k] & ~effective[k]).any() for k in masks)
    for layer in result.topology.layers:
        own = effective[layer.name]
        kernels = own.any((0, 1)) if own.ndim == 4 else own
        counts = masks[layer.name].sum(), own.sum(), kernels.any(0).sum(), kernels.sum()
        assert counts == (layer.weights, layer.effective, layer.nodes, layer.kernels)
    assert net.size == result.topology.size


def test_layers_that_write_the_outputs_are_found_in_the_trace():
    def several(params, x):
        hidden = jax.nn.relu(x @ params["a"])
        side = hidden @ params["side"]
        stream = hidden + jnp.tanh(hidden @ params["b"]) @ params["c"]
        gate = jax.nn.sigmoid(hidden @ params["gate"])
        return {"logits": jax.nn.softmax(stream @ params["out"]), "side": side, "gated": x * gate}

    shapes = {"a": (4, 5), "b": (5, 6), "c": (6, 5), "gate": (5, 4), "out": (5, 3), "side": (5, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    net = dpai.trace(several, params, jnp.ones((1, 4)))
    named = dict(zip([layer.name for layer in net.layers], are_outputs(net), strict=True))
    assert {name for name, is_output in named.items() if is_output} == {"gate", "out", "side"}
    # Without a head all layers that write to the residual stream write the output.
    net = dpai.trace(
        lambda p, x: x @ p["a"] + jnp.tanh(x @ p["a"] @ p["b"]) @ p["c"], params, jnp.ones((1, 4))
    )
    named = dict(zip([layer.name for layer in net.layers], are_outputs(net), strict=True))
    assert named == {"a": True, "b": False, "c": True}


@pytest.mark.parametrize("granularity", ["kernel", "channel"])
def test_scores_of_a_group_move_together_along_its_mean_gradient(granularity):
    """One step of plain ascent on paths alone."""
    net = dpai.trace(fn, PARAMS, X)
    method = dpai.DPaI(
        alpha=0.0, balance="indicator", strength="one", schedule="constant", counting="exact",
        steps=1, optimizer=optax.sgd(1.0), scores=PARAMS, allocation=dpai.erk,
    )  # fmt: skip
    result = prune(granularity, method)
    start = {}
    for layer, w in PARAMS.items():
        means = np.empty(w.shape)
        for at, group in groups(
            np.asarray(w, np.float64), axes_of_group(layer, granularity)
        ).items():
            axes = axes_of_group(layer, granularity)
            means[tuple(slice(None) if i in axes else at[i] for i in range(w.ndim))] = group.mean()
        start[layer] = means
    # The masks of the start: as many groups as the result has, of the largest magnitudes.
    masks = {}
    for layer, scores in start.items():
        axes, stack = axes_of_group(layer, granularity), AXES[layer][2]
        mask = np.zeros(scores.shape, np.float32)
        for copy in range(SHAPES[layer][0]) if stack else [None]:
            own = {at: abs(g[0]) for at, g in groups(scores, axes).items() if copy in (None, at[0])}
            number = sum(bool(np.asarray(result.masks[layer])[at]) for at in own)
            for at in highest(own, number):
                mask[tuple(slice(None) if i in axes else at[i] for i in range(mask.ndim))] = 1
        masks[layer] = jnp.asarray(mask)
    gradients = jax.grad(lambda masks: dpai.log_paths(net, masks))(masks)
    for layer, before in start.items():
        axes = axes_of_group(layer, granularity)
        for at, group in groups(np.asarray(gradients[layer], np.float64), axes).items():
            moved = np.asarray(result.scores[layer])[at] - before[at]
            assert moved == pytest.approx(group.mean() * np.sign(before[at]), abs=2e-5)
        scores = groups(np.asarray(result.scores[layer]), axes)
        assert all(np.all(group == group[0]) for group in scores.values())


@pytest.mark.parametrize("granularity", ["channel", "2:4"])
def test_many_masks_are_those_of_single_calls(granularity):
    keys = jax.random.split(jax.random.key(3), 3)
    call = {"granularity": granularity, "method": dpai.DPaI(steps=3)}
    many = dpai.prune_many(fn, PARAMS, X, 0.5, key=keys, **call)
    for key, one in zip(keys, many, strict=True):
        single = dpai.prune(fn, PARAMS, X, 0.5, key=key, progress=False, **call)
        jax.tree.map(np.testing.assert_array_equal, one.masks, single.masks)
        assert one.settings == single.settings


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("granularity", "method"),
    [
        ("kernel", dpai.Magnitude()),
        ("channel", dpai.Magnitude(dpai.erk)),
        ("2:4", dpai.Magnitude()),
        ("channel", dpai.DPaI(steps=2)),
    ],
)
def test_masks_on_a_mesh_are_those_of_one_device(granularity, method):
    net_fn, params, x = sharded.network("residual")
    spread = sharded.spread(params, sharded.mesh("mixed", AxisType.Explicit))
    call = {"method": method, "granularity": granularity, "progress": False}
    result, reference = (dpai.prune(net_fn, p, x, 0.5, **call) for p in (spread, params))
    jax.tree.map(np.testing.assert_array_equal, result.masks, reference.masks)
    for mask, param in zip(jax.tree.leaves(result.masks), jax.tree.leaves(spread), strict=True):
        assert mask.ndim == 0 or mask.sharding == param.sharding


class BySingleWeights:
    """A method that knows nothing of groups."""

    def run(self, problem):
        scores = [jnp.abs(w) for w in problem.weights()]
        keep = dpai.erk(problem.net, problem.sparsity)
        masks = dpai.binarize(problem.net.tree(scores, lambda: jnp.float32(0)), keep)
        return dpai.Pruned(problem.net.leaves(masks), scores)


BAD = {
    "no granularity": (
        "granularity must be weight, kernel, channel or N:M",
        {"granularity": "row"},
    ),
    "a number": ("granularity must be .* got 4", {"granularity": 4}),
    "more than all": ("granularity must be .* got '4:2'", {"granularity": "4:2"}),
    "none of four": ("granularity must be .* got '0:4'", {"granularity": "0:4"}),
    "another sparsity": ("sparsity must be 0.5 with .*'2:4', got 0.9", {"granularity": "2:4"}),
    "too few channels": (
        "sparsity 0.9 keeps 88 of 885 weights, fewer than .*: one channel for each layer, and",
        {"granularity": "channel"},
    ),
    "repair": (
        "repair must be False with granularity 'kernel'",
        {"granularity": "kernel", "repair": True},
    ),
    "PHEW": (
        "granularity must be 'weight' with method PHEW",
        {"granularity": "kernel", "method": dpai.PHEW()},
    ),
    "NPB": (
        "granularity must be 'weight' with method NPB",
        {"granularity": "kernel", "method": dpai.NPB()},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_sentence(name):
    message, arguments = BAD[name]
    call = {"sparsity": 0.9, "method": dpai.Magnitude(), "progress": False} | arguments
    for prune_ in (dpai.prune, dpai.prune_many):
        with pytest.raises(ValueError, match=message) as raised:
            prune_(fn, PARAMS, X, **call)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("granularity", ["kernel", "2:4"])
def test_masks_of_a_method_that_ignores_the_granularity_are_refused(granularity):
    with pytest.raises(RuntimeError, match=r"BySingleWeights made masks of .* not by"):
        prune(granularity, BySingleWeights())
