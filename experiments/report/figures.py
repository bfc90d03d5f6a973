"""Pictures of finished jobs."""

import functools
import io
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import matplotlib.lines
import matplotlib.patheffects
import matplotlib.ticker
import numpy as np

from experiments.config import DENSE, percent
from experiments.report import records as own
from experiments.report import style
from experiments.report.records import Group, Panel
from experiments.store import Record

Figure = mpl.figure.Figure

_SETTINGS: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.edgecolor": style.MUTED,
    "axes.labelcolor": style.INK,
    "axes.titlecolor": style.INK,
    "axes.facecolor": style.PAPER,
    "figure.facecolor": style.PAPER,
    "text.color": style.INK,
    "xtick.color": style.MUTED,
    "ytick.color": style.MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": style.RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "svg.fonttype": "path",  # the viewer needs no font
    "svg.hashsalt": "report",  # the same bytes for the same records
}
_styled = mpl.rc_context(_SETTINGS)


@_styled
def accuracy(panels: Sequence[Panel]) -> Figure:
    """Draws the paper's figure: test accuracy against sparsity, with panels side by side."""
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width = 4.4 if len(panels) > 1 else 5.2
    figure = _figure(width * columns, 3.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in itertools.zip_longest(grid, panels):
        if panel is None:
            axes.set_axis_off()
        else:
            _draw_accuracy(axes, panel)
            axes.set_title(panel.title, loc="left", weight="bold")
    _legend(figure, dict.fromkeys(name for panel in panels for name in panel.methods))
    return figure


@_styled
def paths(panel: Panel) -> Figure:
    """Draws nodes and kernels against log-paths: a row for each sparsity, a point for each job.

    A line joins the means of the methods that no other one surpasses in paths, nodes and kernels
    at once: the front, as `dpai_jax.pareto` finds it over α.
    """

    def draw(axes: Any, group: Group, key: str) -> None:
        look = style.look(group.method)
        points = group.values(own.topology("log_paths")), group.values(own.topology(key))
        axes.plot(*points, ls="none", color=look.color, alpha=0.85, **look.markers)

    columns = {name: functools.partial(draw, key=name) for name in ("nodes", "kernels")}
    figure = _by_sparsity(panel, columns, "log-paths")
    places = itertools.product(panel.sparsities, columns)
    for axes, (sparsity, name) in zip(figure.axes, places, strict=True):
        front = panel.front(sparsity)
        x, y = ([g.values(own.topology(key)).mean() for g in front] for key in ("log_paths", name))
        axes.plot(x, y, color=style.MUTED, lw=1, ls=(0, (1, 1.5)), zorder=1)
    for axes in figure.axes:
        axes.margins(0.12)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))
    return figure


@_styled
def layers(panel: Panel) -> Figure:
    """Draws the share of each layer's weights that are effective, and of outputs on a path."""

    def draw(axes: Any, group: Group, part: str, whole: str) -> None:
        look = style.look(group.method)
        shares = shares_by_layer(group, part, whole)
        order = np.arange(1, len(shares) + 1)
        axes.plot(
            order, shares, color=look.color, ls=look.line, lw=1.2, ms=3, clip_on=False,
            **look.markers | {"markeredgewidth": 0.7},
        )  # fmt: skip

    columns = {
        "effective weights / kept": functools.partial(draw, part="effective", whole="weights"),
        "outputs on a path / all": functools.partial(draw, part="nodes", whole="outputs"),
    }
    figure = _by_sparsity(panel, columns, "layer, from input to output")
    for axes in figure.axes:
        axes.set_ylim(0, 1.04)
        axes.set_yticks((0, 0.5, 1))
        axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
    return figure


def shares_by_layer(group: Group, part: str, whole: str) -> np.ndarray:
    """Returns the mean over seeds of a quotient of two numbers, for each layer.

    The share is 0 where the second number is 0, as in a layer without kept weights.
    """
    tables = [record["metrics"]["topology"]["layers"] for record in group.records]
    shares = [[layer[part] / max(layer[whole], 1) for layer in rows] for rows in tables]
    return np.mean(shares, axis=0)


@_styled
def draw(records: Sequence[Record], path: pathlib.Path, title: str) -> None:
    """Writes a PNG: test accuracy by sparsity, and how much of each layer is on a path.

    Args:
        records: Finished jobs of one recipe on one data set and network.
        path: Where the picture goes.
        title: Its heading.
    """
    (panel,) = own.panels(records)
    figure = _figure(9.6, 3.6)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, weight="bold")
    left, right = figure.subplots(1, 2)
    _draw_accuracy(left, panel)
    left.set_title("Test accuracy after the last epoch", loc="left")
    highest = panel.sparsities[-1]
    for group in panel.at(highest):
        shares = shares_by_layer(group, "nodes", "outputs")
        look = style.look(group.method)
        order = np.arange(1, len(shares) + 1)
        right.plot(order, shares, color=look.color, ls=look.line, **look.markers)
    right.set_ylim(0, 1.04)
    right.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
    right.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    right.set_xlabel("layer, from input to output")
    right.set_title(f"Outputs of each layer on a path, at {percent(highest)}", loc="left")
    _legend(figure, panel.methods)
    save(figure, path)


@_styled
def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


@_styled
def svg(figure: Figure, name: str) -> str:
    """Returns a figure as an SVG element for a page.

    Args:
        figure: The figure.
        name: A prefix of its ids, so that those of two figures on a page differ.
    """
    with io.StringIO() as file:
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # Without width and height it fills the place where it stands.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1).strip()


def standalone(element: str) -> str:
    """Returns an element made by `svg` as a file, which is dark if its viewer is."""
    styled = element.replace(">", f"><style>{dark_rules()}</style>", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{styled}\n'


def dark_rules() -> str:
    """Returns CSS that gives figures their dark colours in dark mode.

    The figures themselves have the light colours, so they look right without CSS.
    """
    rules = (
        f'svg [style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in style.DARK.items()
        for what in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme:dark){{{''.join(rules)}}}"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _draw_accuracy(axes: Any, panel: Panel) -> None:
    """Draws means over seeds with sample deviations; sparsities 1 − 10^−c are evenly spaced."""
    places = {sparsity: -math.log10(1.0 - sparsity) for sparsity in panel.sparsities}
    methods = [method for method in panel.methods if method != DENSE]
    halo = mpl.patheffects.withStroke(linewidth=2, foreground=style.PAPER)
    span = max(places.values(), default=1.0) - min(places.values(), default=0.0) or 1.0
    for number, method in enumerate(methods):
        look = style.look(method)
        groups = [g for g in panel.groups if g.method == method and g.accuracies]
        # Shifted a little, so that bars of equal methods don't hide each other.
        shift = 0.006 * span * (number - (len(methods) - 1) / 2)
        x = [places[group.sparsity] + shift for group in groups]
        means, deviations = _means([group.accuracies.values() for group in groups])
        axes.errorbar(
            x, means, deviations, color=look.color, ls=look.line, elinewidth=1, capsize=1.5,
            **look.markers,
        )  # fmt: skip
        for at, mean, group in zip(x, means, groups, strict=True):
            if len(group.accuracies) < group.seeds:
                axes.annotate(
                    f"{len(group.accuracies)} of {group.seeds}", (at, mean), (5, -8),
                    textcoords="offset points", fontsize=7, color=style.INK,
                    path_effects=[halo],
                )  # fmt: skip
    if panel.dense is not None and panel.dense.accuracies:
        (mean,), (deviation,) = _means([panel.dense.accuracies.values()])
        color = style.look(DENSE).color
        axes.axhline(mean, color=color, lw=1.3, ls=(0, (5, 2)))
        axes.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.18, lw=0)
    axes.set_xticks(list(places.values()), [percent(sparsity) for sparsity in places])
    axes.minorticks_off()
    axes.margins(x=0.09)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_xlabel("sparsity")
    axes.set_ylabel("test accuracy")


def _means(samples: Iterable[Iterable[float]]) -> tuple[list[float], list[float]]:
    """The mean and the sample deviation of each sample; the deviation of one value is 0."""
    arrays = [np.array(list(sample)) for sample in samples]
    deviations = [float(a.std(ddof=1)) if len(a) > 1 else 0.0 for a in arrays]
    return [float(a.mean()) for a in arrays], deviations


def _by_sparsity(
    panel: Panel, columns: Mapping[str, Callable[[Any, Group], None]], xlabel: str
) -> Figure:
    """Draws a row of axes for each sparsity; a function draws each column."""
    sparsities = panel.sparsities
    figure = _figure(5.2, 1.55 * len(sparsities) + 1.2)
    figure.suptitle(panel.title, x=0.01, ha="left", fontsize=10, weight="bold")
    grid = figure.subplots(len(sparsities), len(columns), squeeze=False)
    for row, sparsity in zip(grid, sparsities, strict=True):
        for axes, (title, draw_group) in zip(row, columns.items(), strict=True):
            for group in panel.at(sparsity):
                draw_group(axes, group)
            axes.tick_params(labelsize=8)
            axes.set_title(f"{title}, at {percent(sparsity)}", loc="left", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    _legend(figure, [method for method in panel.methods if method != DENSE])
    return figure


def _legend(figure: Figure, methods: Iterable[str]) -> None:
    handles = []
    for method in methods:
        look = style.look(method)
        line = (0, (5, 2)) if method == DENSE else look.line
        handles.append(
            mpl.lines.Line2D([], [], color=look.color, ls=line, label=method, **look.markers)
        )
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, fontsize=9,
            handlelength=2.2, columnspacing=1.4,
        )  # fmt: skip
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    # The panels keep the height that they have above a legend of two rows.
    rows = math.ceil(len(handles) / columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(rows - 2, 0))
