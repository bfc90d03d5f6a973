"""Runs jobs once: what a results file already holds is not run again."""

import pathlib
import shutil
import time

import jax

from experiments import results, train
from experiments.config import Config

RESULTS = "results.jsonl"
"""Name of the results file in a folder of runs."""


def run(
    config: Config,
    folder: pathlib.Path,
    *,
    again: bool = False,
    report: train.Report | None = None,
) -> results.Record:
    """Returns a job's record, running the job where there is none yet.

    Args:
        config: The job.
        folder: Holds the results file, and the checkpoints in a folder for each job.
        again: Forget the job's checkpoint and run it even if it has a record.
        report: Told how the job goes.
    """
    path = folder / RESULTS
    if not again and (record := results.find(path, config)) is not None:
        if report is not None:
            report("known", config.epochs, config.epochs, record["metrics"])
        return record
    workdir = folder / "checkpoints" / config.name
    if again and workdir.exists():
        shutil.rmtree(workdir)
    start = time.monotonic()
    metrics = train.train_and_evaluate(config, workdir, report=report)
    record = results.make_record(config, metrics, time.monotonic() - start)
    if jax.process_index() == 0:  # of several that train together
        results.append(path, record)
    return record
