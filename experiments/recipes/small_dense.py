"""A network pruned by channels against small dense networks, on ResNet-20 and 8x8 digits.

    python -m experiments sweep small_dense --scale full
    python -m experiments sweep small_dense --scale small

Full: 50 jobs for two cores, of five seeds. Small: 10 jobs, with a single seed. As in
`digits_resnet20`, the test split has 360 images.

Channels that are cut leave a smaller dense network. Is it better than one that was made that small?
At 70 and 90 % a ResNet-20 of 16 channels has about as many effective weights as a dense one of 7 to
8, and of 4.
"""

import dataclasses

from experiments.config import DENSE
from experiments.recipes import digits_resnet20
from experiments.sweep import Sweep

METHODS = ("random", "magnitude-erk", "dpai")


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the sweeps: by channels, and the dense networks."""
    base, seeds = digits_resnet20.BASE, 1 if scale == "small" else 5
    by_channel = dataclasses.replace(base, granularity="channel")
    small = [dataclasses.replace(base, width=width) for width in (8, 7, 4)]
    return [
        Sweep(by_channel, METHODS, sparsities=(0.7, 0.9), seeds=seeds),
        *(Sweep(dense, (DENSE,), sparsities=(0.0,), seeds=seeds) for dense in small),
    ]
