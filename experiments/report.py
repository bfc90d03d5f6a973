"""Tables and pictures of finished jobs."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from experiments.config import DENSE, percent
from experiments.grid import Grid
from experiments.store import Record

COLORS = {DENSE: "#9a9a9a", "dpai": "#2166ac", "random": "#e08214"}
"""One colour a method, the same in every picture."""

_OTHER_COLORS = ("#1b9e77", "#7b3294", "#d6604d", "#66a61e", "#a6761d", "#e7298a")


@dataclasses.dataclass(frozen=True)
class Group:
    """The records of one method at one sparsity, one for each seed."""

    method: str
    sparsity: float
    records: tuple[Record, ...]

    def values(self, pick: Callable[[dict[str, Any]], float | None]) -> np.ndarray:
        """Returns a number of each record's metrics, NaN for one that isn't finite."""
        picked = [pick(record["metrics"]) for record in self.records]
        return np.array([np.nan if value is None else value for value in picked], float)


def group(records: Sequence[Record]) -> list[Group]:
    """Gathers records by sparsity and method; sparsities rise, methods keep their order."""
    groups: dict[tuple[float, str], list[Record]] = {}
    for record in records:
        config = record["config"]
        groups.setdefault((config["sparsity"], config["method"]), []).append(record)
    # Sorting is stable, so within a sparsity the methods stay in the order of the records.
    keys = sorted(groups, key=lambda key: key[0])
    return [Group(method, sparsity, tuple(groups[sparsity, method])) for sparsity, method in keys]


def table(records: Sequence[Record], title: str) -> Grid:
    """Makes a table with one row for each method and sparsity: means over the seeds.

    Accuracies are those of the test split after the last epoch, with the sample deviation where
    there are several seeds.
    """
    rows: list[tuple[str, ...] | None] = []
    last = None
    for row in group(records):
        if last is not None and row.sparsity != last:
            rows.append(None)
        last = row.sparsity
        cells = (
            percent(row.sparsity),
            row.method,
            _accuracy(row),
            _whole(row, "weights"),
            _whole(row, "nodes"),
            _whole(row, "kernels"),
            _log_paths(row),
            _prune_seconds(row),
        )
        rows.append(cells)
    headings = (
        "sparsity",
        "method",
        "test %",
        "weights",
        "nodes",
        "kernels",
        "log-paths",
        "prune s",
    )
    return Grid(
        title,
        headings,
        tuple(rows),
        left=("method",),
        caption="nodes, kernels: those on a path from input to output; test: last epoch",
    )


def draw(records: Sequence[Record], path: pathlib.Path, title: str) -> None:
    """Writes a PNG: test accuracy by sparsity, and how much of each layer is effective.

    Args:
        records: Finished jobs on one data set and network.
        path: Where the picture goes.
        title: Its heading.
    """
    groups = group(records)
    figure = matplotlib.figure.Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, weight="bold")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _draw_accuracy(left, groups)
    _draw_nodes(right, groups)
    figure.legend(*_one_of_each(left), frameon=False, ncols=6, loc="outside lower center")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_accuracy(axes: Any, groups: Sequence[Group]) -> None:
    """Bars of test accuracy, side by side within a sparsity."""
    sparsities = sorted({row.sparsity for row in groups})
    for place, sparsity in enumerate(sparsities):
        rows = [row for row in groups if row.sparsity == sparsity]
        width = 0.8 / max(len(rows), 2)
        for index, row in enumerate(rows):
            x = place + (index - (len(rows) - 1) / 2) * width
            seeds = row.values(lambda metrics: metrics["test_accuracy"])
            if np.isnan(seeds).any():
                axes.text(x, 0.015, "diverged", rotation=90, ha="center", fontsize=8.5)
                continue
            color = _color(row.method, groups)
            axes.bar(x, seeds.mean(), 0.92 * width, color=color, label=row.method)
            axes.text(x, seeds.max() + 0.015, f"{seeds.mean():.1%}", ha="center", fontsize=8.5)
            if len(seeds) > 1:
                axes.plot([x] * len(seeds), seeds, "o", ms=3.5, mfc="white", mec="#333333")
    axes.set_xticks(
        range(len(sparsities)), ["all weights" if s == 0 else percent(s) for s in sparsities]
    )
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xlabel("sparsity")
    axes.set_title("Test accuracy after the last epoch", loc="left", fontsize=10)


def _draw_nodes(axes: Any, groups: Sequence[Group]) -> None:
    """The share of each layer's output channels that lie on a path, at the highest sparsity."""
    highest = max(row.sparsity for row in groups)
    for row in groups:
        if row.sparsity != highest:
            continue
        layers = [record["metrics"]["topology"]["layers"] for record in row.records]
        shares = np.array([[layer["nodes"] / layer["outputs"] for layer in run] for run in layers])
        order = np.arange(1, shares.shape[1] + 1)
        axes.plot(order, shares.mean(0), "o-", ms=4, lw=1.6, color=_color(row.method, groups))
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set_xlabel("layer, in the order of the forward pass")
    axes.set_title(
        f"Channels of each layer on a path, at {percent(highest)} sparsity", loc="left", fontsize=10
    )


def _one_of_each(axes: Any) -> tuple[list[Any], list[str]]:
    """Returns one handle for each label of a legend."""
    by_label = {
        label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    return list(by_label.values()), list(by_label)


def _color(method: str, groups: Sequence[Group]) -> str:
    others = sorted({row.method for row in groups} - set(COLORS))
    if method in COLORS:
        return COLORS[method]
    return _OTHER_COLORS[others.index(method) % len(_OTHER_COLORS)]


def _accuracy(row: Group) -> str:
    """The mean and the deviation; of runs that diverged only how many they are."""
    values = row.values(lambda metrics: metrics["test_accuracy"])
    lost = int(np.isnan(values).sum())
    if lost:
        return f"{lost} of {len(values)} diverged"
    mean = f"{values.mean() * 100:.1f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1) * 100:.1f}"


def _whole(row: Group, key: str) -> str:
    return f"{row.values(lambda metrics: metrics['topology'][key]).mean():,.0f}"


def _log_paths(row: Group) -> str:
    mean = row.values(lambda metrics: metrics["topology"]["log_paths"]).mean()
    return "no path" if np.isnan(mean) else f"{mean:.1f}"


def _prune_seconds(row: Group) -> str:
    if row.method == DENSE:
        return "–"
    return f"{row.values(lambda metrics: metrics['prune_seconds']).mean():.1f}"
