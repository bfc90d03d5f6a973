"""Comparisons of pruning methods on one network and data set."""

import dataclasses
import pathlib
from collections.abc import Sequence

import rich.console

from experiments import jobs, methods
from experiments.board import Board
from experiments.config import DENSE, Config, ConfigError
from experiments.store import Record

BASE = Config(dataset="digits", model="resnet20", width=16, epochs=20)
"""What all jobs have in common, but for the epochs."""


def configs(
    names: Sequence[str], sparsities: Sequence[float], seeds: int, base: Config = BASE
) -> list[Config]:
    """Returns the jobs, seed by seed: the dense network, then each method at each sparsity.

    Raises:
        ConfigError: There would be none but the dense network.
    """
    for argument, values in (("methods", names), ("sparsities", sparsities)):
        if not values:
            raise ConfigError(f"{argument} must name at least one; got none.")
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1; got {seeds}.")
    pruned = [(name, sparsity) for sparsity in sparsities for name in names if name != DENSE]
    return [
        dataclasses.replace(base, method=method, sparsity=sparsity, seed=seed)
        for seed in range(seeds)
        for method, sparsity in [(DENSE, 0.0), *pruned]
    ]


def run(
    todo: Sequence[Config], folder: pathlib.Path, again: bool, console: rich.console.Console
) -> list[Record]:
    """Runs the jobs that have no result yet, and returns the records of all.

    Args:
        todo: The jobs.
        folder: Where results and checkpoints go.
        again: Run finished jobs again.
        console: Where to show how they go.

    Raises:
        ConfigError: A job can't be run; found out before the first one starts.
    """
    for config in todo:
        config.check()
        methods.find(config.method)
    with Board(console, todo) as board:
        return [
            jobs.run(config, folder, again=again, report=board.report(config)) for config in todo
        ]
