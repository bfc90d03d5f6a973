"""DPaI against the method worked out the slow way, and as it runs on real networks."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

import dpai_jax as dpai
from tests.support.networks import by_name
from tests.support.recorded import plain

# One compilation for all scores, counts, α and β of a network. Methods with equal settings share
# theirs too, so the optimizers are made once.
ascent = jax.jit(dpai.ascent, static_argnums=0, static_argnames=("counting", "balance"))
COUNTINGS = ("exact", "mean_field")
FROZEN = optax.sgd(0.0)
ADAM = optax.adam(0.05)

MLP_SHAPES = {"1": (5, 6), "2": (6, 6), "3": (6, 3)}
MLP_KEEP = {"1": 8, "2": 7, "3": 5}
CONV_SHAPES = {"conv1": (3, 3, 2, 3), "conv2": (2, 2, 3, 4), "head": (16, 3)}
CONV_KEEP = {"conv1": 9, "conv2": 8, "head": 10}


def mlp(params, x):
    x = jax.nn.relu(x @ params["1"])
    x = jax.nn.gelu(x @ params["2"])
    return x @ params["3"]


convolve = functools.partial(
    lax.conv_general_dilated, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)


def convnet(params, x):
    x = jax.nn.relu(convolve(x, params["conv1"], (1, 1)))
    x = jax.nn.relu(convolve(x, params["conv2"], (2, 2)))
    return x.reshape(1, -1) @ params["head"]


def mlp_paths(masks):
    """The number of paths, by multiplying it out."""
    return float(np.sum(np.ones(5) @ masks["1"] @ masks["2"] @ masks["3"]))


def convnet_paths(masks):
    """The number of paths of a 4x4 image, position by position."""
    image = np.ones((4, 4, 2))
    first = np.zeros((4, 4, 3))
    for y, x, i, j in itertools.product(range(4), range(4), range(3), range(3)):
        row, column = y + i - 1, x + j - 1
        if 0 <= row < 4 and 0 <= column < 4:
            first[y, x] += image[row, column] @ masks["conv1"][i, j]
    second = np.zeros((2, 2, 4))
    for y, x, i, j in itertools.product(range(2), range(2), range(2), range(2)):
        second[y, x] += first[2 * y + i, 2 * x + j] @ masks["conv2"][i, j]
    return float(np.sum(second.reshape(-1) @ masks["head"]))


def convnet_mean_paths(masks):
    """The number of paths where the mean over the positions stands for each of them."""
    # A tap of the first layer leaves the 4x4 image at one position in four, or at none.
    inside = np.asarray([3, 4, 3]) / 4
    first = np.zeros(3)
    for i, j in itertools.product(range(3), range(3)):
        first += inside[i] * inside[j] * np.ones(2) @ masks["conv1"][i, j]
    second = first @ masks["conv2"].sum((0, 1))
    return float(np.sum(np.tile(second, 4) @ masks["head"]))


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def top(scores, keep):
    """The mask of the largest magnitudes, by sorting."""
    order = np.argsort(-np.abs(scores).ravel(), kind="stable")
    mask = np.zeros(scores.size)
    mask[order[:keep]] = 1
    return mask.reshape(scores.shape)


def path_gradient(paths, masks):
    """The derivative of the number of paths by each weight, in which it is linear."""
    gradient = {}
    for name, mask in masks.items():
        gradient[name] = np.zeros(mask.shape)
        for at in np.ndindex(*mask.shape):
            present, absent = mask.copy(), mask.copy()
            present[at], absent[at] = 1, 0
            with_weight, without = masks | {name: present}, masks | {name: absent}
            gradient[name][at] = paths(with_weight) - paths(without)
    return gradient


def ascent_by_hand(paths, scores, keep, alpha, beta):
    """Lines 5 to 8 of Algorithm 1 in float64, and what is effective at these scores."""
    masks = {name: top(s, keep[name]) for name, s in scores.items()}
    count = paths(masks)
    gradients = path_gradient(paths, masks)
    directions, nodes, kernels = {}, {}, {}
    for name, s in scores.items():
        g = gradients[name] / count * np.sign(s)
        effective = (masks[name] > 0) & (gradients[name] > 0)
        inputs, outputs = s.ndim - 2, s.ndim - 1
        nodes[name] = np.zeros(s.shape[outputs], bool)
        kernels[name] = np.zeros((s.shape[inputs], s.shape[outputs]), bool)
        for at in zip(*np.nonzero(effective), strict=True):
            nodes[name][at[outputs]] = True
            kernels[name][at[inputs], at[outputs]] = True
        directions[name] = np.zeros(s.shape)
        for at in np.ndindex(*s.shape):
            no_node = not nodes[name][at[outputs]]
            no_kernel = not kernels[name][at[inputs], at[outputs]]
            node_term = (1 - beta) * g[at] * no_node
            kernel_term = beta * g[at] * no_kernel
            directions[name][at] = (1 - alpha) * g[at] + alpha * (node_term + kernel_term)
    numbers = {
        "log_paths": np.log(count),
        "nodes": sum(n.sum() for n in nodes.values()),
        "kernels": sum(k.sum() for k in kernels.values()),
    }
    return directions, masks, numbers


PROBLEMS = {
    "mlp": (mlp, MLP_SHAPES, MLP_KEEP, (1, 5)),
    "convnet": (convnet, CONV_SHAPES, CONV_KEEP, (1, 4, 4, 2)),
}
# A dense layer has one position, of which the mean is itself.
PATHS = {
    ("mlp", "exact"): mlp_paths,
    ("mlp", "mean_field"): mlp_paths,
    ("convnet", "exact"): convnet_paths,
    ("convnet", "mean_field"): convnet_mean_paths,
}


@functools.cache
def traced(name):
    fn, shapes, _, x = PROBLEMS[name]
    return dpai.trace(fn, draw(shapes), jax.ShapeDtypeStruct(x, jnp.float32))


def assert_trees_close(actual, expected, rtol=1e-4):
    compare = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6)
    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize(("name", "counting"), PATHS)
@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(0.99, 0.5), (0.3, 0.8), (0.0, 0.5), (1.0, 0.0), (1.0, 1.0), (1.0, 0.5)],
)
def test_ascent_is_the_method_by_hand(name, counting, alpha, beta):
    paths, (_, shapes, keep, _) = PATHS[name, counting], PROBLEMS[name]
    for seed in (1, 3):
        scores = draw(shapes, seed)
        expected, _, _ = ascent_by_hand(paths, scores, keep, alpha, beta)
        actual = ascent(traced(name), scores, keep, alpha, beta, counting=counting)
        assert_trees_close(actual, expected)
        assert any(np.any(direction != 0) for direction in expected.values())


@pytest.mark.parametrize(("name", "counting"), PATHS)
def test_the_scores_of_these_tests_leave_nodes_kernels_and_kept_weights_ineffective(name, counting):
    paths, (_, shapes, keep, _) = PATHS[name, counting], PROBLEMS[name]
    for seed in (1, 3):
        scores = draw(shapes, seed)
        _, masks, numbers = ascent_by_hand(paths, scores, keep, 1, 0.5)
        gradients = path_gradient(paths, masks)
        wasted = [np.any((masks[name] > 0) & (gradients[name] == 0)) for name in masks]
        assert any(wasted)
        assert 0 < numbers["nodes"] < sum(shape[-1] for shape in shapes.values())
        assert 0 < numbers["kernels"] < sum(keep.values())


@pytest.mark.parametrize("gamma", [0.5, 20.0, 1e6])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_soft_indicators_push_by_their_slope(beta, gamma):
    """The slope of tanh(γ·N)/γ by differences, N being the share of the paths through a node."""
    scores = draw(MLP_SHAPES, 3)
    masks = {name: top(s, MLP_KEEP[name]) for name, s in scores.items()}
    count = mlp_paths(masks)
    gradients = path_gradient(mlp_paths, masks)
    expected = {}
    for name, s in scores.items():
        g = gradients[name] / count
        kernel = g * masks[name]
        node = kernel.sum(0, keepdims=True)
        h = 1e-6 / gamma
        slopes = [(np.tanh(gamma * (n + h)) - np.tanh(gamma * (n - h))) / (2 * h * gamma)
                  for n in (node, kernel)]  # fmt: skip
        push = 0.25 + 0.75 * ((1 - beta) * slopes[0] + beta * slopes[1])
        expected[name] = push * g * np.sign(s)
    actual = ascent(traced("mlp"), scores, MLP_KEEP, 0.75, beta, gamma)
    assert_trees_close(actual, expected, rtol=1e-3)


def test_one_number_to_keep_is_one_threshold_over_all_layers():
    """A direction is the same as with the number of weights above it counted in each layer."""
    scores = draw(MLP_SHAPES, 5)
    flat = np.concatenate([np.abs(s).ravel() for s in scores.values()])
    threshold = np.sort(flat)[-20]
    keep = {name: int(np.sum(np.abs(s) >= threshold)) for name, s in scores.items()}
    assert keep != MLP_KEEP
    assert sum(keep.values()) == 20
    jax.tree.map(
        np.testing.assert_array_equal,
        ascent(traced("mlp"), scores, 20),
        ascent(traced("mlp"), scores, keep),
    )


def test_scores_move_by_magnitude_so_that_their_sign_does_not_matter():
    scores = draw(MLP_SHAPES)
    flipped = jax.tree.map(np.negative, scores)
    direction, opposite = (ascent(traced("mlp"), s, MLP_KEEP) for s in (scores, flipped))
    jax.tree.map(np.testing.assert_array_equal, direction, jax.tree.map(jnp.negative, opposite))


def test_without_any_path_scores_move_where_one_weight_would_make_one():
    scores = draw(MLP_SHAPES)
    scores["1"] = np.where(np.arange(6) < 2, 5.0, 0.1).astype(np.float32) * np.ones((5, 1), "f4")
    scores["2"] = np.ones((6, 6), np.float32)
    scores["2"][:2] = 0.1
    keep = {"1": 10, "2": 24, "3": 18}
    masks = {name: top(s, keep[name]) for name, s in scores.items()}
    assert mlp_paths(masks) == 0
    gradients = path_gradient(mlp_paths, masks)
    direction = ascent(traced("mlp"), scores, keep)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(np.asarray(direction[name]) != 0, gradient > 0)


def test_ascent_is_zero_where_nothing_can_be_pruned():
    params = draw(MLP_SHAPES | {"bias": (3,)})
    net = dpai.trace(lambda p, x: mlp(p, x) + p["bias"][None], params, jnp.ones((1, 5)))
    scores = draw(MLP_SHAPES, 1)
    with_bias = ascent(net, scores | {"bias": np.float32(0)}, MLP_KEEP | {"bias": 0})
    bias = with_bias.pop("bias")
    assert bias.shape == ()
    assert bias == 0
    assert_trees_close(with_bias, ascent(traced("mlp"), scores, MLP_KEEP), rtol=1e-5)


def test_ascent_maps_over_scores_and_alphas():
    net = traced("mlp")
    draws = [draw(MLP_SHAPES, seed) for seed in (1, 2, 3)]
    scores = jax.tree.map(lambda *s: jnp.stack(s), *draws)
    alphas = jnp.asarray([0.0, 0.5, 1.0])
    mapped = jax.jit(jax.vmap(lambda s, a: dpai.ascent(net, s, MLP_KEEP, alpha=a)))(scores, alphas)
    for i, (one, alpha) in enumerate(zip(draws, alphas, strict=True)):
        direction = jax.tree.map(lambda m, i=i: m[i], mapped)
        assert_trees_close(direction, ascent(net, one, MLP_KEEP, alpha), rtol=1e-5)


@pytest.mark.parametrize(
    ("scores", "keep", "message"),
    [
        ({"1": np.ones((5, 6))}, MLP_KEEP, "scores must have the tree structure of params"),
        (draw(MLP_SHAPES), {"1": 8, "2": 7}, "keep must have the tree structure of params"),
        (
            draw(MLP_SHAPES | {"2": (6, 5)}),
            MLP_KEEP,
            r"scores must have shape \(6, 6\) at 2, got \(6, 5\)",
        ),
    ],
)
def test_scores_and_counts_that_do_not_fit_are_refused(scores, keep, message):
    with pytest.raises(ValueError, match=message):
        dpai.ascent(traced("mlp"), scores, keep)


def prune(sparsity=0.8, fn=mlp, shapes=MLP_SHAPES, key=0, x=(1, 5), **settings):
    """The plain ascent of the paper, on weights drawn anew."""
    return dpai.prune(
        fn,
        draw(shapes),
        jnp.ones(x),
        sparsity,
        method=plain(**settings),
        key=jax.random.key(key),
        progress=False,
    )


def starting_scores(**arguments):
    """The scores that a key draws, found by not moving them."""
    return prune(steps=1, optimizer=FROZEN, **arguments).scores


WIDE = {"1": (5, 32), "2": (32, 32), "3": (32, 10)}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.5),
        ADAM,
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.sgd(optax.cosine_decay_schedule(0.5, 4)),
    ],
    ids=["sgd", "adam", "momentum", "schedule"],
)
def test_scores_follow_the_ascent_by_any_optimizer(optimizer):
    settings = {"alpha": 0.7, "beta": 0.2, "counting": "exact"}
    result = prune(steps=4, optimizer=optimizer, normalize=False, **settings)
    keep = dpai.erk(result.net, 0.8)
    scores = starting_scores()
    state = optimizer.init(scores)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(4):
            direction = ascent(result.net, scores, keep, 0.7, 0.2, counting="exact")
            descent = jax.tree.map(jnp.negative, direction)
            updates, state = optimizer.update(descent, state, scores)
            scores = optax.apply_updates(scores, updates)
    assert_trees_close(result.scores, scores, rtol=1e-5)


def test_it_goes_on_from_given_scores():
    two = prune(steps=2, optimizer=optax.sgd(0.5))
    again = prune(
        steps=1, optimizer=optax.sgd(0.5), scores=prune(steps=1, optimizer=optax.sgd(0.5)).scores
    )
    jax.tree.map(np.testing.assert_array_equal, two.scores, again.scores)
    jax.tree.map(np.testing.assert_array_equal, two.masks, again.masks)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"1": np.ones((5, 6))}, "scores must have the tree structure of params"),
        (draw(MLP_SHAPES | {"3": (3, 6)}), r"scores must have shape \(6, 3\) at 3, got \(3, 6\)"),
        (draw(MLP_SHAPES) | {"2": np.full((6, 6), np.nan, "f4")}, "but 2 has a NaN"),
    ],
)
def test_given_scores_that_do_not_fit_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        prune(scores=scores)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("counting", COUNTINGS)
@pytest.mark.parametrize("normalize", [False, True])
def test_plain_ascent_adds_the_direction_worked_out_by_hand(name, counting, normalize):
    fn, shapes, _, x = PROBLEMS[name]
    scores = jax.tree.map(np.asarray, starting_scores(fn=fn, shapes=shapes, x=x))
    keep = dpai.erk(traced(name), 0.8)
    settings = {"alpha": 0.9, "beta": 0.4, "counting": counting, "normalize": normalize}
    result = prune(fn=fn, shapes=shapes, x=x, steps=1, optimizer=optax.sgd(0.5), **settings)
    direction, _, numbers = ascent_by_hand(PATHS[name, counting], scores, keep, 0.9, 0.4)
    if normalize:
        direction = jax.tree.map(lambda d: d / np.mean(np.abs(d)), direction)
    assert_trees_close(
        result.scores, jax.tree.map(lambda s, d: s + 0.5 * d, scores, direction), rtol=1e-5
    )
    for name, number in numbers.items():
        np.testing.assert_allclose(result.history[name][0], number, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*layer collapse")
def test_a_layer_in_which_no_weight_would_make_a_path_stays_where_it_is():
    """Its direction is zero, and so is the mean that it is divided by."""
    scores = {name: np.full(shape, 0.1, np.float32) for name, shape in MLP_SHAPES.items()}
    # What the first two layers keep does not meet, nor what the last two do.
    scores["1"][:, 0] = scores["2"][1, 1] = scores["3"][2] = 1.0
    keep = {"1": 5, "2": 1, "3": 3}
    result = prune(1 - 9 / 84, scores=scores, steps=1, allocation=lambda net, sparsity: keep)
    np.testing.assert_array_equal(result.scores["1"], scores["1"])
    np.testing.assert_array_equal(result.scores["3"], scores["3"])
    moved = np.zeros((6, 6))
    moved[0, 2] = 0.01 * 36
    np.testing.assert_allclose(result.scores["2"] - scores["2"], moved, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*layer collapse")
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.99])
def test_exactly_as_many_weights_are_kept_as_asked(sparsity):
    result = prune(sparsity, shapes=WIDE, steps=5, optimizer=ADAM)
    size = 5 * 32 + 32 * 32 + 32 * 10
    keep = dpai.erk(result.net, sparsity)
    kept = jax.tree.map(lambda mask: int(np.sum(mask)), result.masks)
    assert kept == keep
    assert sum(kept.values()) == round((1 - sparsity) * size)


def test_masks_are_those_of_the_largest_magnitudes():
    result = prune(steps=5, optimizer=ADAM)
    keep = dpai.erk(result.net, 0.8)
    for name, scores in result.scores.items():
        np.testing.assert_array_equal(result.masks[name], top(np.asarray(scores), keep[name]) > 0)


def test_the_same_key_gives_the_same_masks_and_another_one_others():
    first, again, other = (
        prune(shapes=WIDE, steps=5, optimizer=ADAM, key=key) for key in (3, 3, 4)
    )
    jax.tree.map(np.testing.assert_array_equal, first.masks, again.masks)
    jax.tree.map(np.testing.assert_array_equal, first.scores, again.scores)
    differ = jax.tree.map(lambda a, b: bool(np.any(a != b)), first.masks, other.masks)
    assert all(jax.tree.leaves(differ))


@pytest.mark.parametrize(("name", "counting"), PATHS)
def test_the_history_holds_what_is_counted_of_each_step_s_masks(name, counting):
    fn, shapes, _, x = PROBLEMS[name]
    settings = {"steps": 12, "optimizer": ADAM, "counting": counting}
    result = prune(0.8, fn, shapes, x=x, **settings)
    # At the masks of each step, before the scores move.
    assert {name: len(values) for name, values in result.history.items()} == dict.fromkeys(
        ("log_paths", "nodes", "kernels"), 12
    )
    last = prune(0.8, fn, shapes, x=x, **settings | {"steps": 11})
    of_last = np.log(
        PATHS[name, counting](jax.tree.map(lambda m: np.asarray(m, np.float64), last.masks))
    )
    assert result.history["log_paths"][-1] == pytest.approx(of_last, abs=1e-4)
    masks = jax.tree.map(lambda mask: np.asarray(mask, np.float64), result.masks)
    log_paths = {c: np.log(PATHS[name, c](masks)) for c in COUNTINGS}
    assert dpai.log_paths(result.net, masks, counting) == pytest.approx(
        log_paths[counting], abs=1e-4
    )
    # Whatever the history counts by, the topology that is reported is exact.
    assert result.topology.log_paths == pytest.approx(log_paths["exact"], abs=1e-4)
    if counting == "exact" or name == "mlp":
        assert result.history["nodes"][-1] == last.topology.nodes
        assert result.history["kernels"][-1] == last.topology.kernels


def test_ascent_makes_more_nodes_and_kernels_effective():
    result = prune(0.95, shapes=WIDE, steps=150, optimizer=ADAM)
    start, end = ({name: v[i] for name, v in result.history.items()} for i in (0, -1))
    assert end["nodes"] > start["nodes"]
    assert end["kernels"] > start["kernels"]
    control = dpai.prune(
        mlp,
        draw(WIDE),
        jnp.ones((1, 5)),
        0.95,
        method=dpai.Random(),
        key=jax.random.key(0),
        progress=False,
    )
    assert result.topology.effective > control.topology.effective


def scanned(params, x):
    x, _ = lax.scan(lambda x, k: (x + jax.nn.relu(x @ k), None), x, params["blocks"])
    return x @ params["head"]


def unrolled(params, x):
    for kernel in params["blocks"]:
        x = x + jax.nn.relu(x @ kernel)
    return x @ params["head"]


def test_scanned_layers_and_their_unrolled_twin_get_the_same_masks():
    stacked = draw({"blocks": (3, 8, 8), "head": (8, 4)})
    apart = stacked | {"blocks": list(stacked["blocks"])}
    nets = [
        dpai.trace(fn, params, jnp.ones((1, 8)))
        for fn, params in ((scanned, stacked), (unrolled, apart))
    ]
    counts = np.asarray([9, 7, 8])
    keep = [
        {"blocks": counts.reshape(3, 1, 1), "head": 6},
        {"blocks": list(counts), "head": 6},
    ]
    scores = [stacked, apart]
    for _ in range(3):
        directions = [ascent(*problem) for problem in zip(nets, scores, keep, strict=True)]
        scores = [
            jax.tree.map(lambda s, d: s + 0.3 * d, s, d)
            for s, d in zip(scores, directions, strict=True)
        ]
    one, other = (
        dpai.binarize(jax.tree.map(jnp.abs, s), k) for s, k in zip(scores, keep, strict=True)
    )
    np.testing.assert_allclose(scores[0]["blocks"], np.stack(scores[1]["blocks"]), rtol=1e-5)
    np.testing.assert_array_equal(one["blocks"], np.stack(other["blocks"]))
    np.testing.assert_array_equal(one["head"], other["head"])
    assert np.any(np.asarray(scores[0]["blocks"]) != stacked["blocks"])


def test_each_of_the_layers_of_a_scan_is_normalized_by_itself():
    stacked = draw({"blocks": (3, 8, 8), "head": (8, 4)})
    # Paths through the last one's kept weights are few.
    stacked["blocks"][2, :, 1:] *= 0.5
    apart = stacked | {"blocks": list(stacked["blocks"])}
    one, other = (
        dpai.prune(
            fn,
            scores,
            jnp.ones((1, 8)),
            0.8,
            method=plain(steps=5, scores=scores),
            progress=False,
        )
        for fn, scores in ((scanned, stacked), (unrolled, apart))
    )
    np.testing.assert_allclose(one.scores["blocks"], np.stack(other.scores["blocks"]), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, list(one.masks["blocks"]), other.masks["blocks"])
    distances = np.abs(one.scores["blocks"] - stacked["blocks"]).mean((1, 2))
    np.testing.assert_allclose(distances, 0.05, rtol=1e-5)


@pytest.mark.parametrize("name", ["linen/siamese", "nnx/lora", "haiku/audio", "equinox/resnet"])
def test_it_prunes_networks_of_every_library(name):
    case = by_name(name)
    fn, params, x = case.make()
    result = dpai.prune(fn, params, x, 0.8, method=dpai.DPaI(steps=3), progress=False)
    assert {layer.name for layer in result.net.layers} == case.layers
    assert jax.tree.structure(result.masks) == jax.tree.structure(params)
    size = sum(layer.size for layer in result.net.layers)
    assert result.topology.weights == round(0.2 * size)
    masked = dpai.apply_masks(params, result.masks)
    zeros = sum(
        int(np.sum(np.asarray(leaf)[~np.asarray(mask)] == 0))
        for leaf, mask in zip(jax.tree.leaves(masked), jax.tree.leaves(result.masks), strict=True)
        if np.ndim(mask)
    )
    assert zeros == size - round(0.2 * size)


def test_counting_in_mean_field_is_the_default_of_pruning_but_not_of_one_direction():
    assert dpai.DPaI().counting == "mean_field"
    assert inspect.signature(dpai.ascent).parameters["counting"].default == "exact"


@pytest.mark.parametrize("counting", ["mean", "", None])
def test_an_unknown_counting_is_refused(counting):
    message = f"counting must be one of exact, mean_field, got {counting!r}"
    with pytest.raises(ValueError, match=message):
        dpai.DPaI(counting=counting)
    with pytest.raises(ValueError, match=message):
        dpai.ascent(traced("mlp"), draw(MLP_SHAPES), MLP_KEEP, counting=counting)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_zero_to_one_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {value}"):
        dpai.DPaI(**{name: value})


def test_fewer_than_one_step_is_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        dpai.DPaI(steps=0)


def even_by_hand(paths, strengths, masks, alpha, beta):
    """The direction of the balance "even" at kept weights, in float64, weight by weight."""
    weighed = {name: m * strengths[name] for name, m in masks.items()}
    count = paths(weighed)
    directions = {}
    for name, mask in masks.items():
        share = np.zeros(mask.shape)
        for at in zip(*np.nonzero(mask), strict=True):
            without = weighed[name].copy()
            without[at] = 0
            share[at] = 1 - paths(weighed | {name: without}) / count
        inputs, outputs = mask.ndim - 2, mask.ndim - 1

        def sums(*axes, share=share):
            """The sums of shares with the same indices along some axes."""
            found = {}
            for at in np.ndindex(*share.shape):
                own = tuple(at[i] for i in axes)
                found[own] = found.get(own, 0.0) + share[at]
            return found

        def slope(at, axes, found):
            own = found[tuple(at[i] for i in axes)]
            return 1 / own / sum(x > 0 for x in found.values()) if own > 0 else 0.0

        into, out_of, kernels = sums(outputs), sums(inputs), sums(inputs, outputs)
        directions[name] = np.zeros(mask.shape)
        for at in zip(*np.nonzero(share), strict=True):
            nodes = (slope(at, (outputs,), into) + slope(at, (inputs,), out_of)) / 2
            kernel = slope(at, (inputs, outputs), kernels)
            balance = (1 - beta) * nodes + beta * kernel
            directions[name][at] = share[at] * ((1 - alpha) + alpha * share.sum() * balance)
    return directions


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.3, 0.0), (0.6, 1.0), (1.0, 0.4)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_even_balance_is_its_formula_by_hand(name, alpha, beta):
    _, shapes, keep, _ = PROBLEMS[name]
    rng = np.random.default_rng(2)
    strengths = {key: rng.uniform(0.1, 3, shape) for key, shape in shapes.items()}
    scores = draw(shapes)
    paths = PATHS[name, "exact"]
    masks = {key: top(s, keep[key]) for key, s in scores.items()}
    found = ascent(
        traced(name),
        scores,
        keep,
        alpha,
        beta,
        balance="even",
        strengths=jax.tree.map(np.float32, strengths),
    )
    wanted = even_by_hand(paths, strengths, masks, alpha, beta)
    for key in shapes:
        kept = masks[key] > 0
        by_hand = wanted[key] * np.sign(scores[key])
        np.testing.assert_allclose(
            np.asarray(found[key])[kept], by_hand[kept], rtol=2e-4, atol=1e-6
        )


def residual(params, x):
    """A layer of one tap, a depthwise block, two stacked blocks and a head."""
    x = convolve(x, params["first"], (1, 1))
    x = x + jax.nn.relu(convolve(x, params["depthwise"], (1, 1), feature_group_count=6))
    x = x.mean((1, 2))
    x, _ = lax.scan(lambda x, kernel: (x + jax.nn.relu(x @ kernel), None), x, params["stacked"])
    return x @ params["head"]


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.3, 0.0), (0.6, 1.0), (1.0, 0.4)])
def test_the_even_balance_sums_to_a_layers_share_of_all_paths(alpha, beta):
    shapes = {"first": (1, 1, 2, 6), "depthwise": (3, 3, 1, 6), "stacked": (2, 6, 6)}
    params = draw({**shapes, "head": (6, 3)})
    net = dpai.trace(residual, params, jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32))
    strengths = jax.tree.map(np.abs, params)
    keep = {name: w.size for name, w in params.items()}
    found = ascent(
        net, strengths, keep, alpha, beta, balance="even", strengths=strengths, counting="exact"
    )
    layers = [("first", ...), ("depthwise", ...), ("stacked", 0), ("stacked", 1), ("head", ...)]
    for name, copy in layers:
        without = {**strengths, name: strengths[name].copy()}
        without[name][copy] = 0
        share = 1 - float(jnp.exp(dpai.log_paths(net, without) - dpai.log_paths(net, strengths)))
        is_passed_by = share < 0.95
        assert is_passed_by == (name in ("depthwise", "stacked"))
        total = np.sum(np.asarray(found[name])[copy], dtype=np.float64)
        assert total == pytest.approx(share, rel=1e-4)


def default(sparsity, params, **settings):
    return dpai.prune(
        mlp,
        params,
        jnp.ones((1, 5)),
        sparsity,
        method=dpai.DPaI(**settings),
        progress=False,
    )


def test_the_default_scores_by_the_even_balance_as_the_density_falls():
    params = draw(WIDE)
    result = default(0.9, params, steps=4)
    net = result.net
    strengths = jax.tree.map(np.abs, params)
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    for t in range(1, 5):
        everything = jax.tree.map(lambda m: int(m.sum()), masks)
        scores = ascent(
            net, jax.tree.map(np.float32, masks), everything, 0.3, 0.5,
            counting="mean_field", balance="even", strengths=strengths,
        )  # fmt: skip
        scores = jax.tree.map(lambda s, m: np.where(m, s, 0), scores, masks)
        keep = dpai.weights_to_keep(net, 1 - 0.1 ** (t / 4) if t < 4 else 0.9)
        flat, in_layers = ravel_pytree(scores)
        kept = in_layers(top(flat, keep).astype(np.float32))
        masks = jax.tree.map(lambda m: np.asarray(m) > 0, kept)
    jax.tree.map(np.testing.assert_array_equal, result.masks, masks)
    assert_trees_close(result.scores, scores, rtol=1e-4)


@pytest.mark.parametrize("allocation", [dpai.global_threshold, dpai.erk])
@pytest.mark.parametrize("strength", ["magnitude", "square"])
def test_paths_alone_weighed_by_magnitude_are_synflow(strength, allocation):
    params = draw(WIDE)
    squared = jax.tree.map(jnp.square, params) if strength == "square" else params
    paths_alone = {"alpha": 0.0, "counting": "exact", "steps": 10, "allocation": allocation}
    result = default(0.9, params, strength=strength, **paths_alone)
    synflow = dpai.SynFlow(steps=10, allocation=allocation)
    other = dpai.prune(mlp, squared, jnp.ones((1, 5)), 0.9, method=synflow, progress=False)
    # Of weights that no path passes, which have no flow, others may be kept.
    one, two = (dpai.effective_weights(result.net, r.masks) for r in (result, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert result.topology.effective > 0.9 * result.topology.weights


def test_strengths_keep_their_scale_beside_a_shortcut():
    """Where paths through a layer meet others, its scale matters: a SynFlow beside it, as above."""

    def fn(params, x):
        x = x @ params["0"]
        for block in ("1", "2"):
            x = x + jax.nn.relu(x @ params[block]["up"]) @ params[block]["down"]
        return x @ params["3"]

    draws = np.random.default_rng(0)
    shapes = {"0": (5, 12), "1": {"up": (12, 24), "down": (24, 12)}}
    shapes = {**shapes, "2": shapes["1"], "3": (12, 6)}
    params = jax.tree.map(
        lambda shape: np.float32(draws.normal(size=shape) / np.sqrt(shape[0])),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    own, synflow = dpai.DPaI(alpha=0.0, counting="exact", steps=10), dpai.SynFlow(steps=10)
    x = jnp.ones((1, 5))

    def effective(method, params):
        result = dpai.prune(fn, params, x, 0.9, method=method, progress=False)
        return dpai.effective_weights(result.net, result.masks)

    found = effective(own, params)
    jax.tree.map(np.testing.assert_array_equal, found, effective(synflow, params))
    louder = {**params, "1": jax.tree.map(lambda w: 8 * w, params["1"])}
    changed = effective(own, louder)
    jax.tree.map(np.testing.assert_array_equal, changed, effective(synflow, louder))
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), found, changed)))


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-20, 2.0**20, 2.0**60])
def test_weights_of_any_size_have_strengths(scale):
    """In a chain of layers a layer's scale cancels, be it out of what float32 can multiply."""
    params = draw(WIDE)
    scaled = {**params, "2": params["2"] * np.float32(scale)}
    one, two = (default(0.9, p, strength="square", steps=5).masks for p in (params, scaled))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_balance_keeps_more_nodes_than_paths_alone():
    params = draw(WIDE)
    nodes = [default(0.9, params, alpha=alpha).topology.nodes for alpha in (0.0, 0.1, 0.5)]
    assert nodes[0] < nodes[1] < nodes[2]


def test_what_was_removed_stays_removed():
    numbers = default(0.9, draw(WIDE), steps=6).history["kernels"]
    assert np.all(np.diff(numbers.astype(int)) < 0)


def test_a_layer_of_zeros_counts_its_paths_by_one():
    params = draw(WIDE)
    zeros, ones = ({**params, "3": jnp.full((32, 10), value)} for value in (0.0, 1.0))
    jax.tree.map(np.testing.assert_array_equal, default(0.8, zeros).masks, default(0.8, ones).masks)


def test_strengths_need_values_and_paths_that_count_one_do_not():
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, draw(WIDE)))
    with pytest.raises(TypeError, match="params must hold values for this method, but 1 is"):
        default(0.8, shapes)
    assert default(0.8, shapes, strength="one").topology.weights == round(0.2 * 1504)


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("strength", "one, magnitude, square"),
        ("schedule", "falling, constant"),
        ("balance", "even, indicator"),
    ],
)
def test_an_unknown_setting_is_refused(setting, options):
    with pytest.raises(ValueError, match=f"{setting} must be one of {options}, got 'x'"):
        dpai.DPaI(**{setting: "x"})
