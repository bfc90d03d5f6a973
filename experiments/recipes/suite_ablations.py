"""What each choice in DPaI's default is worth, on the first network of `suite`.

    python -m experiments sweep suite_ablations --scale full
    python -m experiments sweep suite_ablations --scale small

Full: 115 jobs for two cores, about six seconds each. Small: 23 jobs, with a single seed.
"""

from experiments.config import Config
from experiments.recipes import suite
from experiments.sweep import Sweep

BASE: Config = suite.LENET

METHODS = (
    "dpai",
    "dpai[alpha=0]",  # paths alone
    "dpai[alpha=0.1]",
    "dpai[alpha=0.5]",
    "dpai[alpha=1]",  # no paths
    "dpai[strength=one]",
    "dpai[strength=square]",
    "dpai[balance=indicator]",
    "dpai[steps=5]",
    "dpai[steps=100]",
    "dpai[allocation=erk]",
)


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    return Sweep(BASE, METHODS, sparsities=(0.99, 0.9968), seeds=1 if scale == "small" else 5)
