"""Threads that hand programs to the CPU side by side, and prunings that go through them."""

import collections
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpai_jax as dpai
from dpai_jax.tools import host, lanes, meshes
from dpai_jax.tools.switches import usual_switches
from tests.support.recorded import plain
from tests.support.results import assert_same

# Any other promotion would be a switch of this thread alone.
pytestmark = pytest.mark.standard_promotion

SHAPES = {"first": (12, 32), "second": (32, 32), "out": (32, 4)}


def network(width=0, seed=0):
    """A network; one of another width has programs of its own."""
    rng = np.random.default_rng(seed)
    shapes = SHAPES | {"second": (32, 32 + width), "out": (32 + width, 4)}
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}

    def fn(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["first"]) @ params["second"]) @ params["out"]

    return fn, params, jnp.ones((1, 12))


@pytest.fixture
def two_lanes(monkeypatch):
    """As on a CPU of one device with two cores, and within `prune`."""
    monkeypatch.setattr(lanes, "_most", lambda: 2)
    monkeypatch.setattr(meshes, "_shares", lambda _: None)
    with usual_switches():
        yield


@pytest.fixture
def threads(monkeypatch):
    """For each program the threads that called it, and how often."""
    seen = collections.defaultdict(collections.Counter)
    call = meshes.Program.__call__

    def noting(self, *args, **settings):
        seen[self.__name__][threading.get_ident()] += 1
        return call(self, *args, **settings)

    monkeypatch.setattr(meshes.Program, "__call__", noting)
    return seen


def test_shares_keep_the_order_and_may_have_to_be_of_one_size(two_lanes):
    for of_one_size in (False, True):
        assert lanes.shares_of(range(6), of_one_size=of_one_size) == [range(3), range(3, 6)]
        assert lanes.shares_of("a", of_one_size=of_one_size) == ["a"]
    assert lanes.shares_of(range(5)) == [range(2), range(2, 5)]
    assert lanes.shares_of(range(5), of_one_size=True) == [range(5)]


def test_each_share_has_a_thread_and_the_first_this_one(two_lanes):
    at_once = threading.Barrier(2, timeout=30)  # neither waits for the other to end

    def run(share):
        at_once.wait()
        return share, threading.get_ident()

    (first, own), (second, other) = lanes.side_by_side(run, ["a", "b"])
    assert (first, second) == ("a", "b")
    assert own == threading.get_ident() != other


def test_a_thread_has_the_switches_of_a_call_of_prune(two_lanes):
    def run(_):
        return jax.config.jax_disable_jit, jax.config.jax_debug_infs

    jax.config.update("jax_debug_infs", True)  # of all threads
    try:
        assert lanes.side_by_side(run, [0, 1])[1] == (False, False)
    finally:
        jax.config.update("jax_debug_infs", False)


@pytest.mark.parametrize("place", [0, 1])
def test_an_error_of_any_thread_is_raised(two_lanes, place):
    def run(share):
        if share == place:
            raise ValueError(f"of {share}")
        return share

    with pytest.raises(ValueError, match=f"of {place}"):
        lanes.side_by_side(run, [0, 1])


@pytest.mark.parametrize(
    "switch",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.debug_nans(True),
        lambda: jax.default_device(jax.devices()[1]),
        lambda: jax.set_mesh(jax.make_mesh((8,), ("data",))),
    ],
    ids=["x64", "debug_nans", "default_device", "mesh"],
)
def test_switches_of_this_thread_alone_leave_no_second_one(two_lanes, switch):
    with switch():
        assert lanes.shares_of(range(6)) == [range(6)]
    assert len(lanes.shares_of(range(6))) == 2


def test_several_devices_share_the_runs_themselves():
    assert jax.local_device_count() == 8
    assert lanes.shares_of(range(6)) == [range(6)]


@pytest.mark.parametrize(
    "make",
    [dpai.DPaI, lambda **of: plain(steps=12, **of), lambda **of: plain(allocation=dpai.erk, **of)],
    ids=["default", "plain ascent", "by layer"],
)
def test_masks_of_two_threads_are_those_of_single_calls(two_lanes, threads, make):
    net = network()
    keys = jax.random.split(jax.random.key(3), 6)
    sparsities = np.linspace(0.5, 0.97, 6).tolist()
    methods = [make(alpha=alpha) for alpha in np.linspace(0, 1, 6)]
    many = dpai.prune_many(*net, sparsities, method=methods, key=keys)
    for program in ("_ascend_many", "_one_of", "_count_layers"):
        assert len(threads[program]) == 2
    assert set(threads["_count_layers"].values()) == {3}
    triples = zip(sparsities, methods, keys, strict=True)
    singles = [dpai.prune(*net, s, method=m, key=k, progress=False) for s, m, k in triples]
    assert_same(many, singles)


@pytest.fixture
def logged(caplog):
    """What JAX logs of what all threads compile."""
    jax.config.update("jax_log_compiles", True)
    yield caplog
    jax.config.update("jax_log_compiles", False)


def test_two_threads_compile_each_program_once(two_lanes, logged):
    net = network(width=5)
    with host.compiled_only():
        dpai.prune_many(*net, 0.8, method=[dpai.DPaI(alpha=a / 4) for a in range(4)])
    lowered = re.findall(r"Finished jaxpr to MLIR module conversion jit\((_\w+)\)", logged.text)
    for program in ("_ascend_many", "_one_of", "_count_layers"):
        assert lowered.count(program) == 1


def test_progress_is_the_mean_over_both_threads(two_lanes):
    net, shown = network(), []
    methods = [dpai.DPaI(alpha=a / 4, steps=23) for a in range(4)]
    many = dpai.prune_many(*net, 0.8, method=methods, progress=lambda *args: shown.append(args))
    assert [step for step, _, _ in shown] == [1, 11, 21, 23]
    for step, steps, numbers in shown:
        assert steps == 23
        for name, number in numbers.items():
            expected = np.mean([result.history[name][step - 1] for result in many])
            np.testing.assert_allclose(number, expected, rtol=1e-6)


def test_scores_that_diverge_are_refused(two_lanes):
    methods = [plain(optimizer=optax.sgd(np.inf), alpha=a, steps=2) for a in (0.1, 0.2)]
    with pytest.raises(ValueError, match=r"scores of method must be numbers, but .* has a NaN"):
        dpai.prune_many(*network(), 0.8, method=methods)
