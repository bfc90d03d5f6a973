"""Networks of repeated blocks: counted block by block, by few programs, as without any cuts."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import dpai_jax as dpai
from dpai_jax import counts
from dpai_jax.methods import folded
from dpai_jax.paths import network
from dpai_jax.paths.counting import EXACT, MEAN_FIELD, REACH
from dpai_jax.tools import host
from tests.support.meshes import mesh_of

WIDTH = 6
COUNTINGS = (EXACT, MEAN_FIELD, REACH)


def normalised(x, scale):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * scale


def chained(x, p, _):
    return jax.nn.relu(normalised(x, p["scale"]) @ p["in"])


def residual(x, p, _):
    return x + jax.nn.relu(normalised(x, p["scale"]) @ p["in"]) @ p["out"]


def mixing(x, p, _):
    """Tokens that read from all others, as in attention without a softmax."""
    y = normalised(x, p["scale"]) @ p["in"]
    return x + jax.nn.relu(y).sum(0, keepdims=True) @ p["out"]


def switched(x, p, number):
    """The third block multiplies by zero what the others multiply by one."""
    constant = 0.0 if number == 2 else 1.0
    return x + (jax.nn.relu(normalised(x, p["scale"]) @ p["in"]) * constant) @ p["out"]


def blocks_of(block, depth, token=False):
    """A network of blocks, and its parameters."""
    drawn = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(drawn.uniform(0.1, 1.0, shape), jnp.float32)

    shapes = {"scale": (1, WIDTH), "in": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
    params = {
        f"block{i}": {name: draw(*shape) for name, shape in shapes.items()} for i in range(depth)
    }
    params |= {"first": draw(4, WIDTH), "last": draw(WIDTH, 3)}
    if token:
        params["token"] = draw(1, WIDTH)

    def fn(params, x):
        x = x @ params["first"]
        if token:
            x = jnp.concatenate([params["token"], x])
        for i in range(depth):
            x = block(x, params[f"block{i}"], i)
        return (x[:1] if token else x) @ params["last"]

    return fn, params, jnp.ones((2, 4))


CASES = {
    "plain": (chained, 5, False),
    "residual": (residual, 4, False),
    "token": (mixing, 4, True),
    "switched": (switched, 6, False),
}


@pytest.fixture(autouse=True)
def traced_anew():
    """No test meets a network that another has left whole."""
    dpai.paths.network._network.cache_clear()


def whole(monkeypatch, *case):
    """The same network, which is not cut."""
    monkeypatch.setattr(network, "_SHARE", 0)
    dpai.paths.network._network.cache_clear()
    net = dpai.trace(*blocks_of(*case))
    assert not net.chain(EXACT)
    return net


def sparse_masks(net):
    drawn = np.random.default_rng(0)
    return [(drawn.random(layer.shape) < 0.4) for layer in net.layers]


@pytest.mark.parametrize("name", CASES)
def test_blocks_count_and_reach_as_the_network_without_cuts(name, monkeypatch):
    net = dpai.trace(*blocks_of(*CASES[name]))
    masks = sparse_masks(net)
    assert net.chain(REACH)
    found = counts.reached(net, masks), *(counts.counted(net, masks, c) for c in counts.COUNTINGS)
    net = whole(monkeypatch, *CASES[name])
    expected = (
        counts.reached(net, masks),
        *(counts.counted(net, masks, c) for c in counts.COUNTINGS),
    )
    for mine, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_array_equal(mine, other)
    assert any(r.any() for r in found[0])
    assert not all(r.all() for r in found[0])
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_get_the_same_are_asked_once_what_is_possible(name, monkeypatch):
    ran = []
    pulled = counts._reached_behind

    def counting(*args, stage, **settings):
        ran.append(stage)
        return pulled(*args, stage=stage, **settings)

    monkeypatch.setattr(counts, "_reached_behind", counting)
    net = dpai.trace(*blocks_of(*CASES[name]))
    found = counts.possible(net)
    stages = [call.stage for call in net.chain(REACH)]
    (block,) = {stage for stage in stages if stages.count(stage) > 2}
    # The last may get something else; and what only the first token gives is not the same twice.
    assert (ran.count(block) <= 2) == (name != "token")
    net = whole(monkeypatch, *CASES[name])
    for mine, other in zip(found, counts.possible(net), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", CASES)
def test_eight_blocks_need_no_more_programs_than_four(name):
    block, _, token = CASES[name]
    for counting in COUNTINGS:
        stages = [
            len(
                {call.stage for call in dpai.trace(*blocks_of(block, depth, token)).chain(counting)}
            )
            for depth in (4, 8)
        ]
        if name == "switched":  # with four blocks, only the last repeats none before
            continue
        assert stages[0] == stages[1] <= 4


def test_a_block_that_differs_in_a_constant_is_a_stage_of_its_own():
    net = dpai.trace(*blocks_of(*CASES["switched"]))
    slots = {layer.name: i for i, layer in enumerate(net.layers)}
    stages = [
        next(call.stage for call in net.chain(MEAN_FIELD) if slots[f"block{i}/in"] in call.inputs)
        for i in range(6)
    ]
    assert [stage == stages[0] for stage in stages] == [True, True, False, True, True, True]


@pytest.mark.parametrize(
    ("optimizer", "is_tied"),
    [(None, False), (None, True), (optax.adam(0.01), False)],
    ids=["default", "tied", "adam"],
)
def test_pruning_block_by_block_gives_the_masks_of_one_program(optimizer, is_tied, monkeypatch):
    case = residual, 4
    network = tied(*blocks_of(*case)) if is_tied else blocks_of(*case)
    method = dpai.DPaI(steps=4, optimizer=optimizer)
    # A program writes the gradient of the tied kernel where that of the step before was.
    with host.compiled_only() if is_tied else contextlib.nullcontext():
        found = dpai.prune(*network, 0.6, method=method)
    programs = {key[0].__name__ for key in found.net.programs if type(key) is tuple}
    assert "_step_behind" in programs
    assert "take_step" not in programs
    whole(monkeypatch, *case)
    expected = dpai.prune(*network, 0.6, method=method)
    jax.tree.map(np.testing.assert_array_equal, found.masks, expected.masks)
    for name in ("nodes", "kernels"):
        np.testing.assert_array_equal(found.history[name], expected.history[name])
    np.testing.assert_allclose(found.history["log_paths"], expected.history["log_paths"], rtol=1e-6)
    assert found.topology == expected.topology


def tied(fn, params, x):
    """The network of blocks with one kernel at the end of all blocks."""

    def shared(params, x):
        out = params["block0"]["out"]
        blocks = {f"block{i}": params[f"block{i}"] | {"out": out} for i in range(4)}
        return fn(params | blocks, x)

    return shared, params, x


@pytest.mark.parametrize("case", [*CASES, "tied"])
@pytest.mark.filterwarnings("ignore:all saliencies are 0 in block2", "ignore:no path passes block2")
def test_synflow_block_by_block_gives_the_flow_of_one_program(case, monkeypatch):
    def problem():
        return tied(*blocks_of(residual, 4)) if case == "tied" else blocks_of(*CASES[case])

    method = dpai.SynFlow(steps=3)
    found = dpai.prune(*problem(), 0.6, method=method)
    programs = {key[0].__name__ for key in found.net.programs if type(key) is tuple}
    assert "_flow_behind" in programs
    assert "_flow_at_once" not in programs
    monkeypatch.setattr(network, "_SHARE", 0)
    dpai.paths.network._network.cache_clear()
    expected = dpai.prune(*problem(), 0.6, method=method)
    assert not expected.net.chain(EXACT)
    jax.tree.map(np.testing.assert_array_equal, found.masks, expected.masks)
    for mine, other in zip(*map(jax.tree.leaves, (found.scores, expected.scores)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5)


def test_pruning_on_two_devices_gives_the_masks_of_one():
    fn, params, x = blocks_of(*CASES["residual"])
    method = dpai.DPaI(steps=2)
    alone = dpai.prune(fn, params, x, 0.6, method=method)
    mesh = mesh_of(2)
    split = NamedSharding(mesh, PartitionSpec(None, *mesh.axis_names))
    spread = jax.tree.map(lambda p: jax.device_put(p, split) if p.shape[-1] % 2 == 0 else p, params)
    found = dpai.prune(fn, spread, x, 0.6, method=method)
    assert found.masks["block0"]["in"].sharding.is_equivalent_to(split, 2)
    jax.tree.map(np.testing.assert_array_equal, found.masks, alone.masks)


def test_an_optimizer_of_all_layers_together_takes_its_step_in_one_program():
    assert folded.goes_by_array(optax.sgd(0.1))
    assert folded.goes_by_array(optax.adam(0.1))
    assert not folded.goes_by_array(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)))


def test_a_count_of_blocks_can_be_jitted_and_differentiated():
    fn, params, x = blocks_of(*CASES["residual"])
    net = dpai.trace(fn, params, x)

    def log_paths(masks):
        return dpai.log_paths(net, masks)

    eager = log_paths(params)
    compiled, gradient = jax.jit(jax.value_and_grad(log_paths))(params)
    np.testing.assert_allclose(compiled, eager, rtol=1e-6)
    # All paths pass the first layer once.
    np.testing.assert_allclose(jnp.sum(gradient["first"] * params["first"]), 1.0, rtol=1e-5)
