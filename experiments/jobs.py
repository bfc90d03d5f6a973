"""Runs jobs once: what a store already holds is not run again."""

import contextlib
import pathlib
import shutil
from typing import Any

import jax

from dpai_jax.tools.settings import described
from experiments import methods, pretrained, provenance, train
from experiments.config import Config
from experiments.store import Record, Store, locked

RESULTS = "results.jsonl"
"""Name of the store in a folder of runs."""


def description(config: Config) -> dict[str, Any]:
    """Returns what a job's record is found by: its settings, its method's, and the code.

    The content of a checkpoint to start from, too, where there is one.
    """
    method = described(methods.find(config.method))
    start = {} if config.init is None else {"init": pretrained.digest(config.init)}
    return {"config": config.as_dict(), "method": method, "code": provenance.code()} | start


def run(
    config: Config,
    folder: pathlib.Path,
    *,
    again: bool = False,
    report: train.Report | None = None,
) -> Record:
    """Returns a job's record, running the job where there is none yet.

    Args:
        config: The job.
        folder: Holds the store, and the checkpoints in a folder for each job.
        again: Forget the job's checkpoint and run it even if it has a record.
        report: Told how the job goes.

    Raises:
        ConfigError: Another process runs this job, or what `train.train_and_evaluate` raises.
    """
    config.check()
    store, job = Store(folder / RESULTS), description(config)
    workdir = folder / "checkpoints" / config.name
    busy = f"another process is running {config.label}, seed {config.seed}, in {folder}."
    # Processes that train one job together share its folder; they are started on purpose.
    together = jax.distributed.is_initialized()
    lock = locked(workdir.with_suffix(".lock"), busy)
    with contextlib.nullcontext() if together else lock:
        if not again and (record := store.find(job)) is not None:
            if report is not None:
                report("known", config.epochs, config.epochs, record["metrics"])
            return record
        if again and workdir.exists():
            shutil.rmtree(workdir)
        metrics = train.train_and_evaluate(config, workdir, job=job, report=report)
        record = job | {"metrics": metrics} | provenance.origin()
        return store.append(record) if jax.process_index() == 0 else record
