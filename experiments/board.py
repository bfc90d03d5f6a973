"""Shows how jobs go: bars on a terminal, plain lines anywhere else."""

import time
from collections.abc import Sequence
from typing import Self

import rich.console
import rich.progress

from experiments.config import Config
from experiments.train import Metrics, Report

LINE_SECONDS = 10.0
"""Least time between two plain lines of one job."""

_STAGES = {"start": "setting up", "prune": "pruning"}


class Board:
    """A row for each job that has begun. Use it as a context manager.

    Args:
        console: Where to show them.
        configs: The jobs, in the order in which they run.
    """

    def __init__(self, console: rich.console.Console, configs: Sequence[Config]) -> None:
        several = len({config.seed for config in configs}) > 1
        self._labels = {
            config: f"{number}/{len(configs)} {config.label}"
            + (f", seed {config.seed}" if several else "")
            for number, config in enumerate(configs, start=1)
        }
        self._console = console
        self._begin = time.monotonic()
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=16),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def report(self, config: Config) -> Report:
        """Returns the function that a job tells how it goes."""
        row: rich.progress.TaskID | None = None
        last_line = -LINE_SECONDS

        def update(stage: str, done: int, total: int, metrics: Metrics) -> None:
            nonlocal row, last_line
            note = _note(stage, done, total, metrics)
            if row is None:
                # Without a total the bar pulses, until the first step.
                row = self._bars.add_task(self._labels[config], total=None, note=note)
            if done or stage not in _STAGES:
                self._bars.update(row, total=total, completed=done, note=note)
            else:
                self._bars.update(row, note=note)
            now = time.monotonic()
            ends = done == total or (stage in _STAGES and not done)
            if ends or now - last_line >= LINE_SECONDS:
                last_line = now
                self._line(config, note)

        return update

    def _line(self, config: Config, note: str) -> None:
        if not self._console.is_terminal:
            elapsed = time.monotonic() - self._begin
            line = f"{elapsed:5.0f} s  {self._labels[config]}: {note}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _note(stage: str, done: int, total: int, metrics: Metrics) -> str:
    if stage in _STAGES:
        return f"{_STAGES[stage]}, step {done}/{total}" if done else _STAGES[stage]
    if stage == "known":
        accuracy = metrics["test_accuracy"]
        return f"finished before, {'diverged' if accuracy is None else f'test {accuracy:.1%}'}"
    note = f"epoch {done}/{total}"
    if done and "validation_accuracy" not in metrics:
        return f"{note}, the loss diverged"
    if done:
        note += f", validation {metrics['validation_accuracy']:.1%}"
    return f"{note}, test {metrics['test_accuracy']:.1%}" if done == total else note
