"""Runs benchmarks and prints their tables."""

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.figure
import rich.console

from experiments.benchmarks import cold, smaller
from experiments.benchmarks import rows as measured
from experiments.benchmarks.rows import Row
from experiments.grid import Grid
from experiments.store import Store

Columns = Mapping[str, Callable[[Row], str]]

ROWS = "rows.jsonl"
"""Name of the store in a folder of benchmarks."""


def run(
    names: Sequence[str],
    seeds: int,
    python: str | None,
    folder: pathlib.Path,
    console: rich.console.Console,
) -> None:
    """Measures rows that are not in the store yet, and prints a table for each name.

    Args:
        names: Names of tables.
        seeds: Repetitions where masks are compared.
        python: A Python that has PyTorch, or None to leave PyTorch out.
        folder: The folder of the store.
        console: Where to print.
    """
    jobs = {
        "cold": cold.cold,
        "rivals": cold.rivals,
        "growth": cold.growth,
        "many": cold.many,
        "compact": smaller.compact,
        "sparse": smaller.sparse,
        "step": lambda: measured.step(python),
        "training": lambda: measured.training(python),
        "large": measured.large,
        "settings": lambda: measured.settings(seeds),
        "quality": lambda: measured.quality(seeds),
    }
    for name in names:
        rows = []
        for row in measured.measure(name, jobs[name](), Store(folder / ROWS)):
            console.print(f"{name}: {row['title']}", highlight=False, markup=False, soft_wrap=True)
            rows.append(row)
        console.print(grid(name, rows).rich())


def plot(name: str, rows: Sequence[Row], path: pathlib.Path) -> None:
    """Writes the plot of a table as PNG.

    Args:
        name: Name of the table.
        rows: Its rows.
        path: Where the picture goes.
    """
    figure = matplotlib.figure.Figure(figsize=(6.4, 3.6), layout="constrained", dpi=150)
    _PLOTS[name](figure.subplots(), rows)
    figure.savefig(path)


def _plot_growth(axes: Any, rows: Sequence[Row]) -> None:
    for family in dict.fromkeys(row["family"] for row in rows):
        own = sorted((row for row in rows if row["family"] == family), key=lambda r: r["depth"])
        depths = [row["depth"] for row in own]
        medians, least, most = (
            [row["seconds"][which] for row in own] for which in ("median", "min", "max")
        )
        unit = "layers" if family == "ResNet" else "blocks"
        (line,) = axes.plot(depths, medians, "o-", lw=1.6, ms=4, label=f"{family}, {unit}")
        axes.fill_between(depths, least, most, color=line.get_color(), alpha=0.2, lw=0)
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.set_xlabel("depth")
    axes.set_ylabel("seconds of the first call")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.legend(frameon=False)


def grid(name: str, rows: Sequence[Row]) -> Grid:
    """Returns the table of a name from its rows."""
    return _TABLES[name](rows)


def _grid(title: str, columns: Columns, rows: Sequence[Row]) -> Grid:
    return Grid.of(title, columns, rows, left=("network", "settings"))


def _step(rows: Sequence[Row]) -> Grid:
    def ratio(to: str) -> Callable[[Row], str]:
        return lambda r: f"{r[to] / r['seconds']['median']:.0f}" if r.get(to) else ""

    def number(key: str) -> Callable[[Row], str]:
        return lambda r: f"{r[key]:.1f}" if key in r else ""

    columns: Columns = {
        "network": lambda r: r["network"],
        "weights": lambda r: f"{r['weights']:,}",
        "step": lambda r: r["step"],
        "ms": lambda r: _range(r["seconds"], 1e-3, 1),
        "× memory": number("times_the_memory"),
        "arrays": number("array_bytes_a_weight"),
        "process": number("bytes_a_weight"),
        "PyTorch / it": ratio("peer"),
        "published / it": ratio("published"),
    }
    title = "One step of DPaI, 90 %: milliseconds (least–most), bytes a weight: arrays, process"
    return _grid(title, columns, [step for row in rows for step in _steps(row)])


def _steps(row: Row) -> list[Row]:
    """The steps on one network: those of the library, and PyTorch's if it was measured."""
    shared = {"network": row["title"], "weights": row["default"]["weights"]}
    seconds = {"published": _published(row), "peer": row.get("peer", {}).get("median")}
    steps = [shared | seconds | {"step": name} | row[name] for name in measured.TIMED]
    if "peer" in row:
        steps.append(shared | {"step": "PyTorch", "seconds": row["peer"]})
    return steps


def _range(seconds: Mapping[str, float], unit: float, digits: int) -> str:
    median, least, most = (f"{seconds[k] / unit:,.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} ({least}–{most})"


def _published(row: Row) -> float:
    return next(s for name, s in measured.PUBLISHED.items() if row["title"].startswith(name))


def _cold(rows: Sequence[Row]) -> Grid:
    def seconds(key: str, digits: int) -> Callable[[Row], str]:
        return lambda r: _range(r[key], 1, digits) if key in r else ""

    columns: Columns = {
        "network": lambda r: r["title"],
        "first call, s": seconds("first", 1),
        "second call, s": seconds("second", 1),
        "compiled: another key and sparsity": seconds("again", 2),
        "compiled: a function made anew": seconds("anew", 2),
        "first call, cached on disk": seconds("disk", 1),
        "compiling a training step": seconds("training", 1),
    }
    return _grid("dpai.prune with the defaults: seconds (least–most)", columns, rows)


def _rivals(rows: Sequence[Row]) -> Grid:
    columns: Columns = {
        "network": lambda r: r["network"],
        "first call": lambda r: r["call"],
        "seconds": lambda r: _range(r["seconds"], 1, 1),
    }
    return _grid("First calls of all methods: seconds (least–most)", columns, rows)


def _growth(rows: Sequence[Row]) -> Grid:
    columns: Columns = {
        "network": lambda r: r["family"],
        "depth": lambda r: f"{r['depth']}",
        "first call, s": lambda r: _range(r["seconds"], 1, 1),
    }
    return _grid("The first call against the depth: seconds (least–most)", columns, rows)


def _many(rows: Sequence[Row]) -> Grid:
    def ratio(row: Row) -> str:
        return f"{row['one_by_one']['median'] / row['together']['median']:.2f}"

    columns: Columns = {
        "network": lambda r: r["title"],
        "number": lambda r: f"{r['number']}",
        "one by one, ms": lambda r: _range(r["one_by_one"], 1e-3, 1),
        "in one program, ms": lambda r: _range(r["together"], 1e-3, 1),
        "times as fast": ratio,
    }
    return _grid("Many at once: milliseconds (least–most)", columns, rows)


def _compact(rows: Sequence[Row]) -> Grid:
    def pair(field: str) -> Callable[[Row], str]:
        return lambda r: f"{r[f'{field} before']:,} → {r[f'{field} after']:,}"

    columns: Columns = {
        "network": lambda r: r["network"],
        "method": lambda r: r["method"],
        "sparsity": lambda r: f"{r['sparsity']:.2%}",
        "weights": pair("weights"),
        "kB": lambda r: f"{r['bytes before'] / 1e3:,.0f} → {r['bytes after'] / 1e3:,.1f}",
        "multiply-adds": pair("multiply_adds"),
        "masked, ms": lambda r: _range(r["masked"], 1e-3, 2),
        "compact, ms": lambda r: _range(r["seconds"], 1e-3, 2),
        "times faster": lambda r: (
            f"{r['masked']['median'] / r['seconds']['median']:.1f}" if r["weights after"] else "–"
        ),
    }
    title = "Masked and compact, of one input; milliseconds of 32 inputs (least–most)"
    flat = [
        {"network": row["network"], "method": row["method"], "masked": row["seconds"]} | at
        for row in rows
        for at in row["at"]
    ]
    return _grid(title, columns, flat)


def _sparse(rows: Sequence[Row]) -> Grid:
    columns: Columns = {
        "matrix": lambda r: r["title"],
        "sparsity": lambda r: f"{r['sparsity']:.2%}",
        **{
            f"{name}, ms": lambda r, name=name: _range(r[name], 1e-3, 3)  # type: ignore[misc]
            for name in smaller.FORMATS
        },
    }
    title = "A matrix times a batch of 32: milliseconds (least–most)"
    flat = [{"title": row["title"]} | at for row in rows for at in row["at"]]
    return _grid(title, columns, flat)


def _training(rows: Sequence[Row]) -> Grid:
    def peer(layout: str) -> Callable[[Row], str]:
        key = f"peer {layout}"
        return lambda r: _range(r[key], 1, 2) if key in r else "–"

    columns: Columns = {
        "network": lambda r: r["title"],
        "s a step": lambda r: _range(r["seconds"], 1, 2),
        "PyTorch s": peer("contiguous_format"),
        "PyTorch s, channels last": peer("channels_last"),
    }
    return _grid("One step of training, batch 128: seconds (least–most)", columns, rows)


def _large(rows: Sequence[Row]) -> Grid:
    columns: Columns = {
        "network": lambda r: r["title"],
        "weights": lambda r: f"{r['weights']:,}",
        "seconds": lambda r: f"{r['seconds']:.0f}",
        "again": lambda r: f"{r['seconds_again']:.1f}",
        "steps": lambda r: f"{r['steps']}",
        "peak GiB": lambda r: f"{r['peak_bytes'] / 2**30:.1f}",
        "effective": lambda r: f"{r['effective']:,}",
        "nodes": lambda r: f"{r['nodes']:,}",
        "log-paths": lambda r: _number(r["log_paths"]),
    }
    return _grid("dpai.prune with the defaults, 90 %", columns, rows)


def _settings(rows: Sequence[Row]) -> Grid:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["sparsity"], row["method"]), []).append(row)
    columns: Columns = {
        "network": lambda r: r["network"],
        "sparsity": lambda r: f"{r['sparsity']:.2%}",
        "settings": lambda r: r["method"],
        "log-paths": lambda r: _spread([row["log_paths"] for row in r["rows"]]),
        "nodes": lambda r: f"{r['nodes']:,.0f}",
        "kernels": lambda r: f"{r['kernels']:,.0f}",
        "effective": lambda r: f"{r['effective']:,.0f}",
        "objective": lambda r: _number(_objective(r)),
        "steps": lambda r: f"{r['steps']:.0f}",
        "seconds": lambda r: f"{statistics.median(row['seconds'] for row in r['rows']):.1f}",
    }
    names = ("log_paths", "nodes", "kernels", "effective", "steps")
    means = [
        group[0] | {"rows": group} | {name: _mean([row[name] for row in group]) for name in names}
        for group in groups.values()
    ]
    return _grid("Settings of DPaI: exact counts of the final masks", columns, means)


def _objective(row: Row, alpha: float = 0.99, beta: float = 0.5) -> float:
    """The objective of Algorithm 1, with the published weights."""
    balance = (1 - beta) * row["nodes"] + beta * row["kernels"]
    return float((1 - alpha) * row["log_paths"] + alpha * balance)


def _quality(rows: Sequence[Row]) -> Grid:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["sparsity"]), []).append(row)

    def pair(name: str, digits: int) -> Callable[[Row], str]:
        return lambda r: " / ".join(
            f"{_mean([row[c][name] for row in r['rows']]):,.{digits}f}"
            for c in ("exact", "mean_field")
        )

    columns: Columns = {
        "network": lambda r: r["network"],
        "sparsity": lambda r: f"{r['sparsity']:.2%}",
        "seeds": lambda r: str(len(r["rows"])),
        "log-paths": pair("log_paths", 2),
        "nodes": pair("nodes", 0),
        "kernels": pair("kernels", 0),
        "effective": pair("effective", 0),
        "seconds": pair("seconds", 1),
    }
    merged = [
        {"network": network, "sparsity": sparsity, "rows": group}
        for (network, sparsity), group in groups.items()
    ]
    return _grid("Optimised exactly / in the mean field: exact objectives", columns, merged)


def _mean(values: Sequence[float | None]) -> float:
    return statistics.fmean(float("nan") if value is None else value for value in values)


def _spread(values: Sequence[float | None]) -> str:
    if len(values) < 2 or None in values:
        return _number(_mean(values))
    return f"{_mean(values):.2f} ± {statistics.stdev(v for v in values if v is not None):.2f}"


def _number(value: float | None) -> str:
    return "no path" if value is None or value != value else f"{value:.2f}"


_PLOTS: Mapping[str, Callable[[Any, Sequence[Row]], None]] = {"growth": _plot_growth}

_TABLES: Mapping[str, Callable[[Sequence[Row]], Grid]] = {
    "cold": _cold,
    "rivals": _rivals,
    "growth": _growth,
    "many": _many,
    "compact": _compact,
    "sparse": _sparse,
    "step": _step,
    "training": _training,
    "large": _large,
    "settings": _settings,
    "quality": _quality,
}
