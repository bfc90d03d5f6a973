"""Each saliency against its definition: finite differences, an explicit Hessian, plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpai_jax as dpai
from tests.support import problems
from tests.support.problems import draw, mlp, mlp_batches, mlp_params, squared_error

KERNELS = ("first", "second", "last")
X = jnp.ones((1, 5))


def prune(method, params=None, sparsity=0.5, batches=1, **arguments):
    params = mlp_params() if params is None else params
    return dpai.prune(
        mlp, params, X, sparsity, method=method,
        loss_fn=squared_error, batches=mlp_batches(batches), progress=False, **arguments,
    )  # fmt: skip


def forward64(params, x):
    hidden = np.tanh(x @ params["first"] + params["bias"])
    return np.tanh(hidden @ params["second"]) @ params["last"]


def loss64(params, batches):
    """The mean loss of all batches, in float64."""
    return np.mean([np.mean((forward64(params, x) - y) ** 2) for x, y in batches])


def in64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def by_differences(fn, params, h=1e-5):
    """∂fn/∂m at m = 1 for each entry of each kernel, by central differences in float64."""
    found = {}
    for name in KERNELS:
        found[name] = np.zeros(params[name].shape)
        for i in np.ndindex(params[name].shape):
            values = []
            for m in (1 + h, 1 - h):
                moved = {**params, name: params[name].copy()}
                moved[name][i] *= m
                values.append(fn(moved))
            found[name][i] = (values[0] - values[1]) / (2 * h)
    return found


def assert_scores(scores, expected, rtol=1e-3):
    for name in KERNELS:
        scale = np.max(np.abs(expected[name]))
        np.testing.assert_allclose(scores[name], expected[name], rtol=rtol, atol=1e-5 * scale)


def test_snip_is_the_derivative_of_the_mean_loss_by_the_mask():
    params, batches = in64(mlp_params()), in64(mlp_batches(3))
    expected = by_differences(lambda p: loss64(p, batches), params)
    assert_scores(prune(dpai.SNIP(), batches=3).scores, jax.tree.map(np.abs, expected))


def test_grasp_is_the_weight_times_hessian_times_gradient():
    """With the whole Hessian, of float64 differences of differences."""
    params, batches = in64(mlp_params((5, 3, 2, 3))), in64(mlp_batches(2))
    shapes = [params[name].shape for name in KERNELS]
    ends = np.cumsum([np.prod(shape) for shape in shapes])

    def unflat(vector):
        parts = np.split(vector, ends[:-1])
        return {n: p.reshape(s) for n, p, s in zip(KERNELS, parts, shapes, strict=True)}

    def loss(vector):
        return loss64(params | unflat(vector), batches)

    theta = np.concatenate([params[name].ravel() for name in KERNELS])
    n, h = len(theta), 1e-3
    eye = np.eye(n) * h
    gradient = np.array([(loss(theta + e) - loss(theta - e)) / (2 * h) for e in eye])
    hessian = np.zeros((n, n))
    for i, j in itertools.combinations_with_replacement(range(n), 2):
        a, b = eye[i], eye[j]
        hessian[i, j] = hessian[j, i] = (
            loss(theta + a + b) - loss(theta + a - b) - loss(theta - a + b) + loss(theta - a - b)
        ) / (4 * h * h)
    expected = unflat(theta * (hessian @ gradient))
    result = prune(dpai.GraSP(), mlp_params((5, 3, 2, 3)), batches=2)
    for name in KERNELS:
        np.testing.assert_allclose(result.scores[name], expected[name], rtol=5e-3, atol=1e-4)
    assert any(np.any(np.asarray(result.scores[name]) < 0) for name in KERNELS)


@pytest.mark.parametrize("method", [dpai.IterativeSNIP(4), dpai.FORCE(4)])
def test_iterative_sensitivities_follow_their_schedule(method):
    """Written plainly: at each step the sensitivity of the masked network, by differences."""
    params, batches = in64(mlp_params()), in64(mlp_batches())
    size = sum(params[name].size for name in KERNELS)
    masks = {name: np.ones(params[name].shape, bool) for name in KERNELS}
    revive = isinstance(method, dpai.FORCE)
    came_back = False
    for t in range(1, 5):
        scores = {}
        for name in KERNELS:
            # The loss along one entry of the mask, wherever it stands.
            scores[name] = np.zeros(params[name].shape)
            for i in np.ndindex(params[name].shape):
                values = []
                for step in (1e-5, -1e-5):
                    moved = params | {k: params[k] * masks[k] for k in KERNELS}
                    moved[name] = moved[name].copy()
                    moved[name][i] += step * params[name][i]
                    values.append(loss64(moved, batches))
                scores[name][i] = abs(values[0] - values[1]) / 2e-5
        if not revive:
            scores = {k: np.where(masks[k], scores[k], -1.0) for k in KERNELS}
        keep = round(size * 0.2 ** (t / 4))
        flat = np.concatenate([scores[k].ravel() for k in KERNELS])
        threshold = np.sort(flat)[-keep]
        new = {k: scores[k] >= threshold for k in KERNELS}
        came_back |= any(np.any(new[k] & ~masks[k]) for k in KERNELS)
        masks = new
    result = prune(method, sparsity=0.8)
    for name in KERNELS:
        np.testing.assert_array_equal(result.masks[name], masks[name])
    assert came_back == revive
    np.testing.assert_array_equal(
        result.history["weights"], [round(size * 0.2 ** (t / 4)) for t in range(1, 5)]
    )


def test_synflow_is_the_sum_over_paths_of_the_products_of_magnitudes():
    params = mlp_params()
    result = prune(dpai.SynFlow(1))
    a, b, c = (np.abs(np.asarray(params[name], np.float64)) for name in KERNELS)
    expected = {name: np.zeros(params[name].shape) for name in KERNELS}
    total = 0.0
    for i, j, k, o in itertools.product(*map(range, (5, 7, 6, 3))):
        flow = a[i, j] * b[j, k] * c[k, o]
        total += flow
        expected["first"][i, j] += flow
        expected["second"][j, k] += flow
        expected["last"][k, o] += flow
    assert_scores(result.scores, {name: expected[name] / total for name in KERNELS}, rtol=1e-5)


def test_synflow_is_conserved():
    """What comes in goes out at every hidden unit, and every layer carries all of it."""
    scores = prune(dpai.SynFlow(1)).scores
    for into, outof in itertools.pairwise(KERNELS):
        np.testing.assert_allclose(scores[into].sum(0), scores[outof].sum(1), rtol=1e-5)
    for name in KERNELS:
        assert float(scores[name].sum()) == pytest.approx(1.0, rel=1e-5)


def test_synflow_of_fifty_layers_is_right_though_its_flow_overflows_float32():
    params = [draw((8, 8), i) for i in range(50)]

    def fn(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    result = dpai.prune(fn, params, jnp.ones((1, 8)), 0.1, method=dpai.SynFlow(1), progress=False)
    weights = [np.abs(np.asarray(w, np.float64)) for w in params]
    into, outof = [np.ones(8)], [np.ones(8)]
    for w in weights:
        into.append(into[-1] @ w)
    for w in reversed(weights):
        outof.append(w @ outof[-1])
    total = into[-1].sum()
    assert total > np.finfo(np.float32).max
    for i, (w, score) in enumerate(zip(weights, result.scores, strict=True)):
        expected = into[i][:, None] * w * outof[49 - i][None, :] / total
        np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_synflow_through_a_residual_convolutional_network_is_a_float64_forward():
    """|θ| in a network without biases, with ones at the input; the borders count."""
    params = {"stem": draw((3, 3, 1, 3), 0), "conv": draw((3, 3, 3, 3), 1), "head": draw((3, 2), 2)}

    def fn(params, x):
        def conv(x, w):
            return jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        x = jax.nn.relu(conv(x, params["stem"]))
        return (x + jax.nn.relu(conv(x, params["conv"]))).mean((1, 2)) @ params["head"]

    result = dpai.prune(
        fn, params, jnp.ones((1, 4, 4, 1)), 0.1, method=dpai.SynFlow(1), progress=False
    )

    def plain_conv(x, w):
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        return sum(
            padded[i : i + 4, j : j + 4] @ w[i, j] for i, j in itertools.product(range(3), range(3))
        )

    def flow(weights):
        x = plain_conv(np.ones((4, 4, 1)), weights["stem"])
        return ((x + plain_conv(x, weights["conv"])).sum((0, 1)) @ weights["head"]).sum()

    weights = jax.tree.map(lambda p: np.abs(np.asarray(p, np.float64)), params)
    for name, w in weights.items():
        for i in np.ndindex(w.shape):
            without = {**weights, name: w.copy()}
            without[name][i] = 0.0
            # R is linear in each weight, so what it loses is what passes.
            expected = 1 - flow(without) / flow(weights)
            assert float(result.scores[name][i]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_synflow_keeps_every_layer_where_one_step_would_empty_some():
    """The reason for its many steps: layers of many weights have small shares."""
    shapes = {"first": (5, 40), "second": (40, 40), "last": (40, 3)}
    params = {name: draw(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    params["bias"] = jnp.zeros(40)
    kept = [layer.weights for layer in prune(dpai.SynFlow(100), params, 0.99).topology.layers]
    assert min(kept) >= 1
    with pytest.warns(UserWarning, match="layer collapse"):
        collapsed = prune(dpai.SynFlow(1), params, 0.99).topology.collapsed
    assert collapsed


def test_magnitude_is_the_magnitude():
    params = mlp_params()
    result = prune(dpai.Magnitude(), sparsity=0.8)
    flat = np.concatenate([np.abs(params[name]).ravel() for name in KERNELS])
    threshold = np.sort(flat)[-round(0.2 * flat.size)]
    for name in KERNELS:
        np.testing.assert_array_equal(result.scores[name], np.abs(params[name]))
        np.testing.assert_array_equal(result.masks[name], np.abs(params[name]) >= threshold)


class Recorder:
    """A network that notes the values it is called with, outside of any trace."""

    def __init__(self):
        self.calls = []

    def __call__(self, params, x):
        jax.debug.callback(lambda p, x: self.calls.append((p, x)), params, x)
        return mlp(params, x)


def test_ntk_sap_is_its_definition_on_what_it_drew():
    """The draws are watched as the network is called; the score is found by differences."""
    network = Recorder()
    result = dpai.prune(network, mlp_params(), jnp.ones((4, 5)), 0.5, method=dpai.NTKSAP(1, 1e-2))
    jax.effects_barrier()
    (params, x), (moved, same_x) = network.calls[:2]
    np.testing.assert_array_equal(x, same_x)
    params, moved, x = in64(params), in64(moved), np.asarray(x, np.float64)
    if np.abs(params["first"]).sum() == np.abs(mlp_params()["first"]).sum():
        pytest.fail("the weights were not drawn anew")
    noise = np.concatenate([((moved[k] - params[k]) / 1e-2).ravel() for k in KERNELS])
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * noise.size))
    assert x.shape == (4, 5)
    assert x.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * x.size))

    def distance(masks):
        outputs = [forward64(p | {k: p[k] * masks[k] for k in KERNELS}, x) for p in (params, moved)]
        return np.sum((outputs[0] - outputs[1]) ** 2)

    ones = {k: np.ones(params[k].shape) for k in KERNELS}
    expected = by_differences(distance, ones)
    assert_scores(result.scores, jax.tree.map(np.abs, expected), rtol=1e-2)


def test_ntk_sap_draws_by_the_given_initialisation():
    drawn = []

    def init(key):
        drawn.append(key)
        return jax.tree.map(lambda p: 2 * p, mlp_params(seed=len(drawn)))

    network = Recorder()
    dpai.prune(network, mlp_params(), jnp.ones((4, 5)), 0.5, method=dpai.NTKSAP(2, init=init))
    jax.effects_barrier()
    assert len({tuple(jax.random.key_data(key).tolist()) for key in drawn}) == 2
    used = {float(params["first"].ravel()[0]) for params, _ in network.calls}
    assert used >= {float(2 * mlp_params(seed=s)["first"].ravel()[0]) for s in (1, 2)}


def test_ntk_sap_takes_the_spread_of_each_kernel_where_no_initialisation_is_given():
    params = {"first": 3 + draw((40, 50)), "last": 0.01 * draw((50, 40), 1)}
    network = Recorder()

    def fn(params, x):
        return network(params | {"second": jnp.eye(50), "bias": jnp.zeros(50)}, x)

    dpai.prune(fn, params, jnp.ones((2, 40)), 0.5, method=dpai.NTKSAP(1))
    jax.effects_barrier()
    drawn = network.calls[0][0]
    assert np.mean(drawn["first"]) == pytest.approx(3, abs=0.1)
    assert np.std(drawn["first"]) == pytest.approx(1, rel=0.1)
    assert np.std(drawn["last"]) == pytest.approx(0.01, rel=0.1)
    assert not np.any(drawn["first"] == params["first"])


def test_ntk_sap_refuses_token_ids():
    with pytest.raises(ValueError, match=r"x must be floating, as NTKSAP draws it, but is int"):
        dpai.prune(
            lambda params, x: jax.nn.one_hot(x, 5) @ params, draw((5, 4)),
            jnp.zeros((3,), jnp.int32), 0.5, method=dpai.NTKSAP(1),
        )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3])
def test_prospr_is_the_derivative_through_the_steps_of_training(steps):
    """Differences of the whole procedure in float64, its gradients written by hand."""
    batches = in64(mlp_batches(2))
    params = in64(mlp_params((5, 3, 2, 3)))

    def gradient(p, batch):
        x, y = batch
        hidden = np.tanh(x @ p["first"] + p["bias"])
        second = np.tanh(hidden @ p["second"])
        error = 2 * (second @ p["last"] - y) / y.size
        back = (error @ p["last"].T) * (1 - second**2)
        first = (back @ p["second"].T) * (1 - hidden**2)
        return {"first": x.T @ first, "second": hidden.T @ back, "last": second.T @ error,
                "bias": first.sum(0)}  # fmt: skip

    def after_training(p):
        for i in range(steps):
            slope = gradient(p, batches[i % 2])
            p = {name: p[name] - 0.2 * slope[name] for name in p}
        return loss64(p, [batches[steps % 2]])

    expected = by_differences(after_training, params)
    method = dpai.ProsPr(steps, learning_rate=0.2)
    result = prune(method, mlp_params((5, 3, 2, 3)), batches=2)
    assert_scores(result.scores, jax.tree.map(np.abs, expected))


def test_imp_is_its_rounds_run_by_hand():
    def train(params, masks):
        for batch in mlp_batches(3):
            slope = jax.grad(squared_error)(params, batch)
            params = jax.tree.map(
                lambda p, g, m: jnp.where(m, p - 0.3 * g, 0), params, slope, masks
            )
        return params

    start = mlp_params()
    masks = jax.tree.map(lambda p: np.ones(p.shape, bool), start)
    size = sum(start[name].size for name in KERNELS)
    for keep in (round(0.75 * size), round(0.75**2 * size), round(0.5 * size)):
        trained = train(jax.tree.map(lambda p, m: jnp.where(m, p, 0), start, masks), masks)
        flat = np.concatenate([np.where(masks[k], np.abs(trained[k]), -1).ravel() for k in KERNELS])
        threshold = np.sort(flat)[-keep]
        masks = masks | {k: masks[k] & (np.abs(trained[k]) >= threshold) for k in KERNELS}
    calls = []

    def noted(params, masks):
        calls.append(params)
        return train(params, masks)

    result = prune(dpai.IMP(noted, 0.25), sparsity=0.5)
    for name in KERNELS:
        np.testing.assert_array_equal(result.masks[name], masks[name])
    # Each round starts anew from what was given, rewound.
    for params in calls:
        kept = np.asarray(params["first"]) != 0
        np.testing.assert_array_equal(params["first"][kept], start["first"][kept])
    assert len(calls) == 3


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.2, 1), (0.36, 2), (0.4, 3), (0.95, 14)])
def test_imp_takes_as_many_rounds_as_it_needs(sparsity, rounds):
    calls = []

    def train(params, masks):
        calls.append(masks)
        return params

    prune(dpai.IMP(train), sparsity=sparsity)
    assert len(calls) == rounds


def test_shuffled_masks_have_the_same_densities_and_other_places():
    masks = prune(dpai.SNIP(), sparsity=0.8).masks
    moved = dpai.shuffled(masks, jax.random.key(0))
    again = dpai.shuffled(masks, jax.random.key(0))
    other = dpai.shuffled(masks, jax.random.key(1))
    for name in KERNELS:
        assert moved[name].sum() == masks[name].sum()
        assert moved[name].dtype == bool
        np.testing.assert_array_equal(moved[name], again[name])
    assert any(np.any(moved[name] != masks[name]) for name in KERNELS)
    assert any(np.any(moved[name] != other[name]) for name in KERNELS)
    assert moved["bias"]
    # Each place is as likely as any other.
    mask = {"w": jnp.arange(12).reshape(3, 4) < 3}
    keys = jax.random.split(jax.random.key(2), 2000)
    mean = np.mean(jax.vmap(lambda key: dpai.shuffled(mask, key)["w"])(keys), axis=0)
    np.testing.assert_allclose(mean, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 2000))


def test_problems_of_these_tests_have_a_gradient_everywhere():
    scores = prune(dpai.SNIP()).scores
    assert all(np.min(scores[name]) > 0 for name in KERNELS)
    assert problems.linen().size == 18 * 6 + 36 * 9 + 18
