"""How long a user waits: the first call in a process, a full disk cache, and many calls at once."""

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dpai_jax as dpai
from dpai_jax.tools import host
from experiments.benchmarks import clock, networks
from experiments.benchmarks.networks import Network
from experiments.benchmarks.rows import OPTIMIZER, Jobs, Row, isolated

REPEATS = 5
"""In how many processes to time each first call."""

FEW_REPEATS = 3
"""The same for tables with many calls."""


def cold() -> Jobs:
    """The first call of `dpai_jax.prune` in a process, and those after it."""
    for network in networks.COLD:
        yield network.title, functools.partial(_cold, network)


def rivals() -> Jobs:
    """The first call of each method, of `repair` and of `topology`."""
    for network in networks.RIVALS:
        for name in CALLS:
            title = f"{network.title}, {name}"
            yield title, functools.partial(_rival, network, name)


def growth() -> Jobs:
    """The first call against the number of layers."""
    for network in networks.GROWTH:
        yield network.title, functools.partial(_growth, network)


def many() -> Jobs:
    """Prunings, training steps and the steps of an epoch, in one program and one by one."""
    yield "prune_many", functools.partial(isolated, _many, networks.STEP[0])
    dense = networks.COPIES[0]
    yield f"an epoch of {dense.title}", functools.partial(isolated, _epoch, dense)
    for network in networks.COPIES:
        yield network.title, functools.partial(isolated, _copies, network)


def _cold(network: Network) -> Row:
    calls = [isolated(_first_calls, network) for _ in range(REPEATS)]
    with tempfile.TemporaryDirectory() as folder:
        isolated(_first_calls, network, folder)
        cached = [isolated(_first_calls, network, folder) for _ in range(REPEATS)]
    row: Row = {name: clock.spread([call[name] for call in calls]) for name in calls[0]}
    row["disk"] = clock.spread([call["first"] for call in cached])
    if max(network.shape) <= 32:
        steps = [isolated(_compiled_training_step, network) for _ in range(REPEATS)]
        row["training"] = clock.spread(steps)
    return row


def _first_calls(network: Network, folder: str | None = None) -> dict[str, float]:
    """The seconds of a process's first two calls, and of later ones once all is compiled."""
    if folder is not None:
        dpai.cache(folder)
    fn, params, x = network.problem()
    first, second = _seconds(fn, params, x, 0.9, 0), _seconds(fn, params, x, 0.95, 1)
    with host.compiled_only():
        _seconds(fn, params, x, 0.9, 2)
        again = _seconds(fn, params, x, 0.95, 3)
        anew = _seconds(functools.partial(_called, fn), params, x, 0.9, 4)
    return {"first": first, "second": second, "again": again, "anew": anew}


def _first_call(network: Network) -> float:
    """The seconds of a process's first call."""
    return _seconds(*network.problem(), 0.9, 0)


def _seconds(fn: Callable[..., Any], params: Any, x: Any, sparsity: float, seed: int) -> float:
    key = jax.block_until_ready(jax.random.key(seed))
    start = time.perf_counter()
    dpai.prune(fn, params, x, sparsity, key=key, progress=False)
    return time.perf_counter() - start


def _called(fn: Callable[..., Any], params: Any, x: Any) -> Any:
    return fn(params, x)


def _compiled_training_step(network: Network, batch: int = 128) -> float:
    """The seconds to compile a jitted training step of the network."""
    from experiments import models, steps

    model = models.create(network.model, network.classes, network.width)
    shape = jax.ShapeDtypeStruct((1, *network.shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), shape)
    masks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, bool), variables["params"])
    optimizer = steps.Optimizer(**OPTIMIZER)
    state = jax.eval_shape(functools.partial(steps.start, optimizer), variables, masks)
    images = jax.ShapeDtypeStruct((batch, *network.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    start = time.perf_counter()
    jax.jit(functools.partial(steps._step, model, optimizer)).lower(state, images, labels).compile()
    return time.perf_counter() - start


def _loss(fn: Callable[..., jax.Array], params: Any, batch: Any) -> jax.Array:
    from experiments import steps

    images, labels = batch
    return steps.cross_entropy(fn(params, images), labels)


def _prune(method: Any, fn: Any, params: Any, x: Any, data: Any) -> None:
    dpai.prune(fn, params, x, 0.9, method=method, progress=False, **data)


def _repair(fn: Any, params: Any, x: Any, _: Any) -> None:
    net = dpai.trace(fn, params, x)
    masks = dpai.binarize(net.tree(net.leaves(params), lambda: 0.0), dpai.erk(net, 0.99))
    dpai.repair(net, masks, params, key=jax.random.key(0))


def _topology(fn: Any, params: Any, x: Any, _: Any) -> None:
    net = dpai.trace(fn, params, x)
    dpai.topology(net, jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params))


CALLS: Mapping[str, Callable[..., None]] = {
    "DPaI": functools.partial(_prune, dpai.DPaI()),
    "SynFlow": functools.partial(_prune, dpai.SynFlow()),
    "SNIP": functools.partial(_prune, dpai.SNIP()),
    "GraSP": functools.partial(_prune, dpai.GraSP()),
    "PHEW": functools.partial(_prune, dpai.PHEW()),
    "NPB": functools.partial(_prune, dpai.NPB()),
    "repair": _repair,
    "topology": _topology,
}


def _rival(network: Network, name: str) -> Row:
    seconds = [isolated(_first_of, network, name) for _ in range(FEW_REPEATS)]
    return {"network": network.title, "call": name, "seconds": clock.spread(seconds)}


def _first_of(network: Network, name: str) -> float:
    """The seconds of a process's first call of a method."""
    (fn, params, x), rng = network.problem(), np.random.default_rng(0)
    images = rng.standard_normal((32, *network.shape)).astype(np.float32)
    batch = images, rng.integers(0, network.classes, 32)
    data = {"loss_fn": functools.partial(_loss, fn), "batches": [batch]}
    data = data if name in ("SNIP", "GraSP") else {}
    start = time.perf_counter()
    CALLS[name](fn, params, x, data)
    return time.perf_counter() - start


def _growth(network: Network) -> Row:
    seconds = [isolated(_first_call, network) for _ in range(FEW_REPEATS)]
    family = "ResNet" if len(network.shape) == 3 else "decoder"
    return {"family": family, "depth": network.depth, "seconds": clock.spread(seconds)}


@host.compiled_only()
def _many(network: Network, number: int = 16) -> Row:
    fn, params, x = network.problem()
    methods = [dpai.DPaI(alpha=i / number) for i in range(number)]

    def together() -> list[dpai.Result]:
        return dpai.prune_many(fn, params, x, 0.9, method=methods)

    def one_by_one() -> list[dpai.Result]:
        return [dpai.prune(fn, params, x, 0.9, method=m, progress=False) for m in methods]

    for a, b in zip(together(), one_by_one(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.masks, b.masks)
    return {
        "number": number,
        "together": clock.call_seconds(lambda: together()[-1].masks),
        "one_by_one": clock.call_seconds(lambda: one_by_one()[-1].masks),
    }


def _copies(network: Network, number: int = 8, batch: int = 128) -> Row:
    """A training step of several masked copies of a network, in one program and one by one."""
    from experiments import models, steps

    model = models.create(network.model, network.classes, network.width)
    optimizer = steps.Optimizer(**OPTIMIZER)
    rng = np.random.default_rng(0)

    def state(seed: int) -> Any:
        variables = steps.initialize(model, seed, network.shape)
        masks = jax.tree.map(lambda leaf: rng.random(leaf.shape) < 0.1, variables["params"])
        return steps.start(optimizer, variables, masks)

    states = [state(seed) for seed in range(number)]
    images = rng.standard_normal((number, batch, *network.shape)).astype(np.float32)
    labels = rng.integers(0, network.classes, (number, batch))
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
    step = jax.jit(jax.vmap(functools.partial(steps._step, model, optimizer)))

    def one_by_one() -> list[Any]:
        pairs = zip(states, images, labels, strict=True)
        return [steps.train_step(model, optimizer, s, x, y)[1] for s, x, y in pairs]

    return {
        "number": number,
        "together": clock.call_seconds(lambda: step(stacked, images, labels)[1]),
        "one_by_one": clock.call_seconds(one_by_one),
    }


def _epoch(network: Network, number: int = 100, batch: int = 128) -> Row:
    """The steps of an epoch, in one program and one by one."""
    from experiments import datasets, models, steps

    model = models.create(network.model, network.classes, network.width)
    optimizer = steps.Optimizer(**OPTIMIZER)
    variables = steps.initialize(model, 0, network.shape)
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), variables["params"])
    state = steps.start(optimizer, variables, masks)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((number * batch, *network.shape)).astype(np.float32)
    labels = rng.integers(0, network.classes, number * batch).astype(np.int32)
    split = datasets.Split(images, labels)
    data = datasets.Dataset("random", split, split, split, network.classes, "none", None)
    feed = datasets.feed(data, split, batch)
    assert isinstance(feed, datasets.Resident)

    def one_by_one() -> Any:
        after, metrics = state, []
        for x, y in feed.epoch(0):
            after, measured = steps.train_step(model, optimizer, after, x, y)
            metrics.append(measured)
        return metrics

    return {
        "number": number,
        "together": clock.call_seconds(
            lambda: steps.train_epoch(model, optimizer, state, *feed.epoch_inside(0))[1]
        ),
        "one_by_one": clock.call_seconds(one_by_one),
    }
