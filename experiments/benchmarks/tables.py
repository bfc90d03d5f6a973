"""The benchmarks' tables: each a function that measures its rows one by one.

A row is what one process measured, a dict of plain numbers. It is appended to a file as soon as it
is there, and not measured again while it is.
"""

import concurrent.futures
import functools
import json
import math
import multiprocessing
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

import dpai_jax as dpai
from experiments.benchmarks import clock, networks
from experiments.benchmarks.networks import Network

Row = dict[str, Any]
Jobs = Iterator[tuple[str, Callable[[], Row]]]
"""A title for each row, and what measures it."""

ADAM_BYTES = 26
"""What a step must move for each weight: the score and Adam's two moments, read and written as
float32, and the old and the new mask."""

PUBLISHED = {"resnet20": 0.044, "resnet18": 1.7, "vgg19": 2.8}
"""Seconds a step of the published PyTorch code on two cores such as these."""


def step(python: str | None) -> Jobs:
    """The time of a step of DPaI beside a plain PyTorch implementation and the memory's own."""
    for network in networks.STEP:
        yield network.title, functools.partial(_beside_peer, _step, network, python, "prune")


def large() -> Jobs:
    """The time and the memory of pruning large networks, as a user would with the defaults."""
    for network in networks.LARGE:
        yield network.title, functools.partial(_isolated, _large, network)


def training(python: str | None) -> Jobs:
    """The time of a training step of ResNet-20, batch 128, beside PyTorch."""
    network = networks.STEP[0]
    yield network.title, functools.partial(_beside_peer, _training, network, python, "train")


def quality(seeds: int) -> Jobs:
    """What masks optimised in the mean field are worth, counted exactly."""
    for network in networks.QUALITY:
        for sparsity in networks.SPARSITIES:
            for seed in range(seeds):
                title = f"{network.title}, {sparsity:.2%}, seed {seed}"
                yield title, functools.partial(_quality, network, sparsity, seed)


METHODS: Mapping[str, dpai.DPaI] = {
    "published, 3000 steps": dpai.DPaI(steps=3000, patience=3000),
    "published, 300 steps": dpai.DPaI(),
    "Adam .02, 300 steps": dpai.DPaI(optimizer=optax.adam(0.02)),
    "Adam .05, 300 steps": dpai.DPaI(optimizer=optax.adam(0.05)),
    "Adam .05 to 0 (cosine), 300 steps": dpai.DPaI(
        optimizer=optax.adam(optax.cosine_decay_schedule(0.05, 300))
    ),
    "Adam .1 to 0 (cosine), 300 steps": dpai.DPaI(
        optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 300))
    ),
    "sign .05, 300 steps": dpai.DPaI(optimizer=optax.sign_sgd(0.05)),
}
"""Settings of DPaI that are compared; the first is the published one."""


def settings(seeds: int) -> Jobs:
    """What other settings than the published ones reach, in a tenth of the steps."""
    for network in networks.SETTINGS:
        for sparsity in networks.SPARSITIES:
            for name in METHODS:
                for seed in range(seeds):
                    title = f"{network.title}, {sparsity:.2%}, {name}, seed {seed}"
                    yield title, functools.partial(_settings, network, sparsity, name, seed)


def measure(table: str, rows: Jobs, path: pathlib.Path) -> Iterator[Row]:
    """Yields a table's rows, each measured if it isn't in the file, to which it is then added."""
    known = {}
    if path.exists():
        lines = path.read_text().splitlines()
        known = {(row["table"], row["title"]): row for row in map(json.loads, lines)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for title, run in rows:
        row = known.get((table, title))
        if row is None:
            row = {"table": table, "title": title} | run() | {"hardware": clock.hardware()}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        yield row


def _isolated(function: Callable[..., Row], *args: Any) -> Row:
    """Calls a function in a process of its own, whose memory nothing else has used."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def _step(network: Network, sparsity: float = 0.9, steps: int = 101) -> Row:
    fn, params, x = network.problem()
    method = dpai.DPaI(steps=steps, patience=steps)
    times: list[float] = []

    def run() -> dpai.Result:
        times.clear()
        return dpai.prune(
            fn, params, x, sparsity, method, progress=lambda *_: times.append(time.perf_counter())
        )

    result = run()
    memory = clock.peak_bytes(run)
    # Progress is told each ten steps, and waits for them. The first ones are still warming up.
    seconds = statistics.median(np.diff(times[1:])) / 10
    bandwidth = clock.copy_bandwidth()
    return {
        "weights": result.net.size,
        "seconds": seconds,
        "bytes_a_weight": memory / result.net.size,
        "bandwidth": bandwidth,
        "times_the_memory": seconds / (ADAM_BYTES * result.net.size / bandwidth),
    }


def _large(network: Network, sparsity: float = 0.9) -> Row:
    fn, params, x = network.problem()
    start = time.perf_counter()
    baseline = clock.peak_bytes(lambda: None)
    result: list[dpai.Result] = []
    memory = clock.peak_bytes(
        lambda: result.append(dpai.prune(fn, params, x, sparsity, progress=False))
    )
    (pruned,) = result
    return {
        "weights": pruned.net.size,
        "seconds": time.perf_counter() - start,
        "steps": len(pruned.history["changed"]),
        "stopped": pruned.stopped,
        "peak_bytes": memory - baseline,
        **_topology(pruned),
    }


def _training(network: Network, batch: int = 128) -> Row:
    from experiments import models, steps

    model = models.create(network.model, network.classes, network.width)
    variables = steps.initialize(model, 0, network.shape)
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), variables["params"])
    recipe = steps.Recipe(0.1, 0.9, 1e-4, 0, 1000)
    state = steps.start(recipe, variables, masks)
    images = jax.random.normal(jax.random.key(0), (batch, *network.shape))
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, network.classes)

    def run() -> Any:
        nonlocal state
        state, metrics = steps.train_step(model, recipe, state, images, labels)
        return metrics

    return {"seconds": clock.median_seconds(run)}


def _settings(network: Network, sparsity: float, name: str, seed: int) -> Row:
    row = {"network": network.title, "method": name}
    return row | _objective(network, sparsity, METHODS[name], seed)


def _quality(network: Network, sparsity: float, seed: int) -> Row:
    row: Row = {"network": network.title, "sparsity": sparsity}
    for counting in ("exact", "mean_field"):
        row[counting] = _objective(network, sparsity, dpai.DPaI(counting=counting), seed)
    return row


def _objective(network: Network, sparsity: float, method: dpai.DPaI, seed: int) -> Row:
    fn, params, x = network.problem()
    result = dpai.prune(fn, params, x, sparsity, method, jax.random.key(seed), progress=False)
    steps = len(result.history["changed"]) - 1
    return {"sparsity": sparsity, "seconds": result.seconds, "steps": steps, **_topology(result)}


def _topology(result: dpai.Result) -> Row:
    topology = result.topology
    log_paths = topology.log_paths if math.isfinite(topology.log_paths) else None
    return {"log_paths": log_paths} | {
        name: getattr(topology, name) for name in ("nodes", "kernels", "effective")
    }


def _beside_peer(
    ours: Callable[..., Row], network: Network, python: str | None, command: str
) -> Row:
    """What is measured here, and then by the PyTorch peer, in a Python that has PyTorch."""
    row = _isolated(ours, network)
    if python is None:
        return row
    call = [python, "-m", "experiments.benchmarks.peer", command]
    call += ["--network", network.model, "--size", str(network.shape[0])]
    call += ["--steps", "5", "--warmup", "1"]
    formats = ["contiguous_format", "channels_last"] if command == "train" else [""]
    for layout in formats:
        extra = ["--memory-format", layout] if layout else ["--sparsity", "0.9"]
        printed = subprocess.run(
            [*call, *extra], check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
        row["peer" + (f" {layout}" if layout else "")] = json.loads(printed)["seconds"]
    return row
