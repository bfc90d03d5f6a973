"""The flow of paths through a network, unit by unit or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpai_jax import checks
from dpai_jax.measuring import Topology, topology
from dpai_jax.paths import Network
from dpai_jax.plot import style
from dpai_jax.plot.graph import Graph, graph_of
from dpai_jax.plot.sources import network_and_masks
from dpai_jax.pruning import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PyTree = Any

# A layer with more features than this, or a network with more weights, is drawn as a band.
_MOST_FEATURES, _MOST_WEIGHTS = 40, 4000
# The widest edge, and what even the thinnest has, in points.
_WIDEST, _THINNEST = 5.0, 0.6


def flow(
    source: Result | Network,
    masks: PyTree | None = None,
    ax: Axes | None = None,
    units: bool | None = None,
) -> Axes:
    """Draws the paths from a network's input to its output.

    A small network is drawn unit by unit: in each unit stands the number of paths from the input to
    it, an edge is as wide as the share of all paths that passes it, and what no path passes is
    grey. A larger one is drawn as a band, as wide as each layer has effective nodes, before the
    grey of all its output features.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> net = dpai.trace(fn, params, jnp.ones((1, 3)))
      >>> ax = dpai.plot.flow(net, jax.tree.map(jnp.ones_like, params))
      >>> [text.get_text() for text in ax.texts][:3]
      ['1', '1', '1']

    Args:
      source: what `prune` returned, or a traced network.
      masks: pytree of masks parallel to the parameters; those of the result if not given.
      ax: where to draw; a new figure if not given.
      units: whether to draw every unit; by default where the network is small.

    Returns:
      The Axes.

    Raises:
      TypeError: if `source` is neither, or `units` is not as said above.
      ValueError: if there are no masks, or a loaded result has no network.
      ImportError: if matplotlib is not installed.
    """
    net, tree = network_and_masks(source, masks)
    if units is None:
        units = net.size <= _MOST_WEIGHTS and all(
            max(layer.size_of(layer.inputs), layer.size_of(layer.outputs)) <= _MOST_FEATURES
            for layer in net.layers
        )
    checks.flag("units", units)
    if units:
        return _draw_units(graph_of(net, tree), ax)
    return _draw_band(topology(net, tree), ax)


def _draw_units(graph: Graph, ax: Axes | None) -> Axes:
    x, y = _places(graph)
    n_columns, tallest = int(x.max()) + 1, float(np.ptp(y)) + 1
    width, height = 1.35 * n_columns + 0.6, min(0.42 * tallest + 0.9, 9.0)
    ax = style.axes(ax, width, height)
    ax.set_axis_off()
    _draw_edges(ax, graph, x, y)
    # The diameter of a unit, and the size of its text, in points.
    across = min(24.0, 0.8 * 72 * (height - 0.9) / tallest)
    colors = np.where(graph.alive, style.BLUE, style.RULE)
    ax.scatter(x, y, s=across**2, c=colors, zorder=3, label="units")
    texts = [_count(number) for number in graph.paths]
    size = min(9.0, 0.42 * across, 1.35 * across / max(map(len, texts)))
    if size >= 4:
        for i, text in enumerate(texts):
            ink = style.PAPER if graph.alive[i] else style.MUTED
            ax.text(x[i], y[i], text, size=size, color=ink, ha="center", va="center", zorder=4)
    _name_columns(ax, graph, x, y)
    ax.set_xlim(-0.55, n_columns - 0.45)
    ax.set_ylim(y.min() - 1.6, y.max() + 1.5)
    return ax


def _places(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Where the units stand: blocks of one column are stacked, each column is centred."""
    x = graph.columns[graph.block].astype(float)
    y = np.zeros(len(x))
    for column in np.unique(x):
        (own,) = np.nonzero(x == column)
        gaps = np.cumsum(np.diff(graph.block[own], prepend=graph.block[own[0]]) != 0)
        down = np.arange(len(own)) + gaps
        y[own] = down[-1] / 2 - down
    return x, y


def _draw_edges(ax: Axes, graph: Graph, x: np.ndarray, y: np.ndarray) -> None:
    from matplotlib.collections import PathCollection

    curves = np.asarray(
        [_curve(x[a], y[a], x[b], y[b]) for a, b in zip(graph.source, graph.target, strict=True)],
        object,
    )
    shares = graph.share / max(graph.share.max(initial=0), 1e-300)
    widths = _THINNEST + (_WIDEST - _THINNEST) * shares
    looks: dict[str, Any] = {
        "dead": {"edgecolors": "#c3c8ce", "linestyles": (0, (3, 2)), "zorder": 1},
        "paths": {"edgecolors": style.BLUE, "alpha": 0.45, "zorder": 2},
    }
    for label, which in (("dead", ~graph.effective), ("paths", graph.effective)):
        width = widths[which] if label == "paths" else 0.8
        lines = PathCollection(
            list(curves[which]), facecolors="none", linewidths=width, label=label, **looks[label]
        )
        ax.add_collection(lines)


def _curve(x0: float, y0: float, x1: float, y1: float) -> Any:
    """A line to the next column; over columns between, an arc around them."""
    from matplotlib.path import Path

    if x1 - x0 < 1.5:
        return Path([(x0, y0), (x1, y1)])
    side = 1.0 if y0 + y1 >= 0 else -1.0
    bend, third = side * 0.6 * (x1 - x0), (x1 - x0) / 3
    points = [(x0, y0), (x0 + third, y0 + bend), (x1 - third, y1 + bend), (x1, y1)]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _name_columns(ax: Axes, graph: Graph, x: np.ndarray, y: np.ndarray) -> None:
    """Writes over each column what it is, and under it how many of its units are on a path."""
    top, bottom = y.max() + 0.75, y.min() - 0.75
    names = [graph.names[0], *style.short_names(graph.names[1:])]
    for block, name in enumerate(names):
        (own,) = np.nonzero(graph.block == block)
        place, on_path = x[own[0]], f"{np.count_nonzero(graph.alive[own])} of {len(own)}"
        if np.count_nonzero(graph.columns == graph.columns[block]) == 1:
            looks: dict[str, Any] = {"ha": "center", "size": 9}
            ax.text(place, top, name, va="bottom", weight="bold", color=style.INK, **looks)
            ax.text(place, bottom, on_path, va="top", color=style.MUTED, **looks)
        else:
            above = y[own].max() + 0.5
            ax.text(
                place, above, f"{name}: {on_path}", va="bottom", ha="center", size=8,
                color=style.INK,
            )  # fmt: skip


def _count(number: float) -> str:
    if number >= 1e4:
        return f"{number:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{number:.0f}" if number == round(number) else f"{number:.3g}"


def _draw_band(found: Topology, ax: Axes | None) -> Axes:
    layers = found.layers
    ax = style.axes(ax, min(2.0 + 0.5 * len(layers), 11.0), 3.4)
    places = np.arange(len(layers))
    all_ = np.asarray([layer.outputs for layer in layers], float)
    alive = np.asarray([layer.nodes for layer in layers], float)
    ax.bar(places, all_, 0.5, -all_ / 2, color=style.RULE, label="output features")
    ax.bar(places, alive, 0.5, -alive / 2, color=style.BLUE, label="on a path")
    # A ribbon from the end of each bar to the start of the next.
    edges = np.stack([places - 0.25, places + 0.25], 1).ravel()
    half = np.repeat(alive / 2, 2)
    ax.fill_between(edges, -half, half, color=style.BLUE, alpha=0.25, lw=0)
    names = style.short_names([layer.name for layer in layers])
    _mark_layers(ax, names, alive, all_)
    style.legend(ax, ncols=2, loc="upper center")
    return ax


def _mark_layers(ax: Axes, names: Sequence[str], alive: np.ndarray, all_: np.ndarray) -> None:
    places, most = np.arange(len(names)), all_.max()
    ax.spines["left"].set_visible(False)
    ax.set_yticks([])
    ax.set_ylim(-0.56 * most, 0.78 * most)
    ax.set_xlim(-0.6, len(names) - 0.4)
    if len(names) <= 24:
        for x, some, total in zip(places, alive, all_, strict=True):
            ax.annotate(
                f"{some:.0f}", (x, total / 2), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=8.5, color=style.INK,
            )  # fmt: skip
        turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(places, names, **turned if max(map(len, names)) > 6 else {})
        ax.set_xlabel("layer")
    else:
        ax.set_xlabel("layer, from input to output")
    ax.set_ylabel("effective nodes")
