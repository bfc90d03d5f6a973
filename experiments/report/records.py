"""Records of jobs, grouped for tables and figures."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.config import DENSE, ConfigError
from experiments.jobs import RESULTS
from experiments.store import Record, Store

Pick = Callable[[dict[str, Any]], float | None]
"""Takes a number from a record's metrics; None if it is not finite."""

VARIED = ("method", "sparsity", "seed")
"""The settings that differ between the jobs of one panel; all others are its recipe."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The records of one method at one sparsity, one for each seed.

    Attributes:
        method: Name of the method.
        sparsity: Fraction of the prunable weights that it removed.
        records: The finished jobs by seed, including diverged ones.
        missing: Seeds that other groups of the panel have, but not this one.
    """

    method: str
    sparsity: float
    records: tuple[Record, ...]
    missing: tuple[int, ...] = ()

    def values(self, pick: Pick) -> np.ndarray:
        """Returns a number of each record's metrics, NaN for one that isn't finite."""
        picked = [pick(record["metrics"]) for record in self.records]
        return np.array([np.nan if value is None else value for value in picked], float)

    @property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy after the last epoch by seed, of the runs that did not diverge."""
        values = self.values(last)
        seeds = [record["config"]["seed"] for record in self.records]
        return {s: float(v) for s, v in zip(seeds, values, strict=True) if np.isfinite(v)}

    @property
    def seeds(self) -> int:
        """How many seeds there should be."""
        return len(self.records) + len(self.missing)

    @property
    def diverged(self) -> int:
        """How many runs ended without an accuracy."""
        return len(self.records) - len(self.accuracies)


@dataclasses.dataclass(frozen=True)
class Panel:
    """All jobs of one recipe on one data set and network.

    Attributes:
        title: A title that no other panel has.
        settings: The recipe: all settings that the jobs share.
        groups: By sparsity, the methods in the order of the records.
    """

    title: str
    settings: dict[str, Any]
    groups: tuple[Group, ...]

    @property
    def sparsities(self) -> list[float]:
        """The sparsities of the pruned networks, rising."""
        return sorted({group.sparsity for group in self.groups if group.method != DENSE})

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of the records."""
        return list(dict.fromkeys(group.method for group in self.groups))

    def at(self, sparsity: float) -> list[Group]:
        """Returns the groups of the pruned networks at one sparsity."""
        return [g for g in self.groups if g.method != DENSE and g.sparsity == sparsity]

    def front(self, sparsity: float) -> list[Group]:
        """Returns the groups at one sparsity that no other surpasses, in the order of log-paths.

        One surpasses another if its means of log-paths, nodes and kernels are all at least as
        large, and one of them is larger. A group with a network without a path is left out.
        """
        keys = ("log_paths", "nodes", "kernels")
        means = [
            (np.array([group.values(topology(key)).mean() for key in keys]), group)
            for group in self.at(sparsity)
        ]
        means = [(mean, group) for mean, group in means if np.isfinite(mean).all()]
        front = [
            (mean, group)
            for mean, group in means
            if not any(np.all(other >= mean) and np.any(other > mean) for other, _ in means)
        ]
        return [group for mean, group in sorted(front, key=lambda pair: pair[0][0])]

    @property
    def dense(self) -> Group | None:
        """The group of the dense network, if it was trained."""
        return next((group for group in self.groups if group.method == DENSE), None)


def last(metrics: dict[str, Any]) -> float | None:
    """Test accuracy after the last epoch."""
    return metrics["test_accuracy"]


def best(metrics: dict[str, Any]) -> float | None:
    """Test accuracy at the epoch of best validation accuracy."""
    return metrics["best_test_accuracy"]


def prune_seconds(metrics: dict[str, Any]) -> float | None:
    """Seconds of pruning."""
    return metrics["prune_seconds"]


def topology(key: str) -> Pick:
    """Returns a function that picks a number from the pruned network's topology."""
    return lambda metrics: metrics["topology"][key]


def effective(metrics: dict[str, Any]) -> float | None:
    """The fraction of the kept weights that are on a path."""
    return metrics["topology"]["effective"] / metrics["topology"]["weights"]


def read(paths: Sequence[pathlib.Path]) -> list[Record]:
    """Reads stores; adds to each record its file and line, as "source".

    Args:
        paths: Stores, or folders that hold a results.jsonl.

    Raises:
        ConfigError: A store does not exist, or none of them holds a job.
    """
    if not paths:
        raise ConfigError("folders must name at least one folder or .jsonl file; got none.")
    records: list[Record] = []
    for path in paths:
        file = path / RESULTS if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"folders must name stores or folders that hold one; got {path}.")
        lines = Store(file).by_line().items()
        records += [record | {"source": f"{file}:{line}"} for line, record in lines]
    if not any("config" in record for record in records):
        raise ConfigError(f"no job has a record in {', '.join(map(str, paths))}.")
    return records


def newest(records: Sequence[Record]) -> list[Record]:
    """Returns the newest record of each finished job, in the order of their first records."""
    by_job: dict[str, Record] = {}
    for record in records:
        if "metrics" in record and "config" in record:
            by_job[json.dumps(_given(record["config"]), sort_keys=True)] = record
    return list(by_job.values())


def failed(records: Sequence[Record]) -> list[Record]:
    """Returns the records of jobs that failed and have not finished since."""
    finished = [_given(record["config"]) for record in newest(records)]
    return [
        record
        for record in records
        if "config" in record and "metrics" not in record
        if _given(record["config"]) not in finished
    ]


def group(records: Sequence[Record]) -> list[Group]:
    """Groups records by sparsity and method, and gates where they were given.

    Sparsities rise, methods keep their order.

    If a job has several records, the newest counts.
    """
    groups: dict[tuple[float, str], list[Record]] = {}
    seeds = set()
    for record in newest(records):
        config = record["config"]
        gates = config.get("gates")
        method = config["method"] + (f" with gates {gates}" if gates else "")
        groups.setdefault((config["sparsity"], method), []).append(record)
        seeds.add(config["seed"])
    # Sorting is stable, so within a sparsity the methods stay in the order of the records.
    return [
        Group(
            method,
            sparsity,
            tuple(sorted(own, key=lambda record: record["config"]["seed"])),
            tuple(sorted(seeds - {record["config"]["seed"] for record in own})),
        )
        for (sparsity, method), own in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def panels(records: Sequence[Record]) -> list[Panel]:
    """Groups the jobs of each recipe on each data set and network.

    A title is the network and its data set. If several recipes share these, it also has the
    settings in which they differ.
    """
    recipes: dict[str, list[Record]] = {}
    for record in newest(records):
        given = _given(record["config"]).items()
        recipe = {name: value for name, value in given if name not in VARIED}
        recipes.setdefault(json.dumps(recipe, sort_keys=True), []).append(record)
    settings = [json.loads(recipe) for recipe in recipes]
    return [
        Panel(_title(own, settings), own, tuple(group(members)))
        for own, members in zip(settings, recipes.values(), strict=True)
    ]


def _given(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that have a value. A record may be older than a setting, and lack it."""
    return {name: value for name, value in config.items() if value is not None}


def _title(own: dict[str, Any], settings: Sequence[dict[str, Any]]) -> str:
    title = _network(own)
    alike = [other for other in settings if _network(other) == title]
    differing = [
        f"{name} {own.get(name, 'by default')}"
        for name in dict.fromkeys(name for other in alike for name in other)
        if any(other.get(name) != own.get(name) for other in alike)
    ]
    return ", ".join([title, *differing])


def _network(settings: dict[str, Any]) -> str:
    """A network and its data, which is called by its file or folder if it has one."""
    return f"{settings['model']} on {pathlib.PurePath(settings['dataset']).stem}"
