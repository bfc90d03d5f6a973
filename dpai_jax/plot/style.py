"""How pictures look: colours, and axes without clutter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = "#ffffff"
INK = "#1f2328"
MUTED = "#5c636b"
RULE = "#e3e6ea"

# After Okabe and Ito, so that they differ for colour-blind eyes, at least 3 : 1 against the ground.
BLUE, SKY, ORANGE, VERMILLION = "#0060a8", "#3298cf", "#c98000", "#b83a00"
GREEN, PURPLE, OLIVE, BLACK, GREY = "#008a63", "#b14d8e", "#8a8200", "#3c4043", "#7a7f85"


def pyplot() -> Any:
    """Returns matplotlib's pyplot.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("dpai_jax.plot needs matplotlib: pip install 'dpai_jax[show]'") from error
    return plt


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The Axes to draw into: the one given, or one in a new figure of this size in inches."""
    plt = pyplot()
    if ax is None:
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color=MUTED, linewidth=0.8)
    ax.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=9)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=INK, size=9.5)
    ax.set_axisbelow(True)
    return ax


def grid(ax: Axes, axis: Any = "both") -> None:
    """Draws faint lines behind the data."""
    ax.grid(True, axis=axis, color=RULE, linewidth=0.8)


def legend(ax: Axes, **options: Any) -> None:
    """Names what is drawn, without a frame."""
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, **options)


def short_names(names: Sequence[str]) -> list[str]:
    """Layers' names without the parts that all of them start or end with."""
    paths = [name.split("/") for name in names]
    first = _shared(paths)
    last = _shared([path[first:][::-1] for path in paths])
    short = ["/".join(path[first : len(path) - last]) for path in paths]
    return short if all(short) else list(names)


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all paths have in common at their start."""
    columns = zip(*paths, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))
