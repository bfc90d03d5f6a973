"""Many prunings in one call: the masks of as many calls of prune, in one program."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpai_jax as dpai
from tests.support.recorded import plain
from tests.support.results import assert_same


def fn(params, x):
    h = jax.nn.relu(x @ params["first"])
    for i in range(2):
        h = h + jax.nn.relu(h @ params["stack"][i])
    return h @ params["out"]


_RNG = np.random.default_rng(0)
SHAPES = {"first": (12, 32), "stack": (2, 32, 32), "out": (32, 4), "scale": (3,)}
PARAMS = {name: jnp.asarray(_RNG.normal(size=s), jnp.float32) for name, s in SHAPES.items()}
X = jnp.ones((1, 12))


@pytest.fixture
def together(monkeypatch):
    """The numbers of problems that ran in one program."""
    numbers = []
    run_many = dpai.DPaI.run_many

    def counting(methods, problems):
        numbers.append(len(problems))
        return run_many(methods, problems)

    monkeypatch.setattr(dpai.DPaI, "run_many", staticmethod(counting))
    return numbers


@pytest.mark.parametrize("number", [3, 8], ids=["on one device", "on eight"])
@pytest.mark.parametrize("repair", [False, True], ids=["default", "plain ascent, repaired"])
def test_many_masks_are_those_of_single_calls(together, number, repair):
    make = functools.partial(plain, steps=12) if repair else dpai.DPaI
    keys = jax.random.split(jax.random.key(3), number)
    sparsities = np.linspace(0.5, 0.97, number).tolist()
    methods = [make(alpha=a, beta=b) for a, b in np.random.default_rng(0).random((number, 2))]
    prune = functools.partial(dpai.prune, fn, PARAMS, X, repair=repair, progress=False)
    many = dpai.prune_many(fn, PARAMS, X, sparsities, method=methods, key=keys, repair=repair)
    triples = zip(sparsities, methods, keys, strict=True)
    singles = [prune(s, method=m, key=k) for s, m, k in triples]
    assert_same(many, singles)
    assert together == [number]
    # Each has a history of its own.
    assert len({tuple(single.history["log_paths"]) for single in singles}) > 1
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(many[0].masks))


def test_only_what_one_program_can_run_runs_together(together):
    methods = [
        dpai.DPaI(),
        plain(beta=0.2, steps=3),
        dpai.DPaI(alpha=0.5),
        plain(beta=0.8, steps=3),
        # XLA rounds what is divided by a number of steps as one number otherwise.
        dpai.DPaI(optimizer=optax.adam(0.1)),
        dpai.DPaI(optimizer=optax.adam(0.1), alpha=0.5),
        dpai.SynFlow(),
        dpai.DPaI(scores=PARAMS),
    ]
    many = dpai.prune_many(fn, PARAMS, X, 0.8, method=methods, key=jax.random.key(1))
    assert sorted(together) == [2, 2]
    singles = [
        dpai.prune(fn, PARAMS, X, 0.8, method=m, key=jax.random.key(1), progress=False)
        for m in methods
    ]
    assert_same(many, singles)


@pytest.mark.skipif(
    "use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""),
    reason="XLA's older code generator rounds tanh otherwise for one problem than for many",
)
def test_soft_indicators_run_together_too(together):
    methods = [plain(gamma=gamma, steps=3) for gamma in (5.0, 50.0)]
    many = dpai.prune_many(fn, PARAMS, X, 0.8, method=methods, key=jax.random.key(1))
    singles = [
        dpai.prune(fn, PARAMS, X, 0.8, method=m, key=jax.random.key(1), progress=False)
        for m in methods
    ]
    assert_same(many, singles)
    assert together == [2]


def test_one_threshold_and_momentum_run_together_too(together):
    momentum = optax.sgd(0.01, momentum=0.9)
    method = plain(allocation=dpai.global_threshold, optimizer=momentum, steps=25)
    keys = list(jax.random.split(jax.random.key(5), 3))
    many = dpai.prune_many(fn, PARAMS, X, 0.8, method=method, key=keys)
    singles = [dpai.prune(fn, PARAMS, X, 0.8, method=method, key=k, progress=False) for k in keys]
    assert_same(many, singles)
    assert together == [3]


def test_another_batch_compiles_nothing():
    first = dpai.prune_many(fn, PARAMS, X, 0.8, key=list(jax.random.split(jax.random.key(0), 3)))

    def compiled():
        programs = first[0].net.programs.values()
        return sum(p.jitted._cache_size() for p in programs if hasattr(p, "jitted"))

    before = compiled()
    dpai.prune_many(
        fn, PARAMS, X, [0.5, 0.7, 0.9], method=dpai.DPaI(alpha=0.3), key=jax.random.key(9)
    )
    assert compiled() == before > 0


def test_batches_of_an_iterator_serve_all():
    def loss_fn(params, batch):
        return jnp.mean(fn(params, batch) ** 2)

    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((5, 12)).astype(np.float32) for _ in range(2)]
    given = {"loss_fn": loss_fn, "method": dpai.SNIP()}
    many = dpai.prune_many(fn, PARAMS, X, [0.5, 0.8], batches=iter(batches), **given)
    singles = [
        dpai.prune(fn, PARAMS, X, s, batches=batches, progress=False, **given) for s in (0.5, 0.8)
    ]
    assert_same(many, singles)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": [0.5, 0.6], "key": [jax.random.key(0)] * 3}, "one length, got 2 of sparsity"),
        ({"sparsity": [0.5, 1.5]}, "sparsity must be"),
        ({"sparsity": 0.5, "method": [dpai.DPaI]}, "method must be an instance"),
        ({"sparsity": 0.5, "key": [1, 2]}, "key must be one random key"),
    ],
)
def test_wrong_sequences_are_refused(given, message):
    sparsity = given.pop("sparsity")
    with pytest.raises((TypeError, ValueError), match=message):
        dpai.prune_many(fn, PARAMS, X, sparsity, **given)
