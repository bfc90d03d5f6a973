"""Runs each job once: a job that has a record in the store is not run again."""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from jax.experimental import multihost_utils

from dpai_jax.tools.settings import described
from experiments import datasets, methods, pretrained, provenance, train
from experiments.board import Board
from experiments.config import DENSE, Config, ConfigError
from experiments.store import BusyError, Record, Store, locked

RESULTS = "results.jsonl"
"""Name of the store in a folder of runs."""

POLL_SECONDS = 0.2
"""The time between two looks at jobs that other processes run."""

_EXPECTED = (ValueError, RuntimeError, ArithmeticError, MemoryError)
"""Errors whose message says enough, including `ConfigError` and XLA's errors."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of jobs.

    Attributes:
        records: The records, in the order of the jobs.
        failures: Why each of the other jobs failed, in one line.
    """

    records: list[Record]
    failures: dict[Config, str]


def description(config: Config) -> dict[str, Any]:
    """Returns what identifies a job's record: its settings, its method's, and the code.

    The content of an initial checkpoint and of a user's own data set also belong to it.

    Raises:
        ConfigError: A name is unknown, or a file does not exist.
    """
    method = described(methods.find(config.method))
    found = {"config": config.as_dict(), "method": method, "code": provenance.code()}
    if config.init is not None:
        found["init"] = provenance.content(pretrained.check_exists(config.init))
    if (place := datasets.own_place(config.dataset)) is not None:
        if not place.exists():
            raise ConfigError(f"dataset must exist; got {config.dataset!r}.")
        found["data"] = provenance.content(place)
    return found


def run(
    config: Config,
    folder: pathlib.Path,
    *,
    again: bool = False,
    report: train.Report | None = None,
) -> Record:
    """Returns a job's record; runs the job if it has none yet.

    Args:
        config: The job.
        folder: Holds the store, and the checkpoints in a folder for each job.
        again: Delete the job's checkpoint and run it even if it has a record.
        report: Takes the job's progress.

    Raises:
        BusyError: Another process runs this job.
        ConfigError: What `train.train_and_evaluate` raises.
    """
    config.check()
    store = Store(folder / RESULTS)
    return _run(config, store, store.size() if again else None, report)


def run_all(
    todo: Sequence[Config],
    folder: pathlib.Path,
    console: rich.console.Console,
    *,
    again: bool = False,
) -> Outcome:
    """Runs the jobs that have no record yet, together with all processes that do the same.

    A process takes the next job that no other process runs. At the end it waits for the others'
    jobs, and takes over those of a process that died. A job that fails does not stop the others.

    Args:
        todo: The jobs.
        folder: Holds the store and the checkpoints, for all processes.
        console: Where to show progress.
        again: Run even the jobs that already have a record.

    Raises:
        ConfigError: A job can't be run as it is configured. Raised before the first job starts.
    """
    check(todo)
    store = Store(folder / RESULTS)
    since = store.size() if again else None
    known = {config for config in todo if store.find(description(config), since or 0)}
    records: dict[Config, Record] = {}
    failures: dict[Config, str] = {}
    # Processes that share a batch must stay in step, so they survive only errors that all meet.
    survived = ConfigError if jax.distributed.is_initialized() else Exception
    left = list(dict.fromkeys(todo))
    if not decides():
        console = rich.console.Console(quiet=True)
    with Board(console, left, known) as board:
        while left:
            busy = []
            for config in left:
                try:
                    records[config] = _run(config, store, since, board.report(config))
                except BusyError:
                    busy.append(config)
                    board.elsewhere(config)
                except survived as error:
                    failures[config] = _line(error)
                    board.failed(config, failures[config])
            if len(busy) == len(left):
                board.waiting(len(busy))
                time.sleep(POLL_SECONDS)
            left = busy
    return Outcome([records[config] for config in todo if config in records], failures)


def check(todo: Sequence[Config]) -> None:
    """Checks everything about jobs that can be checked before they run.

    Raises:
        ConfigError: A value makes no sense, a name is unknown, or data is missing.
    """
    for config in todo:
        config.check()
        methods.find(config.method)
        methods.check_granularity(config)
    for config in dict.fromkeys(dataclasses.replace(c, method=DENSE, seed=0) for c in todo):
        train.resolve(config)


def decides() -> bool:
    """Returns whether this process decides, writes and prints for those that train with it."""
    # Asking for the index starts JAX's backend. Without a cluster it must not start yet.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _run(config: Config, store: Store, since: int | None, report: train.Report | None) -> Record:
    """Returns a job's record; runs the job if it has none.

    Args:
        config: The job.
        store: Where the record is, or goes.
        since: If given, ignore records that were there when the store had this size, and delete
            the job's checkpoint.
        report: Takes the job's progress.
    """
    job = description(config)
    workdir = store.path.parent / "checkpoints" / config.name
    with _claimed(config, job, workdir, store, since) as record:
        if record is not None:
            if report is not None:
                report("known", config.epochs, config.epochs, record.get("metrics", {}))
            return record
        metrics = train.train_and_evaluate(config, workdir, job=job, report=report)
        record = job | {"metrics": metrics} | provenance.origin()
        return store.append(record) if decides() else record


@contextlib.contextmanager
def _claimed(
    config: Config, job: Record, workdir: pathlib.Path, store: Store, since: int | None
) -> Iterator[Record | None]:
    """Holds a job's lock, and gives the job's record if there is one.

    If several processes train each job together, the first one decides for all.
    """
    free, record = True, None
    reason = f"another process is running {config.title}, in {workdir.parent.parent}."
    with contextlib.ExitStack() as held:
        if decides():
            try:
                held.enter_context(locked(workdir.with_name(f"{workdir.name}.lock"), reason))
            except BusyError:
                free = False
            else:
                record = store.find(job, since or 0)
                if since is not None and record is None and workdir.exists():
                    shutil.rmtree(workdir)
        free, known = _agreed(free, record is not None)
        if not free:
            raise BusyError(reason)
        yield record or job if known else None


def _agreed(*decisions: bool) -> tuple[bool, ...]:
    """Returns the decisions of the process that decides."""
    if not jax.distributed.is_initialized():
        return decisions
    return tuple(map(bool, multihost_utils.broadcast_one_to_all(np.array(decisions))))


def _line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    lines = str(error).splitlines()
    name = type(error).__name__
    if not lines:
        return name
    return lines[0] if isinstance(error, _EXPECTED) else f"{name}: {lines[0]}"
