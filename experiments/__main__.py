"""The commands of `python -m experiments`."""

import contextlib
import functools
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

import tyro

from experiments.config import Config, ConfigError
from experiments.processes import Share, join

Table = Literal[
    "cold",
    "rivals",
    "growth",
    "many",
    "compact",
    "sparse",
    "step",
    "training",
    "large",
    "settings",
    "quality",
]
"""What `bench` measures, in this order."""

# Each command imports what it needs, so that --help does not wait for jax.


def train(
    config: Annotated[Config, tyro.conf.OmitArgPrefixes],
    folder: pathlib.Path = pathlib.Path("runs"),
    again: bool = False,
    json: bool = False,
) -> None:
    """Prune and train one network, and append its result to a results file.

    A job that was interrupted resumes from its checkpoint; one that has a result is not run again.

    Example: python -m experiments train --method dpai --sparsity 0.98 --seed 1

    Args:
        config: The job.
        folder: Where results.jsonl and the checkpoints go.
        again: Run the job from the start even if it has a result.
        json: Print only the record, as a line of JSON.
    """
    from experiments import jobs, report
    from experiments.board import Board

    keep_compiled()
    console = _console(json)
    with _kept_for_records(json), Board(console, [config]) as board:
        record = jobs.run(config, folder, again=again, report=board.report(config))
    if json:
        _print_records([record])
        return
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


def sweep(
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE ...")],
    scale: Literal["full", "small"] = "full",
    dataset: str | None = None,
    methods: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...")] = None,
    sparsities: Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="FLOAT ...")] = None,
    seeds: int | None = None,
    epochs: int | None = None,
    folder: pathlib.Path | None = None,
    again: bool = False,
    json: bool = False,
    share: Share = "jobs",
    processes: int | None = None,
    process: int | None = None,
    coordinator: str | None = None,
) -> None:
    """Compare methods over sparsities and seeds on the networks and data of recipes.

    After an interruption the same command goes on where it stopped. Started several times on one
    folder, it shares out the jobs. A job that fails is reported at the end, and tried again by the
    next call.

    Example: python -m experiments sweep digits_resnet20 --methods snip dpai --sparsities 0.9 0.99

    Args:
        recipes: Names of recipes, or Python files that define `sweep(scale)`.
        scale: The recipe as published, or at a size for two cores.
        dataset: Data set in place of the recipe's.
        methods: Methods in place of the recipe's, each with +repair or a control such as
            +shuffled if you like; "all" stands for all of them.
        sparsities: Fractions of the prunable weights to remove, in place of the recipe's.
        seeds: Repetitions of each job in place of the recipe's, with other weights and masks.
        epochs: Passes over the training split in place of the recipe's.
        folder: Where results.jsonl and the checkpoints go; by default runs/RECIPE.
        again: Run every job from the start even if it has a result.
        json: Print only the records, as lines of JSON.
        share: "jobs": each process trains its own jobs. "batch": all processes train each job
            together under `jax.distributed`, on all of their devices.
        processes: How many processes there are. To share jobs, it is needed only if they have no
            common folder; to share batches, only if JAX does not find the cluster by itself.
        process: The number of this process, from 0.
        coordinator: Address of process 0 as HOST:PORT, to share batches.
    """
    from experiments import jobs, report
    from experiments import sweep as sweeps
    from experiments.methods import METHODS

    if methods is not None:
        methods = tuple(m for name in methods for m in (METHODS if name == "all" else (name,)))
    if folder is None:
        folder = pathlib.Path("runs", "+".join(pathlib.Path(name).stem for name in recipes))
    keep_compiled()
    console = _console(json)
    with _kept_for_records(json):
        todo = sweeps.configs(
            recipes,
            scale,
            dataset=dataset,
            methods=methods,
            sparsities=sparsities,
            seeds=seeds,
            epochs=epochs,
        )
        todo = join(todo, share, processes, process, coordinator)
        outcome = jobs.run_all(todo, folder, console, again=again)
    if not jobs.decides():
        return
    if json:
        _print_records(outcome.records)
    else:
        for grid in report.by_panel(report.panels(outcome.records)):
            console.print()
            console.print(grid.rich())
        console.print(
            f"Results:  {folder / jobs.RESULTS}", soft_wrap=True, highlight=False, markup=False
        )
    for config, why in outcome.failures.items():
        print(f"failed: {config.title}: {why}", file=sys.stderr)
    if outcome.failures:
        sys.exit(
            f"error: {len(outcome.failures)} of {len(todo)} jobs failed; "
            "the same command tries them again."
        )


def demo(
    folder: pathlib.Path = pathlib.Path("runs/demo"), seeds: int = 1, again: bool = False
) -> None:
    """Compare dense, random and DPaI networks on digits: a table and a picture in minutes.

    After an interruption the same command goes on where it stopped.

    Example: python -m experiments demo --seeds 3

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

    Keep the machine quiet. After an interruption the same command goes on where it stopped.

    Example: python -m experiments bench --tables step training

    Args:
        tables: What to measure: first calls of DPaI, of the other methods and against the depth,
            many calls at once; networks without dead channels, sparse products; steps of DPaI,
            steps of training, large networks, settings of DPaI, and how good mean-field counting
            is.
        seeds: Repetitions where masks are compared.
        torch: A Python that has PyTorch, to also measure a plain PyTorch implementation.
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

    Example: python -m experiments report runs/digits_resnet20

    Args:
        folders: Folders that hold a results.jsonl, or .jsonl files; their jobs are put together.
        out: Where the page and the figures go; by default "report" beside the first store.
        json: Print the tables' contents as JSON instead of the tables.
    """
    import json as encoder

    from experiments.report import records, write

    document = write.write(folders, out)
    if json:
        print(encoder.dumps(document, indent=2))
    else:
        write.show(records.read(folders), document["files"], _console())


def documents(
    files: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = (),
) -> None:
    """Update the tables in documents from the records that each table names.

    Example: python -m experiments documents docs/performance.md

    Args:
        files: The documents; by default all in docs/.
    """
    from experiments import documents as writer

    for file in files or sorted(pathlib.Path("docs").glob("*.md")):
        writer.update(file)


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, for the next command."""
    import dpai_jax as dpai

    try:
        dpai.cache()
    except OSError as error:
        print(f"Compiled programs are not kept: {error}", file=sys.stderr)


def _console(json: bool = False) -> Any:
    """Returns the console that commands print to, wide if it is not a terminal.

    Args:
        json: Print to standard error, and leave standard output to records.
    """
    import rich.console

    console = rich.console.Console(stderr=json)
    return console if console.is_terminal else rich.console.Console(width=160, stderr=json)


@contextlib.contextmanager
def _kept_for_records(json: bool) -> Iterator[None]:
    """With JSON, redirects what libraries print, also from C++, to standard error."""
    if not json:
        yield
        return
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def _print_records(records: Sequence[dict[str, Any]]) -> None:
    """Prints records as lines of JSON."""
    for record in records:
        print(json.dumps(record))


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: The command line; by default that of the process.
    """
    try:
        _parsed(args)()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a folder, a full disk
        what = "" if error.filename is None else f": {error.filename}"
        sys.exit(f"error: {error.strerror or error}{what}")
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def _parsed(args: Sequence[str] | None) -> Callable[[], None]:
    """Returns the call that a command line asks for; exits with one line if it is wrong."""
    commands = (train, sweep, report, demo, bench, documents)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                {command.__name__: _later(command) for command in commands},
                prog="python -m experiments",
                description="Prune networks at initialization, train them, compare them.",
                args=args,
            )
    except SystemExit as end:
        if end.code:
            print(f"error: {_one_line(said.getvalue())}", file=sys.stderr)
        raise


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Returns a function of the same arguments that returns the call without making it."""

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return call


def _one_line(panel: str) -> str:
    """Returns the text of tyro's panel above its first ruler, and a pointer to the help."""
    lines = [line.strip("│ ") for line in panel.splitlines()[1:]]
    rulers = [number for number, line in enumerate(lines) if line.startswith("─")]
    what = " ".join(lines[: rulers[0] if rulers else len(lines)])
    return f"{what.rstrip('.')}; see python -m experiments --help"


if __name__ == "__main__":
    main()
