"""Prunes a network, trains it and measures it."""

import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import dpai_jax as dpai
from experiments import cpu, datasets, devices, methods, models, pretrained, steps
from experiments.checkpoint import Checkpoints
from experiments.config import Config, ConfigError
from experiments.steps import Optimizer, TrainState

Metrics = dict[str, Any]
Report = Callable[[str, int, int, Metrics], None]
"""Takes progress: a stage, how much of it is done, how much there is in all, the newest metrics.

The stages are "start", "prune" before the pruning and after some of its steps, "train" before the
first epoch and after each epoch, and "known" for a job that was finished before.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A configuration with what its names stand for.

    Attributes:
        config: The configuration.
        data: Its data set.
        feeds: The batches of each split, by name.
        model: Its network.
        pruning: How it is pruned.
        optimizer: How its weights are updated.
        mesh: The devices that share its batches.
    """

    config: Config
    data: datasets.Dataset
    feeds: Mapping[str, datasets.Feed]
    model: nn.Module
    pruning: methods.Pruning
    optimizer: Optimizer
    mesh: Mesh

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image as the network sees it."""
        return models.resized_shape(self.data.image_shape, self.config.image_size)


def train_and_evaluate(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    job: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    report: Report | None = None,
    checkpoint_seconds: float = 15.0,
) -> dict[str, Any]:
    """Prunes and trains one network. After an interruption it resumes from the last checkpoint.

    A resumed job ends with bitwise the same weights as one that was never interrupted. A job ends
    when its loss is no longer finite.

    Args:
        config: The job.
        workdir: Folder of the job's checkpoints; the trained weights stay there.
        job: What identifies the job (see `jobs.description`). A checkpoint with another one is
            dropped.
        mesh: The devices to train on, with an axis "data" over which batches are split; by default
            all devices.
        report: Takes the job's progress.
        checkpoint_seconds: Least time between two checkpoints. There is always one after the
            pruning and one after the last epoch.

    Returns:
        Metrics by name: accuracies between 0 and 1 after the last epoch and at the epoch of best
        validation accuracy; the topology; the history, one dict for each epoch; the epoch in which
        the loss diverged, if it did; and the seconds of all calls that the job took.

    Raises:
        ConfigError: A value in `config` makes no sense, or `workdir` belongs to another job.
    """
    clock = time.monotonic()
    say = report or (lambda *_: None)
    say("start", 0, config.epochs, {})
    resolved = resolve(config, mesh)
    with Checkpoints(pathlib.Path(workdir), config, job) as checkpoints:
        state, progress = _begin(resolved, checkpoints, say)
        history = progress["history"]
        say("train", len(history), config.epochs, history[-1] if history else {})
        begin = saved = time.monotonic()
        if not _ended(progress, config):
            progress["seconds"] += begin - clock
        while not _ended(progress, config):
            state, metrics = train_epoch(resolved, state, len(history))
            finite = math.isfinite(metrics["train_loss"])
            history.append(metrics | (evaluate(resolved, state, history) if finite else {}))
            now = time.monotonic()
            progress["train_seconds"] += now - begin
            progress["seconds"] += now - begin
            begin = now
            if not finite:
                progress["diverged"] = len(history)
            elif now - saved >= checkpoint_seconds or len(history) == config.epochs:
                _save(checkpoints, state, progress)
                saved = time.monotonic()
            say("train", len(history), config.epochs, history[-1])
    return {**summarize(history), **progress}


def _ended(progress: Mapping[str, Any], config: Config) -> bool:
    return len(progress["history"]) == config.epochs or progress["diverged"] is not None


def resolve(config: Config, mesh: Mesh | None = None) -> Job:
    """Looks up everything that a configuration names, for a mesh or else for all devices.

    Raises:
        ConfigError: A value makes no sense, or a name is unknown.
    """
    config.check()
    if config.init is not None:
        pretrained.check_exists(config.init)
    pruning = methods.find(config.method)
    methods.check_granularity(config)
    data = datasets.load(config.dataset, train_images=config.train_images)
    if mesh is None:
        shape = models.resized_shape(data.image_shape, config.image_size)
        cpu.keep_freed_memory(shape)
        mesh = devices.data_mesh()
    devices.check_batch_size(mesh, config.batch_size)
    model = models.create(
        config.model, data.num_classes, config.width, _dtype(config), config.image_size
    )
    images = len(data.train.labels)
    if config.batch_size > images:
        raise ConfigError(
            f"batch_size must not exceed the {images} training images; got {config.batch_size}."
        )
    steps_per_epoch = images // config.batch_size
    total = config.epochs * steps_per_epoch
    optimizer = Optimizer(
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        warmup_steps=int(config.warmup * total),
        steps=total,
        drops=tuple(epoch * steps_per_epoch for epoch in config.drops),
        name=config.optimizer,
    )
    return Job(config, data, _feeds(config, data, mesh), model, pruning, optimizer, mesh)


def _feeds(config: Config, data: datasets.Dataset, mesh: Mesh) -> dict[str, datasets.Feed]:
    feed = functools.partial(datasets.feed, data, batch_size=config.batch_size, mesh=mesh)
    return {
        "train": feed(data.train, augmentation=config.augmentation, seed=config.seed),
        "validation": feed(data.validation),
        "test": feed(data.test),
    }


def _dtype(config: Config) -> Any:
    """The dtype that a network computes in, or None for that of its weights."""
    return None if config.dtype == "float32" else jnp.dtype(config.dtype)


def initial_variables(job: Job) -> Any:
    """Returns the weights that a job starts from: random ones, or those of a checkpoint.

    Raises:
        ConfigError: The checkpoint belongs to another network.
    """
    variables = _drawn(job, job.config.seed)
    if job.config.init is None:
        return variables
    return pretrained.load_variables(job.config.init, variables)


def _drawn(job: Job, seed: int) -> Any:
    return steps.initialize(job.model, np.uint32(seed), job.image_shape, job.data.dtype)


def prune(job: Job, variables: Any, report: Report) -> dpai.Result:
    """Prunes a job's network; the masks are parallel to its variables."""
    # The bare method, not a closure: jobs that share a network then share its trace.
    apply, key, pruning = job.model.apply, jax.random.key(job.config.seed), job.pruning

    def images(number: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *job.image_shape), job.data.dtype)

    given: dict[str, Any] = {}
    if job.config.gates is not None:
        given["gates"] = job.config.gates
    if pruning.batches:
        given["loss_fn"] = steps.pruning_loss(job.model, pruning.temperature)
        given["batches"] = datasets.samples(job.data, pruning.batches, seed=job.config.seed)
    try:
        result = dpai.prune(
            # The running statistics do not fit images that a method draws itself.
            steps.in_training(job.model) if pruning.images > 1 else apply,
            variables,
            images(pruning.images),
            sparsity=job.config.sparsity,
            method=pruning.make(functools.partial(train_variables, job)),
            key=key,
            granularity=job.config.granularity or "weight",
            repair=pruning.afterwards == "repair",
            progress=lambda step, steps, numbers: report("prune", step, steps, dict(numbers)),
            **given,
        )
    except ValueError as error:  # the network is too small for the sparsity
        raise ConfigError(f"{job.config.model} can't be pruned: {error}") from error
    masks = result.masks
    if pruning.afterwards == "shuffled":
        masks = dpai.shuffled(masks, key)
    # Whatever input and gates a method used, the reported paths are those of one image.
    net = dpai.trace(apply, variables, images(1))
    return dataclasses.replace(result, masks=masks, net=net, topology=dpai.topology(net, masks))


def changed_weights(job: Job, variables: Any, masks: Any) -> Any:
    """Returns the weights that training starts from: other ones if the method's name asks so."""
    how, seed = job.pruning.afterwards, job.config.seed
    if how == "fresh":
        return _drawn(job, (seed + 2**31) % 2**32)
    if how not in ("permuted", "largest"):
        return variables
    rng = np.random.default_rng(seed)

    def changed(weights: Any, mask: Any) -> Any:
        if not np.ndim(mask):
            return weights
        weights, mask = np.array(weights), np.asarray(mask)
        dealt = weights[mask]
        if how == "largest":
            flat = weights.ravel()
            dealt = flat[np.argsort(-np.abs(flat), kind="stable")[: dealt.size]]
        weights[mask] = rng.permutation(dealt)
        return weights

    return jax.tree.map(changed, variables, masks)


def train_variables(job: Job, variables: Any, masks: Any) -> Any:
    """Trains a network with masks from the given variables; returns the trained variables."""
    state = devices.on_each(job.mesh, steps.start(job.optimizer, variables, masks["params"]))
    for epoch in range(job.config.epochs):
        state, _ = train_epoch(job, state, epoch)
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    return {name: trained.get(name, value) for name, value in variables.items()}


def train_epoch(job: Job, state: TrainState, epoch: int) -> tuple[TrainState, Metrics]:
    """Trains for one epoch; returns the state and the means of the steps' metrics."""
    feed = job.feeds["train"]
    if isinstance(feed, datasets.Resident) and steps.belong_in_one_program(
        job.model, job.image_shape, job.data.dtype
    ):
        batch_of, each = feed.epoch_inside(epoch)
        state, metrics = steps.train_epoch(job.model, job.optimizer, state, batch_of, each)
        return state, {name: float(np.mean(jax.device_get(x))) for name, x in metrics.items()}
    measured = []
    for images, labels in feed.epoch(epoch):
        state, metrics = steps.train_step(job.model, job.optimizer, state, images, labels)
        measured.append(metrics)
    means = jax.tree.map(lambda *values: float(np.mean(jax.device_get(values))), *measured)
    return state, means


def evaluate(job: Job, state: TrainState, history: list[Metrics]) -> Metrics:
    """Measures the validation split and, if its result may be reported, the test split."""

    def measure(split: str) -> float:
        return accuracy(job.model, state, job.feeds[split])

    metrics = {"validation_accuracy": measure("validation")}
    best = max((past["validation_accuracy"] for past in history), default=-1.0)
    if metrics["validation_accuracy"] > best or len(history) + 1 == job.config.epochs:
        metrics["test_accuracy"] = measure("test")
    return metrics


def accuracy(model: nn.Module, state: TrainState, feed: datasets.Feed) -> float:
    """Returns the fraction of a split's labels that the network predicts correctly."""
    counts = [steps.count_correct(model, state, images, labels) for images, labels in feed.once()]
    correct, labels = np.sum(jax.device_get(counts), axis=0).tolist()
    return correct / labels


def summarize(history: list[Metrics]) -> Metrics:
    """Picks the numbers to report: those of the last epoch, and of the best one by validation.

    A run that diverged has no accuracy to report: all are NaN.
    """
    if "validation_accuracy" not in history[-1]:
        names = ("test_accuracy", "validation_accuracy", "train_loss")
        best_names = ("best_validation_accuracy", "best_test_accuracy")
        return dict.fromkeys((*names, *best_names), math.nan) | {"best_epoch": 0}
    # The first of several equal epochs wins: that is where the test split was measured.
    best = max(range(len(history)), key=lambda epoch: history[epoch]["validation_accuracy"])
    return {
        "test_accuracy": history[-1]["test_accuracy"],
        "validation_accuracy": history[-1]["validation_accuracy"],
        "train_loss": history[-1]["train_loss"],
        "best_epoch": best + 1,
        "best_validation_accuracy": history[best]["validation_accuracy"],
        "best_test_accuracy": history[best]["test_accuracy"],
    }


def describe(result: dpai.Result) -> dict[str, Any]:
    """Returns a pruned network's topology as plain numbers."""
    topology = result.topology
    layers = [dataclasses.asdict(layer) | {"shape": list(layer.shape)} for layer in topology.layers]
    totals = ("log_paths", "weights", "effective", "nodes", "kernels")
    return {name: getattr(topology, name) for name in totals} | {"layers": layers}


def check_pruned(params: Any, masks: Any, asked: int) -> None:
    """Checks that the masks keep as many weights as asked and that all else is exactly zero.

    Raises:
        RuntimeError: They don't. This is a defect of the training or the library.
    """
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
    prunable = [(np.asarray(leaf), np.asarray(mask)) for leaf, mask in leaves if mask.ndim]
    kept = sum(int(mask.sum()) for _, mask in prunable)
    alive = sum(int(np.count_nonzero(leaf[~mask])) for leaf, mask in prunable)
    if kept != asked or alive:
        raise RuntimeError(
            f"The masks keep {kept} weights where {asked} were asked for, "
            f"and {alive} pruned weights are not zero."
        )


def _begin(job: Job, checkpoints: Checkpoints, report: Report) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and progress of the checkpoint, or after pruning if there is none."""
    variables = initial_variables(job)
    if (progress := checkpoints.progress()) is not None:
        masks = devices.on_each(job.mesh, checkpoints.masks())
        fresh = steps.start(job.optimizer, devices.on_each(job.mesh, variables), masks)
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.replicated(job.mesh)),
            fresh.replace(masks=None),
        )
        return checkpoints.state(template).replace(masks=masks), progress
    report("prune", 0, 1, {})
    result = prune(job, variables, report)
    progress = {
        "prune_seconds": result.seconds,
        "train_seconds": 0.0,
        "seconds": 0.0,
        "diverged": None,
        "topology": describe(result),
        "history": [],
    }
    variables = changed_weights(job, variables, result.masks)
    # The whole state, as the optimizer's counters start on one device.
    state = steps.start(job.optimizer, variables, result.masks["params"])
    state = devices.on_each(job.mesh, state)
    _save(checkpoints, state, progress)
    return state, progress


def _save(checkpoints: Checkpoints, state: TrainState, progress: dict[str, Any]) -> None:
    check_pruned(state.params, state.masks, progress["topology"]["weights"])
    # As NumPy's, masks come back whatever the devices.
    masks = jax.device_get(state.masks)
    checkpoints.save(len(progress["history"]), state.replace(masks=None), masks, progress)
