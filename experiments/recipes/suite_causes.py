"""What a mask owes to which of its properties, on the two networks of `suite`.

    python -m experiments sweep suite_causes --scale full
    python -m experiments sweep suite_causes --scale small

SynFlow's and DPaI's masks as they are, and with one thing taken away at a time: the places within
layers, the weights that they were made for, which of the kept weights stands where, how large the
kept weights are, the counts of the layers, the fall of the density.

Full: 150 jobs for two cores, of six to twenty seconds. Small: 30 jobs, with a single seed.
"""

from experiments.recipes import suite
from experiments.sweep import Sweep

METHODS = (
    "synflow",
    "synflow+fresh",
    "synflow+permuted",
    "synflow+largest",
    "synflow+repair",
    "synflow-erk",
    "synflow-erk+repair",
    "synflow[steps=1]",
    "dpai",
    "dpai+fresh",
    "dpai+permuted",
    "dpai+largest",
    "dpai[schedule=constant]",
    "random+largest",
)


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the sweeps, each at a sparsity at which methods differ."""
    return suite.sweeps([(suite.LENET, (0.9968,)), (suite.RESNET, (0.99,))], METHODS, scale)
