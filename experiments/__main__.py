"""The commands of `python -m experiments`."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.config import Config, ConfigError

# Each command imports what it needs, so that --help does not wait for jax.


def train(
    config: Annotated[Config, tyro.conf.OmitArgPrefixes],
    folder: pathlib.Path = pathlib.Path("runs"),
    again: bool = False,
) -> None:
    """Prune and train one network, and append its result to a results file.

    A job that was interrupted resumes from its checkpoint; one that has a result is not run again.

    Args:
        config: The job.
        folder: Where results.jsonl and the checkpoints go.
        again: Run the job from the start even if it has a result.
    """
    import rich.console

    from experiments import jobs, report
    from experiments.board import Board

    console = rich.console.Console()
    with Board(console, [config]) as board:
        record = jobs.run(config, folder, again=again, report=board.report(config))
    metrics = record["metrics"]
    console.print(report.table([record], f"{config.model} on {config.dataset}"))
    closing = f"""\
Best epoch by validation: {metrics["best_epoch"]} of {config.epochs}, \
test accuracy {metrics["best_test_accuracy"]:.1%}.
Took {record["seconds"]:.0f} s. Result: {folder / jobs.RESULTS}"""
    console.print(closing, soft_wrap=True, highlight=False, markup=False)


def demo(
    folder: pathlib.Path = pathlib.Path("runs/demo"), seeds: int = 1, again: bool = False
) -> None:
    """Compare dense, random and DPaI networks on digits: a table and a picture in minutes.

    After an interruption the same command goes on where it stopped.

    Args:
        folder: Where results.jsonl, the checkpoints and demo.png go.
        seeds: Repetitions of each job, with other weights and masks.
        again: Run every job from the start even if it has a result.
    """
    import rich.console

    from experiments import demo as job_list

    job_list.run(folder, seeds, again, rich.console.Console())


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: The command line; by default that of the process.
    """
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "demo": demo},
            prog="python -m experiments",
            description="Prune networks at initialization, train them, compare them.",
            args=args,
        )
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
