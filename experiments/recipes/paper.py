"""What the paper's experiments have in common.

The paper is Xiang et al., DPaI: Differentiable Pruning at Initialization with Node-Path Balance
Principle, ICLR 2025. Its table of pruning times needs no recipe: each record has the seconds that
its pruning took. They include compilation for a method's first job in a process.

The hours in the recipes' docstrings are estimates, not measurements: six times the multiply-adds of
a forward pass for each image, divided by the speed given with them.
"""

from experiments.config import Config
from experiments.sweep import Sweep

SPARSITIES = (0.6838, 0.9, 0.9684, 0.99, 0.9968)
"""1 − 10^−c for c = 0.5, 1, 1.5, 2 and 2.5."""

METHODS = ("random", "snip", "synflow", "phew", "npb", "dpai-published", "dpai")
"""The methods of the paper's figures, with ERK for random; DPaI with the published settings and
with ours."""

SMALL_SPARSITIES = (0.9, 0.99)
SMALL_METHODS = ("random", "snip", "synflow", "dpai-published", "dpai")
"""The methods at the scale "small"."""


def panel(scale: str, full: Config, small: Config) -> Sweep:
    """Returns the sweep of one panel of the paper's figure."""
    if scale == "small":
        return Sweep(small, SMALL_METHODS, SMALL_SPARSITIES)
    return Sweep(full, METHODS, SPARSITIES)
