"""Makes the report of stores: its files, and its contents as JSON."""

import pathlib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rich.console

from experiments.config import DENSE
from experiments.report import figures, page, statistics, tables
from experiments.report import records as own
from experiments.report.records import Group, Panel, Pick
from experiments.store import Record, plain

PAGE = "report.html"
"""Name of the page in the folder of a report."""


def write(paths: Sequence[pathlib.Path], folder: pathlib.Path | None = None) -> dict[str, Any]:
    """Writes the page and the figures of stores.

    Args:
        paths: Stores, or folders that hold a results.jsonl.
        folder: Where the files go; by default "report" beside the first store.

    Returns:
        What the tables hold, as JSON has it, with the "files" that were written.

    Raises:
        ConfigError: No store holds a job.
    """
    records = own.read(paths)
    panels = own.panels(records)
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    target = folder or first / "report"
    command = ["python", "-m", "experiments", "report", *map(str, paths)]
    command += ["--out", str(folder)] if folder else []
    differences = {
        panel.title: [
            pair
            for sparsity in panel.sparsities
            for pair in statistics.differences(panel, sparsity)
        ]
        for panel in panels
    }
    target.mkdir(parents=True, exist_ok=True)
    written = [target / PAGE]
    drawn: dict[str, dict[str, str]] = {}
    for title, kind, figure in _draw(panels):
        name = "-".join([kind, *re.findall(r"\w+", title.lower())])
        svg = drawn.setdefault(title, {})[kind] = figures.svg(figure, name)
        picture = target / f"{name}.png"
        figures.save(figure, picture)
        picture.with_suffix(".svg").write_text(figures.standalone(svg))
        written += [picture, picture.with_suffix(".svg")]
    text = page.html_page(records, panels, differences, drawn, shlex.join(command))
    written[0].write_text(text)
    document = {
        "command": shlex.join(command),
        "files": [str(file) for file in written],
        "panels": [_panel(panel, differences[panel.title]) for panel in panels],
        "failed": [
            {name: record.get(name) for name in ("config", "error", "source")}
            for record in own.failed(records)
        ],
    }
    return plain(document)


def show(records: Sequence[Record], files: Sequence[str], console: rich.console.Console) -> None:
    """Prints the tables of a report and where its files are."""
    panels = own.panels(records)
    for grid in (*tables.by_panel(panels), tables.pruning_times(panels)):
        console.print(grid.rich())
    console.print("\n".join(files), soft_wrap=True, highlight=False, markup=False)


def _draw(panels: Sequence[Panel]) -> Iterator[tuple[str, str, figures.Figure]]:
    """Yields all figures, each with its panel's title, empty for all panels, and its kind."""
    if len(panels) > 1:
        yield "", "accuracy", figures.accuracy(panels)
    for panel in panels:
        yield panel.title, "accuracy", figures.accuracy([panel])
        if panel.sparsities:
            yield panel.title, "paths", figures.paths(panel)
            yield panel.title, "layers", figures.layers(panel)


def _panel(panel: Panel, differences: Sequence[statistics.Difference]) -> dict[str, Any]:
    return {
        "title": panel.title,
        "settings": panel.settings,
        "groups": [_group(group) for group in panel.groups],
        "differences": [vars(pair) | {"apart": pair.apart} for pair in differences],
        "prune_seconds": {
            method: _numbers(tables.pruning_seconds(panel, method))
            for method in panel.methods
            if method != DENSE
        },
    }


def _group(group: Group) -> dict[str, Any]:
    picks: dict[str, Pick] = {
        "test_accuracy": own.last,
        "best_test_accuracy": own.best,
        "prune_seconds": own.prune_seconds,
        "effective": own.effective,
    }
    picks |= {key: own.topology(key) for key in ("weights", "nodes", "kernels", "log_paths")}
    return {
        "method": group.method,
        "sparsity": group.sparsity,
        "seeds": [record["config"]["seed"] for record in group.records],
        "missing": group.missing,
        "diverged": group.diverged,
        "records": [record["source"] for record in group.records],
    } | {name: _numbers(group.values(pick)) for name, pick in picks.items()}


def _numbers(values: np.ndarray) -> dict[str, Any]:
    """All values, and the mean and the sample deviation of the finite ones."""
    finite = values[np.isfinite(values)]
    return {
        "values": values.tolist(),
        "mean": float(finite.mean()) if len(finite) else None,
        "deviation": float(finite.std(ddof=1)) if len(finite) > 1 else None,
    }
