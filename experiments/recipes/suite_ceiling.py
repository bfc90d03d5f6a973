"""What sparse training can reach: lottery tickets on the two networks of `suite`.

    python -m experiments sweep suite_ceiling --scale full
    python -m experiments sweep suite_ceiling --scale small

Each mask takes some twenty trainings, so the time that it takes is no rival's.

Full: 15 jobs for two cores, of two to ten minutes. Small: 5 jobs, with a single seed.
"""

from experiments.recipes import suite
from experiments.sweep import Sweep

METHODS = ("imp",)


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the two sweeps."""
    networks = [(suite.LENET, (0.99, 0.9968)), (suite.RESNET, (0.99,))]
    return suite.sweeps(networks, METHODS, scale, seeds=3)
