"""The rows of the benchmarks' tables. Each table is a function that yields a call for each row.

A row is a dict of plain numbers. It is appended to a store as soon as it is measured, and measured
again only if the code or the call has changed.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

import dpai_jax as dpai
from dpai_jax.tools import host
from dpai_jax.tools.settings import described
from experiments import provenance
from experiments.benchmarks import clock, networks
from experiments.benchmarks.networks import Network
from experiments.store import Store

Row = dict[str, Any]
Jobs = Iterator[tuple[str, Callable[[], Row]]]
"""A title for each row, and the call that measures it."""

ADAM = dpai.DPaI.published(counting="mean_field")
"""DPaI with the published code's optimizer."""

TIMED = {"default": (dpai.DPaI(), 14), "adam": (ADAM, 26)}
"""The methods whose steps are timed, and the bytes that a step must move for each weight: the mask,
the score, read and written as float32, and likewise the strength or Adam's two moments."""

OPTIMIZER: Mapping[str, Any] = {
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "warmup_steps": 0,
    "steps": 1000,
}
"""The optimizer of timed training steps: arguments of `experiments.steps.Optimizer`."""

PUBLISHED = {"resnet20": 0.044, "resnet18": 1.7, "vgg19": 2.8}
"""Seconds of a step of the published PyTorch code on two such cores."""


STEP_PROCESSES = 3
"""In how many processes to time a step: where memory comes to lie makes one half as fast again."""


def step(python: str | None) -> Jobs:
    """The time of a step of DPaI, of a plain PyTorch implementation, and of moving the memory."""
    for network in networks.STEP:
        yield network.title, functools.partial(_steps, network, python)


def large() -> Jobs:
    """The time and the memory of pruning large networks with the defaults.

    Once in a new process, and again with another key, when everything is compiled.
    """
    for network in networks.LARGE:
        yield network.title, functools.partial(isolated, _large, network)


def training(python: str | None) -> Jobs:
    """The time of a training step of ResNet-20, batch 128, and of the same in PyTorch."""
    network = networks.STEP[0]
    yield network.title, functools.partial(_trainings, network, python)


def quality(seeds: int) -> Jobs:
    """The exact objectives of masks that were optimised in the mean field."""
    for network in networks.QUALITY:
        for sparsity in networks.SPARSITIES:
            for seed in range(seeds):
                title = f"{network.title}, {sparsity:.2%}, seed {seed}"
                yield title, functools.partial(_quality, network, sparsity, seed)


METHODS: Mapping[str, dpai.DPaI] = {
    "published": dpai.DPaI.published(),
    "published, 300 steps of Adam .05": dpai.DPaI.published(steps=300, optimizer=optax.adam(0.05)),
    "default": dpai.DPaI(),
    "paths alone": dpai.DPaI(alpha=0.0),
    "α = 0.5": dpai.DPaI(alpha=0.5),
    "100 steps": dpai.DPaI(steps=100),
    "strength one": dpai.DPaI(strength="one"),
    "strength square": dpai.DPaI(strength="square"),
}
"""Settings of DPaI that are compared; the first is the published one."""


def settings(seeds: int) -> Jobs:
    """The objectives that settings other than the published ones reach, in a tenth of the steps."""
    for network in networks.SETTINGS:
        for sparsity in networks.SPARSITIES:
            for name, method in METHODS.items():
                for seed in range(seeds):
                    title = f"{network.title}, {sparsity:.2%}, {name}, seed {seed}"
                    yield (
                        title,
                        functools.partial(_settings, network, sparsity, name, method, seed),
                    )


def measure(table: str, rows: Jobs, store: Store) -> Iterator[Row]:
    """Yields a table's rows; measures those that are not in the store, and adds them to it."""
    for title, run in rows:
        # A row is identified by the call with its arguments, and by the code.
        what = {
            "table": table,
            "title": title,
            "call": described(run),
            "code": provenance.code(),
        }
        yield store.find(what) or store.append(what | run() | provenance.origin())


def isolated(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a new process, whose memory nothing else has used."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def _steps(network: Network, python: str | None) -> Row:
    row: Row = {name: _median_process(network, name) for name in TIMED}
    if python is not None:
        row["peer"] = _peer(python, "prune", network, "--sparsity", "0.9")
    return row


def _median_process(network: Network, name: str) -> Row:
    rows: list[Row] = [isolated(_step, network, name) for _ in range(STEP_PROCESSES)]
    return sorted(rows, key=lambda row: row["seconds"]["median"])[len(rows) // 2]


@host.compiled_only()
def _step(network: Network, name: str, sparsity: float = 0.9, steps: int = 101) -> Row:
    method, least_bytes = TIMED[name]
    fn, params, x = network.problem()
    method = dataclasses.replace(method, steps=steps)
    times: list[float] = []
    arrays: list[int] = []

    def run(look: Callable[[], None]) -> dpai.Result:
        return dpai.prune(fn, params, x, sparsity, method=method, progress=lambda *_: look())

    size = run(lambda: None).net.size
    before = clock.array_bytes()
    memory = clock.peak_bytes(lambda: run(lambda: arrays.append(clock.array_bytes() - before)))
    run(lambda: times.append(time.perf_counter()))
    # Progress is reported every ten steps, and waits for them. The first ten are a warm-up.
    each = [float(seconds) / 10 for seconds in np.diff(times[1:])]
    seconds = clock.spread(each)
    bandwidth = clock.copy_bandwidth()
    return {
        "weights": size,
        "seconds": seconds,
        "array_bytes_a_weight": max(arrays) / size,
        "bytes_a_weight": memory / size,
        "bandwidth": bandwidth,
        "times_the_memory": seconds["median"] / (least_bytes * size / bandwidth),
    }


def _large(network: Network, sparsity: float = 0.9) -> Row:
    fn, params, x = network.problem()
    results: list[dpai.Result] = []

    def run() -> None:
        key = jax.random.key(len(results))
        results.append(dpai.prune(fn, params, x, sparsity, key=key, progress=False))

    baseline = clock.peak_bytes(lambda: None)
    memory = clock.peak_bytes(run)
    run()
    pruned, again = results
    return {
        "weights": pruned.net.size,
        "seconds": pruned.seconds,
        "seconds_again": again.seconds,
        "steps": len(pruned.history["nodes"]),
        "peak_bytes": memory - baseline,
        **_topology(pruned),
    }


def _trainings(network: Network, python: str | None) -> Row:
    row = isolated(_training, network)
    if python is not None:
        for layout in ("contiguous_format", "channels_last"):
            row[f"peer {layout}"] = _peer(python, "train", network, "--memory-format", layout)
    return row


def _training(network: Network, batch: int = 128) -> Row:
    from experiments import cpu, devices, models, steps

    cpu.keep_freed_memory(network.shape)
    mesh = devices.data_mesh()
    model = models.create(network.model, network.classes, network.width)
    variables = steps.initialize(model, 0, network.shape)
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), variables["params"])
    optimizer = steps.Optimizer(**OPTIMIZER)
    state = steps.start(optimizer, *devices.on_each(mesh, (variables, masks)))
    rng = np.random.default_rng(0)
    pictures = rng.standard_normal((batch, *network.shape)).astype(np.float32)
    images, labels = devices.split(mesh, pictures, rng.integers(0, network.classes, batch))

    def run() -> Any:
        nonlocal state
        state, metrics = steps.train_step(model, optimizer, state, images, labels)
        return metrics

    return {"seconds": clock.call_seconds(run)}


def _settings(network: Network, sparsity: float, name: str, method: dpai.DPaI, seed: int) -> Row:
    return {"network": network.title, "method": name} | _objective(network, sparsity, method, seed)


def _quality(network: Network, sparsity: float, seed: int) -> Row:
    row: Row = {"network": network.title, "sparsity": sparsity}
    for counting in ("exact", "mean_field"):
        row[counting] = _objective(network, sparsity, dpai.DPaI(counting=counting), seed)
    return row


def _objective(network: Network, sparsity: float, method: dpai.DPaI, seed: int) -> Row:
    fn, params, x = network.problem()
    result = dpai.prune(
        fn, params, x, sparsity, method=method, key=jax.random.key(seed), progress=False
    )
    steps = len(result.history["nodes"])
    return {
        "sparsity": sparsity,
        "seconds": result.seconds,
        "steps": steps,
        **_topology(result),
    }


def _topology(result: dpai.Result) -> Row:
    topology = result.topology
    log_paths = topology.log_paths if math.isfinite(topology.log_paths) else None
    return {"log_paths": log_paths} | {
        name: getattr(topology, name) for name in ("nodes", "kernels", "effective")
    }


def _peer(python: str, command: str, network: Network, *options: str) -> Row:
    """The seconds of the PyTorch peer, run by a Python that has PyTorch."""
    call = [python, "-m", "experiments.benchmarks.peer", command]
    call += ["--network", network.model, "--size", str(network.shape[0])]
    call += ["--steps", "5", "--warmup", "1", *options]
    printed = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    seconds: Row = json.loads(printed.splitlines()[-1])["seconds"]
    return seconds
