"""What the paper's experiments have in common.

The paper is Xiang et al., DPaI: Differentiable Pruning at Initialization with Node-Path Balance
Principle, ICLR 2025. Its table of pruning times needs no recipe of its own: each record holds the
seconds that its pruning took. Those of a method's first job in a process hold compilation, too.

The hours in the recipes' docstrings are estimates, not measurements: six times the multiply-adds of
a forward pass for each image, over the speed that is named with them.
"""

from experiments.config import Config
from experiments.sweep import Sweep

SPARSITIES = (0.6838, 0.9, 0.9684, 0.99, 0.9968)
"""1 − 10^−c for c = 0.5, 1, 1.5, 2 and 2.5."""

METHODS = ("random", "snip", "synflow", "phew", "npb", "dpai-published", "dpai")
"""Those of the paper's figures, random under ERK; DPaI by the published settings, and by ours."""

SMALL_SPARSITIES = (0.9, 0.99)
SMALL_METHODS = ("random", "snip", "synflow", "dpai-published", "dpai")
"""What the scale "small" leaves of them."""


def panel(scale: str, full: Config, small: Config) -> Sweep:
    """Returns the sweep of one panel of the paper's figure."""
    if scale == "small":
        return Sweep(small, SMALL_METHODS, SMALL_SPARSITIES)
    return Sweep(full, METHODS, SPARSITIES)
