"""Whether what was found on the suite's networks holds when they are trained four times as long.

    python -m experiments sweep suite_longer --scale full
    python -m experiments sweep suite_longer --scale small

LeNet-300-100 on Fashion-MNIST for 8 epochs in place of 2; ResNet-20 of width 8 and the vision
transformer of `suite_unseen`, both on 8x8 digits, for 80 epochs in place of 20.

Full: 63 jobs for two cores, of twenty seconds to two minutes. Small: 21 jobs, with a single seed.
"""

import dataclasses

from experiments.recipes import suite, suite_unseen
from experiments.sweep import Sweep

LENET = dataclasses.replace(suite.LENET, epochs=8)
RESNET = dataclasses.replace(suite.RESNET, epochs=80)
VIT = dataclasses.replace(suite_unseen.VIT, epochs=80)

METHODS = (
    "dpai",
    "dpai[allocation=erk]",
    "synflow",
    "synflow-erk+repair",
    "phew",
    "random+repair",
)


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the three sweeps."""
    networks = [(LENET, (0.9968,)), (RESNET, (0.99,)), (VIT, (0.99,))]
    return suite.sweeps(networks, METHODS, scale, seeds=3)
