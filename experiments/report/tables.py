"""Tables of finished jobs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.config import DENSE, percent
from experiments.grid import Cells, Grid
from experiments.report import records as own
from experiments.report import statistics
from experiments.report.records import Group, Panel, Pick
from experiments.report.statistics import Difference
from experiments.store import Record

FEWER = "†"
"""Marks a number that comes from fewer seeds than its neighbours."""


def table(records: Sequence[Record], title: str) -> Grid:
    """Makes a table with one row for each method and sparsity: means over the seeds.

    Accuracies are those of the test split, with the sample deviation if there are several seeds.

    Args:
        records: Jobs of one recipe on one data set and network.
        title: Its heading.
    """
    return _results(own.group(records), title, detailed=False)


def by_panel(panels: Sequence[Panel]) -> list[Grid]:
    """Makes a table like `table` for each recipe on each data set and network."""
    return [_results(panel.groups, panel.title, detailed=False) for panel in panels]


def results(panel: Panel) -> Grid:
    """Makes the table of a panel that also names the records of each row."""
    return _results(panel.groups, panel.title, detailed=True)


def sizes(records: Sequence[Record], title: str) -> Grid:
    """Makes the table of networks of several widths, by how many weights each has on a path.

    Args:
        records: Jobs on one data set, by kernels, by channels and dense.
        title: Its heading.
    """
    found = [(panel.settings, group) for panel in own.panels(records) for group in panel.groups]
    found.sort(key=lambda pair: -pair[1].values(own.topology("effective")).mean())
    rows = [
        (
            f"{settings.get('width', '–')}",
            group.method,
            "–" if group.method == DENSE else percent(group.sparsity),
            settings.get("granularity", "–"),
            _whole(group, "weights"),
            _whole(group, "effective"),
            _accuracy(group, own.last),
            mean_of(group, own.best),
            f"{len(group.records)}",
        )
        for settings, group in found
    ]
    headings = ("width", "method", "sparsity", "by", "weights", "effective", "test %", "best %")
    return Grid(
        title,
        (*headings, "seeds"),
        tuple(rows),
        left=("method", "by"),
        caption="effective: weights on a path; test: last epoch; best: epoch of best validation",
    )


def accuracies(panel: Panel) -> Grid:
    """Makes the paper's table of a panel: test accuracy by method and sparsity."""
    by_cell = {(group.method, group.sparsity): group for group in panel.groups}
    rows = [
        (method, *(_cell(by_cell.get((method, sparsity))) for sparsity in panel.sparsities))
        for method in panel.methods
        if method != DENSE
    ]
    caption = ["percent, last epoch"]
    caption += [f"dense: {_cell(panel.dense)}"] * (panel.dense is not None)
    caption += [f"{FEWER} fewer seeds than others"] * any(FEWER in cell for r in rows for cell in r)
    return Grid(
        f"{panel.title}: test accuracy",
        ("method", *map(percent, panel.sparsities)),
        tuple(rows),
        left=("method",),
        caption="; ".join(caption),
    )


def _cell(group: Group | None) -> str:
    if group is None:
        return "–"
    return _accuracy(group, own.last) + f" {FEWER}" * bool(group.missing)


def _results(groups: Sequence[Group], title: str, detailed: bool) -> Grid:
    rows: list[Cells | None] = []
    for number, row in enumerate(groups):
        if number and row.sparsity != groups[number - 1].sparsity:
            rows.append(None)
        cells = {
            "sparsity": percent(row.sparsity),
            "method": row.method + f" {FEWER}" * bool(row.missing),
            "test %": _accuracy(row, own.last),
            "best %": mean_of(row, own.best),
            "nodes": _whole(row, "nodes"),
            "kernels": _whole(row, "kernels"),
            "log-paths": _log_paths(row),
            "prune s": _prune_seconds(row),
        }
        if detailed:
            cells |= {
                "weights": _whole(row, "weights"),
                "effective %": f"{100 * row.values(own.effective).mean():.1f}",
                "seeds": f"{len(row.records)} of {row.seeds}",
                "records": lines(row.records),
            }
        rows.append(tuple(cells.values()))
    caption = "test: last epoch; best: epoch of best validation; nodes, kernels: those on a path"
    missing = any(row.missing for row in groups)
    return Grid(
        title,
        tuple(cells) if groups else (),
        tuple(rows),
        left=("method", "records"),
        caption=caption + f"; {FEWER} fewer seeds than others" * missing,
    )


def pruning_times(panels: Sequence[Panel]) -> Grid:
    """Makes the table of the seconds that each method took to prune each network."""
    rows: list[Cells | None] = []
    for number, panel in enumerate(panels):
        rows += [None] if number else []
        for method in panel.methods:
            if method != DENSE:
                values = pruning_seconds(panel, method)
                spread = (f"{number:,.2f}" for number in (values.min(), values.max()))
                mean = mean_and_deviation(values, 1.0, 2)
                rows.append((panel.title, method, mean, *spread, f"{len(values)}"))
    return Grid(
        "Seconds of pruning",
        ("network", "method", "mean ± deviation", "least", "most", "jobs"),
        tuple(rows),
        left=("network", "method"),
        caption="by the clock, over all sparsities and seeds; the first job of a process compiles",
    )


def pruning_seconds(panel: Panel, method: str) -> np.ndarray:
    """Returns the seconds of each pruning by a method, over all sparsities and seeds."""
    groups = [group for group in panel.groups if group.method == method]
    return np.concatenate([group.values(own.prune_seconds) for group in groups])


def differences(panel: Panel, found: Sequence[Difference]) -> Grid:
    """Makes the table of the differences between methods."""

    def probability(p: float | None) -> str:
        return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"

    rows: list[Cells | None] = []
    for number, pair in enumerate(found):
        if number and pair.sparsity != found[number - 1].sparsity:
            rows.append(None)
        interval = "–"
        if pair.low is not None and pair.high is not None:
            interval = f"{100 * pair.low:+.2f} to {100 * pair.high:+.2f}"
        cells = (
            percent(pair.sparsity),
            f"{pair.better} − {pair.other}",
            f"{100 * pair.mean:+.2f}",
            interval,
            f"{len(pair.seeds)}",
            probability(pair.p),
            probability(pair.p_holm),
            "apart" if pair.apart else "not told apart",
        )
        rows.append(cells)
    return Grid(
        f"{panel.title}: differences of test accuracy, in points",
        ("sparsity", "methods", "mean", "95 % interval", "seeds", "p", "p, Holm", "verdict"),
        tuple(rows),
        left=("methods", "verdict"),
        caption="last epoch; paired by seed; –: no test, as there is one seed or no spread",
    )


def against(panel: Panel, method: str) -> Grid:
    """Makes the table of what one method is ahead of each other one, in points of accuracy."""
    found, smallest = {}, []
    for sparsity in panel.sparsities:
        pairs = statistics.differences(panel, sparsity, method)
        tested = [pair.found for pair in pairs if pair.found is not None]
        smallest.append(f"{100 * np.median(tested):.2f}" if tested else "–")
        for pair in pairs:
            lead, other = pair.lead(method)
            verdict = "" if not pair.apart else " ahead" if pair.better == method else " behind"
            found[other, sparsity] = f"{100 * lead:+.2f}" + verdict
    rows = [
        (other, *(found.get((other, sparsity), "–") for sparsity in panel.sparsities))
        for other in panel.methods
        if other not in (DENSE, method)
    ]
    rows.append(("*found in 80 % of tests*", *smallest))
    return Grid(
        f"{panel.title}: {method} less another method, in points of test accuracy",
        (f"{method} less", *map(percent, panel.sparsities)),
        tuple(rows),
        left=(f"{method} less",),
        caption="ahead, behind: told apart by a paired t-test over seeds, at 5 % in each column "
        "after Holm's correction; last row: the true difference that such a test finds four times "
        "in five before the correction, at the spread of the column's middle pair; last epoch",
    )


def jobs(panels: Sequence[Panel]) -> Grid:
    """Makes the table of all records in the report."""
    rows: list[Cells | None] = []
    for panel in panels:
        for group in panel.groups:
            for record in group.records:
                metrics = record["metrics"]
                end = metrics.get("diverged")
                cells = (
                    record["source"],
                    panel.title,
                    percent(group.sparsity),
                    group.method,
                    f"{record['config']['seed']}",
                    _one(own.last(metrics)),
                    _one(own.best(metrics)),
                    f"{metrics['prune_seconds']:.2f}",
                    "" if end is None else f"diverged in epoch {end}",
                    record.get("commit", "unknown")[:7],
                )
                rows.append(cells)
    headings = "record", "network", "sparsity", "method", "seed", "test %", "best %", "prune s"
    return Grid(
        "Every job",
        (*headings, "note", "commit"),
        tuple(rows),
        left=("record", "network", "method", "note", "commit"),
    )


def lines(records: Sequence[Record]) -> str:
    """Returns the files and lines of records: "results.jsonl:3, 8"."""
    by_file: dict[str, list[str]] = {}
    for record in records:
        file, _, line = record["source"].rpartition(":")
        by_file.setdefault(file.rpartition("/")[2], []).append(line)
    return "; ".join(f"{file}:{', '.join(numbers)}" for file, numbers in by_file.items())


def mean_and_deviation(values: np.ndarray, scale: float, digits: int) -> str:
    """Formats the mean and, if there are several values, the sample deviation."""
    mean = f"{scale * values.mean():,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * values.std(ddof=1):,.{digits}f}"


def _one(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy:.2f}"


def _accuracy(row: Group, pick: Pick) -> str:
    """The mean and the deviation over runs that did not diverge, and how many did."""
    lost = f" ({row.diverged} of {len(row.records)} diverged)" if row.diverged else ""
    return f"{mean_of(row, pick)}{lost}"


def mean_of(row: Group, pick: Pick) -> str:
    """Formats an accuracy's mean and deviation over the runs that did not diverge, in percent."""
    values = row.values(pick)
    values = values[np.isfinite(values)]
    return mean_and_deviation(values, 100.0, 1) if len(values) else "–"


def _whole(row: Group, key: str) -> str:
    return f"{row.values(own.topology(key)).mean():,.0f}"


def _log_paths(row: Group) -> str:
    mean: Any = row.values(own.topology("log_paths")).mean()
    return "no path" if np.isnan(mean) else f"{mean:.1f}"


def _prune_seconds(row: Group) -> str:
    return "–" if row.method == DENSE else f"{row.values(own.prune_seconds).mean():.1f}"
