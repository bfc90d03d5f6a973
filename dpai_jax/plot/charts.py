"""Charts of what is kept of each layer, and of how that came about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dpai_jax.measuring import Topology, effective_weights
from dpai_jax.plot import style
from dpai_jax.plot.sources import network_and_masks
from dpai_jax.pruning import Result
from dpai_jax.tools.meshes import on_host
from dpai_jax.tools.trees import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dpai_jax.paths import Layer, Network

PyTree = Any

# How the entries of a history are called in pictures, and their colours.
_HISTORY = {
    "log_paths": ("log-paths", style.BLUE),
    "nodes": ("effective nodes", style.ORANGE),
    "kernels": ("effective kernels", style.GREEN),
    "weights": ("weights", style.BLACK),
}


def density(result: Result | Topology, ax: Axes | None = None) -> Axes:
    """Draws the share of each layer's weights that is kept, and the share on a path.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda params, x: x @ params["w"], {"w": jnp.ones((8, 4))}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 8)), 0.5)
      >>> dpai.plot.density(result).get_xlabel()
      'share of the weights'

    Args:
      result: what `prune` returned, or a topology.
      ax: where to draw; a new figure if not given.

    Returns:
      The Axes.

    Raises:
      TypeError: if `result` is neither.
      ImportError: if matplotlib is not installed.
    """
    topology = result.topology if isinstance(result, Result) else result
    if not isinstance(topology, Topology):
        raise TypeError(f"result must be a Result or a Topology, got {shown(result)}")
    layers = topology.layers
    ax = style.axes(ax, 6.0, min(1.0 + 0.26 * len(layers), 12.0))
    places = np.arange(len(layers))
    kept = np.asarray([layer.density for layer in layers])
    alive = np.asarray([layer.effective / layer.size for layer in layers])
    ax.hlines(places, alive, kept, color=style.ORANGE, lw=2.5)
    ring: dict[str, Any] = {"mfc": style.PAPER, "mec": style.ORANGE, "mew": 1.6}
    ax.plot(kept, places, "o", ms=8, label="kept", **ring)
    shown_ = np.where(alive > 0, alive, np.nan)
    ax.plot(shown_, places, "o", ms=4.5, color=style.BLUE, label="on a path")
    for place in places[alive == 0]:
        ax.annotate(
            "no path", (kept[place], place), (8, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=style.VERMILLION,
        )  # fmt: skip
    positive = np.concatenate([kept[kept > 0], alive[alive > 0]])
    if positive.min(initial=1) < 0.1 * positive.max(initial=0):
        ax.set_xscale("log")
    elif ax.get_xscale() == "linear":  # it may share a logarithmic one
        ax.set_xlim(0, 1.04 * positive.max(initial=0))
    ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    step = -(-len(layers) // 46)
    names = style.short_names([layer.name for layer in layers])
    ax.set_yticks(places[::step], names[::step])
    ax.set_ylim(len(layers) - 0.4, -0.6 - 0.045 * max(len(layers), 20))  # room for the legend
    ax.set_xlabel("share of the weights")
    style.grid(ax)
    style.legend(ax, ncols=2, loc="upper right", borderaxespad=0)
    return ax


def history(result: Result, ax: Axes | None = None) -> Axes:
    """Draws what the method measured step by step, each as a share of its highest value.

    For DPaI these are the log-paths, effective nodes and effective kernels. The legend gives their
    first and last values.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda params, x: x @ params["w"], {"w": jnp.ones((8, 4))}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 8)), 0.5)
      >>> dpai.plot.history(result).get_xlabel()
      'step'

    Args:
      result: what `prune` returned.
      ax: where to draw; a new figure if not given.

    Returns:
      The Axes.

    Raises:
      TypeError: if `result` is not a result.
      ValueError: if its history is empty, as that of a method of one step is.
      ImportError: if matplotlib is not installed.
    """
    if not isinstance(result, Result):
        raise TypeError(f"result must be a Result, got {shown(result)}")
    if not any(len(values) for values in result.history.values()):
        method = result.settings["method"]["type"]
        raise ValueError(f"result must have a history, but {method} measured nothing on its way")
    ax = style.axes(ax, 5.2, 3.2)
    others = iter((style.PURPLE, style.SKY, style.OLIVE, style.VERMILLION))
    for name, values in result.history.items():
        title, color = _HISTORY.get(name, (name, next(others, style.GREY)))
        values = np.asarray(values, float)
        finite = np.where(np.isfinite(values), values, np.nan)
        highest = np.nanmax(np.abs(finite), initial=0) or 1.0
        ends = " → ".join(_number(values[i]) for i in (0, -1))
        steps = np.arange(len(values))
        ax.plot(steps, finite / highest, color=color, lw=1.8, label=f"{title}: {ends}")
    low, high = ax.get_ylim()
    ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= high])
    ax.set_ylim(low, high + 0.13 * len(result.history) * (high - low))  # room for the legend
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    ax.set_xlabel("step")
    ax.locator_params("x", integer=True)
    ax.set_ylabel("share of its highest value")
    style.grid(ax)
    style.legend(ax, loc="upper left", borderaxespad=0)
    return ax


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def masks(
    source: Result | Network,
    layer: str,
    masks: PyTree | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the mask of one layer as a matrix, inputs by outputs.

    Each entry is the number of weights kept between an input and an output feature: of a
    convolution over all of its taps, of a stacked layer over all of its copies. Where no path
    passes any of them, the entry is orange. Inputs are those of one group.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda params, x: x @ params["w"], {"w": jnp.ones((8, 4))}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 8)), 0.5)
      >>> dpai.plot.masks(result, "w").get_ylabel()
      'input'

    Args:
      source: what `prune` returned, or a traced network.
      layer: the layer's name, as in `net.layers`.
      masks: pytree of masks parallel to the parameters; those of the result if not given.
      ax: where to draw; a new figure if not given.

    Returns:
      The Axes.

    Raises:
      TypeError: if `source` is neither.
      ValueError: if no layer has this name, there are no masks, or a loaded result has no network.
      ImportError: if matplotlib is not installed.
    """
    net, tree = network_and_masks(source, masks)
    place = next((i for i, own in enumerate(net.layers) if own.name == layer), None)
    if place is None:
        names = ", ".join(own.name for own in net.layers)
        raise ValueError(f"layer must be one of {names}, got {shown(layer)}")
    own = net.layers[place]
    kept = _by_features(own, net.leaves(tree)[place])
    alive = _by_features(own, net.leaves(effective_weights(net, tree))[place])
    n_inputs, n_outputs = kept.shape
    ax = style.axes(ax, *_size(n_inputs, n_outputs))
    _draw_matrix(ax, kept, alive)
    one_each = own.groups > 1 and n_inputs == 1
    ax.set_xlabel("output" if not one_each else "output, each with its own input")
    ax.set_ylabel("input" if own.groups == 1 else "input of its group")
    return ax


def _by_features(layer: Layer, mask: Any) -> np.ndarray:
    """The numbers of weights between features, (inputs of a group, outputs of all groups)."""
    counts = layer.by_features(on_host(mask)).sum((0, 4), dtype=int)
    return counts.swapaxes(0, 1).reshape(counts.shape[1], -1)


def _size(n_inputs: int, n_outputs: int) -> tuple[float, float]:
    """Inches: the longer side fits, and the shorter is still to be seen."""
    longest = max(n_inputs, n_outputs)
    width, height = (4.2 * max(n / longest, 0.3) for n in (n_outputs, n_inputs))
    return width + 1.2, height + 0.8


def _draw_matrix(ax: Axes, kept: np.ndarray, alive: np.ndarray) -> None:
    plt = style.pyplot()
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    highest = max(int(kept.max()), 1)
    blues = LinearSegmentedColormap.from_list("kept", ["#e4eff8", style.BLUE]).with_extremes(
        bad=(0, 0, 0, 0)
    )
    options: dict[str, Any] = {"aspect": "auto", "vmin": 0, "vmax": highest}
    n_inputs, n_outputs = kept.shape
    if 0.3 <= n_inputs / n_outputs <= 1 / 0.3:
        options["aspect"] = "equal"
    image = ax.imshow(np.ma.masked_equal(kept, 0), cmap=blues, **options)
    dead = (kept > 0) & (alive == 0)
    if dead.any():
        cover = np.ma.masked_equal(dead, 0)
        ax.imshow(cover, cmap=_plain(style.ORANGE), **options | {"vmax": 1})
        handle = plt.Line2D([], [], ls="none", marker="s", color=style.ORANGE, label="on no path")
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderpad": 0.1}
        style.legend(ax, handles=[handle], handletextpad=0.1, **place)
    ax.spines[["top", "right"]].set_visible(True)
    ax.spines[:].set(color=style.RULE, linewidth=0.8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if highest > 1:
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        bar.set_label("weights kept", color=style.INK, size=9.5)
        bar.ax.tick_params(color=style.MUTED, labelcolor=style.INK, labelsize=9)
        bar.outline.set_visible(False)


def _plain(color: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([style.PAPER, color])
