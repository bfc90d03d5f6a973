"""Tables and plots in documents, made from records that are committed beside them.

A table stands between two comments. The first one names the table, its records and, if needed, its
heading. A plot follows a comment that names its table and records:

    <!-- table step of results/bench.jsonl -->
    <!-- end of table -->

    <!-- plot growth of results/bench.jsonl -->
    ![What it shows](growth.png)

The tables "jobs", "sizes", "accuracies", "against", "standing" and "distances" and the plot
"accuracy" are of finished jobs; the others are of benchmarks. "accuracies" and "against" are of one
recipe. The heading of "against" and "standing" names the method that is compared with all others.
The records may lie in several files, with commas between their names.
"""

import pathlib
import re

from experiments import report
from experiments.benchmarks import show
from experiments.config import ConfigError
from experiments.grid import Grid
from experiments.report.records import Panel
from experiments.store import Record, Store

_TABLE = re.compile(
    r"(?P<begin><!-- table (?P<name>\w+) of (?P<file>\S+)(?: (?P<title>[^\n]+?))? -->\n)"
    r".*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)

JOBS = ("jobs", "sizes", "accuracies", "against", "standing", "distances", "accuracy")
"""The tables and the plot that are made of the records of jobs."""

_PLOT = re.compile(
    r"<!-- plot (?P<name>\w+) of (?P<file>\S+) -->\n!\[[^\]]*\]\((?P<picture>[^)]+)\)"
)


def update(path: pathlib.Path) -> None:
    """Updates the tables of a document, and draws its plots again.

    Args:
        path: The document, in Markdown.

    Raises:
        ConfigError: A table has no records.
    """
    path.write_text(updated(path))
    for match in _PLOT.finditer(path.read_text()):
        records = _records(path, match["file"], match["name"])
        picture = path.parent / match["picture"]
        if match["name"] in JOBS:
            report.save(report.accuracy(report.panels(records)), picture)
        else:
            show.plot(match["name"], records, picture)


def updated(path: pathlib.Path) -> str:
    """Returns a document's text with its tables made from their records."""

    def table(match: re.Match[str]) -> str:
        records = _records(path, match["file"], match["name"])
        grid = _grid(match["name"], records, match["title"] or "")
        return f"{match['begin']}\n{grid.markdown()}\n\n{_origin(records)}\n\n{match['end']}"

    return _TABLE.sub(table, path.read_text())


def _records(path: pathlib.Path, files: str, name: str) -> list[Record]:
    """The records of a table that a document names."""
    stores = [Store(path.parent / file) for file in files.split(",")]
    records = [record for store in stores for record in store.read()]
    if name not in JOBS:
        own = [record for record in records if record.get("table") == name]
        # If a row was measured again, the last one counts.
        records = list({record["title"]: record for record in own}.values())
    if not records:
        raise ConfigError(f"{path}: no records for the table {name} in {files}.")
    return records


def _grid(name: str, records: list[Record], title: str) -> Grid:
    if name == "accuracies":
        return report.accuracies(_only_panel(records))
    if name == "against":
        return report.against(_only_panel(records), title)
    if name == "standing":
        return report.standing(report.panels(records), title)
    if name == "distances":
        return report.distances(report.panels(records))
    if name in JOBS:
        return (report.sizes if name == "sizes" else report.table)(records, title)
    return show.grid(name, records)


def _only_panel(records: list[Record]) -> Panel:
    (panel,) = report.panels(records)
    return panel


def _origin(records: list[Record]) -> str:
    """A sentence with the commits and the machines that the records come from."""
    commits = ", ".join(dict.fromkeys(f"`{record['commit'][:7]}`" for record in records))
    machines = "; ".join(
        dict.fromkeys(
            f"{record['hardware']['cpu']}, {_cores(record['hardware']['cpu_count'])}, "
            f"jax {record['versions']['jax']}, Python {record['versions']['python']}"
            for record in records
        )
    )
    return f"Measured at {commits} on {machines}."


def _cores(number: int) -> str:
    return f"{number} core{'s' * (number > 1)}"
