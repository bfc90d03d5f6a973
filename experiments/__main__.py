"""The commands of `python -m experiments`."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import tyro

from experiments.config import Config, ConfigError

Table = Literal[
    "cold", "rivals", "growth", "many", "step", "training", "large", "settings", "quality"
]
"""What `bench` measures, in this order."""

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
    from experiments import jobs, report
    from experiments.board import Board

    keep_compiled()
    console = _console()
    with Board(console, [config]) as board:
        record = jobs.run(config, folder, again=again, report=board.report(config))
    metrics = record["metrics"]
    console.print(report.table([record], f"{config.model} on {config.dataset}").rich())
    if metrics["diverged"] is None:
        best = f"""\
Best epoch by validation: {metrics["best_epoch"]} of {config.epochs}, \
test accuracy {metrics["best_test_accuracy"]:.1%}."""
    else:
        best = f"The loss diverged in epoch {metrics['diverged']} of {config.epochs}."
    closing = f"{best}\nTook {metrics['seconds']:.0f} s. Result: {folder / jobs.RESULTS}"
    console.print(closing, soft_wrap=True, highlight=False, markup=False)


def compare(
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = (
        "random",
        "random+repair",
        "magnitude",
        "snip",
        "grasp",
        "synflow",
        "dpai",
        "dpai+repair",
    ),
    sparsities: tuple[float, ...] = (0.9, 0.99),
    seeds: int = 3,
    epochs: int = 20,
    folder: pathlib.Path = pathlib.Path("runs/compare"),
    again: bool = False,
) -> None:
    """Compare any methods on digits and ResNet-20: a table of means and deviations over seeds.

    After an interruption the same command goes on where it stopped.

    Args:
        methods: Names of methods, each with +repair or +shuffled if you like; "all" stands for
            all of them.
        sparsities: Fractions of the prunable weights to remove.
        seeds: Repetitions of each job, with other weights and masks.
        epochs: Passes over the training split in each job.
        folder: Where results.jsonl and the checkpoints go.
        again: Run every job from the start even if it has a result.
    """
    import dataclasses

    from experiments import compare as comparison
    from experiments import jobs, report
    from experiments.methods import METHODS

    keep_compiled()
    names = [name for given in methods for name in (METHODS if given == "all" else (given,))]
    base = dataclasses.replace(comparison.BASE, epochs=epochs)
    todo = comparison.configs(names, sparsities, seeds, base)
    console = _console()
    records = comparison.run(todo, folder, again, console)
    console.print()
    console.print(
        report.table(
            records, f"{base.model} on {base.dataset}, {seeds} seed{'s'[: seeds > 1]}"
        ).rich()
    )
    console.print(
        f"Results:  {folder / jobs.RESULTS}", soft_wrap=True, highlight=False, markup=False
    )


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
    from experiments import demo as job_list

    keep_compiled()
    job_list.run(folder, seeds, again, _console())


def bench(
    tables: tuple[Table, ...] = get_args(Table),
    seeds: int = 3,
    torch: pathlib.Path | None = None,
    folder: pathlib.Path = pathlib.Path("runs/bench"),
) -> None:
    """Measure time, memory and objectives of pruning, and print a table of each.

    Keep the machine quiet meanwhile. After an interruption the same command goes on where it
    stopped.

    Args:
        tables: What to measure: first calls of DPaI, of the other methods and against the depth,
            many calls at once; steps of DPaI, steps of training, large networks, settings of DPaI,
            and what counting in the mean field is worth.
        seeds: Repetitions where masks are compared.
        torch: A Python that has PyTorch, to measure a plain PyTorch implementation beside.
        folder: Where rows.jsonl goes.
    """
    from experiments.benchmarks import show

    show.run(tables, seeds, None if torch is None else str(torch), folder, _console())


def report(
    folders: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional],
    out: pathlib.Path | None = None,
    json: bool = False,
) -> None:
    """Make a page, figures and tables of finished jobs.

    For example: python -m experiments report runs/compare

    Args:
        folders: Folders that hold a results.jsonl, or .jsonl files; their jobs are put together.
        out: Where the page and the figures go; by default "report" beside the first store.
        json: Print what the tables hold as JSON, in place of the tables.
    """
    import json as encoder

    from experiments.report import records, write

    document = write.write(folders, out)
    if json:
        print(encoder.dumps(document, indent=2))
    else:
        write.show(records.read(folders), document["files"], _console())


def documents(
    files: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = (
        pathlib.Path("docs/performance.md"),
        pathlib.Path("docs/experiments.md"),
    ),
) -> None:
    """Write the tables in documents anew, from the records that each of them names.

    Args:
        files: The documents.
    """
    from experiments import documents as writer

    for file in files:
        writer.update(file)


def keep_compiled() -> None:
    """Keeps what is compiled in the user's cache folder, for the next command."""
    import dpai_jax as dpai

    try:
        dpai.cache()
    except OSError as error:
        print(f"What is compiled is not kept: {error}", file=sys.stderr)


def _console() -> Any:
    """Returns where commands show what they do; in files, tables have room."""
    import rich.console

    console = rich.console.Console()
    return console if console.is_terminal else rich.console.Console(width=160)


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: The command line; by default that of the process.
    """
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": train,
                "compare": compare,
                "demo": demo,
                "bench": bench,
                "documents": documents,
                "report": report,
            },
            prog="python -m experiments",
            description="Prune networks at initialization, train them, compare them.",
            args=args,
        )
    except (ConfigError, OSError) as error:  # what can't be run; a folder, a full disk
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
