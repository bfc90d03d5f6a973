"""The demo: one network unpruned, pruned at random and pruned by DPaI, each trained on digits."""

import pathlib
import sys
import time

import rich.console

from experiments import jobs, report
from experiments.config import Config, ConfigError
from experiments.recipes.digits_resnet20 import BASE
from experiments.sweep import Sweep


def configs(seeds: int) -> list[Config]:
    """Returns the demo's jobs, seed by seed."""
    return Sweep(BASE, methods=("random", "dpai"), sparsities=(0.9, 0.99), seeds=seeds).configs()


def run(folder: pathlib.Path, seeds: int, again: bool, console: rich.console.Console) -> None:
    """Runs the jobs that have no result yet, then shows a table and draws a picture.

    Args:
        folder: Where results, checkpoints and the picture go.
        seeds: How often each job is run, each time with other weights and masks.
        again: Run finished jobs again.
        console: Where to print.

    Raises:
        ConfigError: A job failed.
    """
    todo = configs(seeds)
    begin = time.monotonic()
    console.print(f"ResNet-20 on 8x8 digits: {len(todo)} jobs, a few minutes on two cores.")
    outcome = jobs.run_all(todo, folder, console, again=again)
    for config, why in outcome.failures.items():
        raise ConfigError(f"{config.title}: {why}")
    records = outcome.records
    title = "ResNet-20 on digits"
    picture = folder / "demo.png"
    report.draw(records, picture, title)
    console.print()
    console.print(report.table(records, title).rich())
    closing = f"""\
Finished in {time.monotonic() - begin:.0f} s.
Picture:  {picture}
Results:  {folder / jobs.RESULTS}
Go on with:
  {next_command()}"""
    console.print(closing, soft_wrap=True, highlight=False, markup=False)


def next_command() -> str:
    """Returns a command that runs one more job with this Python."""
    python = pathlib.Path(sys.executable)
    if python.is_relative_to(pathlib.Path.cwd()):
        python = python.relative_to(pathlib.Path.cwd())
    return (
        f"{python} -m experiments train --dataset {BASE.dataset} --model {BASE.model} "
        "--method dpai --sparsity 0.98 --seed 1"
    )
