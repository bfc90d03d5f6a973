"""Shows the progress of jobs: bars on a terminal, lines anywhere else."""

import time
from collections.abc import Collection, Sequence
from typing import Self

import rich.console
import rich.progress

from experiments.config import Config
from experiments.train import Metrics, Report

LINE_SECONDS = 60.0
"""The least time between two lines while a job runs."""

_STAGES = {"start": "setting up", "prune": "pruning"}


class Board:
    """A line for each job that has ended, and bars for the current job and for all. A context.

    Args:
        console: Where to show them.
        configs: The jobs, in the order in which they run.
        known: The jobs that had ended before.
    """

    def __init__(
        self,
        console: rich.console.Console,
        configs: Sequence[Config],
        known: Collection[Config] = (),
    ) -> None:
        several = len({config.seed for config in configs}) > 1
        recipes = len({(config.dataset, config.model) for config in configs}) > 1
        self._labels = {
            config: f"{number}/{len(configs)} {config.label}"
            + (f", seed {config.seed}" if several else "")
            + (f", {config.model} on {config.dataset}" if recipes else "")
            for number, config in enumerate(configs, start=1)
        }
        self._known = frozenset(known) if len(configs) > 1 else frozenset()
        # How much of each job is left, of 1.
        self._left = {config: 1.0 for config in configs if config not in known}
        self._jobs = len(self._left)
        self._console = console
        self._begin = self._last_line = time.monotonic()
        self._current: Config | None = None
        self._waiting = False
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=16),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        # Without a total a bar pulses, until the first step.
        self._job = self._bars.add_task("", total=None, visible=False, note="")
        self._all = self._bars.add_task(
            "all jobs", total=self._jobs, visible=len(configs) > 1, note=""
        )

    def __enter__(self) -> Self:
        self._bars.start()
        if self._known:
            self._print(f"{len(self._known)} of {len(self._labels)} jobs finished before.")
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def report(self, config: Config) -> Report:
        """Returns the function that a job reports its progress to."""

        def update(stage: str, done: int, total: int, metrics: Metrics) -> None:
            if stage == "known" and config in self._known:
                return
            ended = stage == "known" or (stage == "train" and _ended(done, total, metrics))
            if stage == "train" or ended:
                self._left[config] = 0.0 if ended else (total - done) / total
            self._show(config, stage, done, total, _note(stage, done, total, metrics), ended)

        return update

    def failed(self, config: Config, why: str) -> None:
        """Shows that a job failed."""
        self._left[config] = 0.0
        self._show(config, "failed", 1, 1, f"failed: {why}", True)

    def elsewhere(self, config: Config) -> None:
        """Takes note that another process runs a job."""
        self._left[config] = 0.0

    def waiting(self, number: int) -> None:
        """Shows that other processes run all jobs that are left."""
        note = f"waiting for {number} job{'s'[: number > 1]} of other processes"
        self._bars.update(self._job, description="", total=None, visible=True, note=note)
        if not self._waiting:
            self._waiting = True
            self._print(f"{self._elapsed()}  {note}")

    def _show(
        self, config: Config, stage: str, done: int, total: int, note: str, ended: bool
    ) -> None:
        left = self._time_left()
        if config != self._current:
            self._current = config
            self._bars.reset(self._job)
        running = None if stage in _STAGES and not done else total
        self._bars.update(
            self._job,
            description=self._labels[config],
            total=running,
            completed=done,
            visible=not ended,
            note=note if len(self._labels) > 1 else f"{note}{left}",
        )
        ahead = self._jobs - sum(self._left.values())
        self._bars.update(self._all, completed=ahead, note=left.removeprefix(", "))
        now = time.monotonic()
        if ended or (not self._console.is_terminal and now - self._last_line >= LINE_SECONDS):
            self._last_line = now
            self._print(f"{self._elapsed()}  {self._labels[config]}: {note}{left}")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._begin:5.0f} s"

    def _time_left(self) -> str:
        """How long what is left will take, at the pace since the start, if jobs take equally long.

        What other processes do counts, too.
        """
        left = sum(self._left.values())
        ended = self._jobs - left
        if not left or not ended:
            return ""
        return f", {_duration((time.monotonic() - self._begin) * left / ended)} left"

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _ended(done: int, total: int, metrics: Metrics) -> bool:
    return done == total or (done > 0 and "validation_accuracy" not in metrics)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def _note(stage: str, done: int, total: int, metrics: Metrics) -> str:
    if stage in _STAGES:
        return f"{_STAGES[stage]}, step {done}/{total}" if done else _STAGES[stage]
    if stage == "known":
        accuracy = metrics.get("test_accuracy")
        return f"finished before, {'diverged' if accuracy is None else f'test {accuracy:.1%}'}"
    note = f"epoch {done}/{total}"
    if done and "validation_accuracy" not in metrics:
        return f"{note}, the loss diverged"
    if done:
        note += f", validation {metrics['validation_accuracy']:.1%}"
    return f"{note}, test {metrics['test_accuracy']:.1%}" if done == total else note
