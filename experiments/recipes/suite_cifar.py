"""Which method to use, on photographs: the third network of `suite`.

    python -m experiments sweep suite_cifar --scale full
    python -m experiments sweep suite_cifar --scale small

ResNet-20 of width 8 on CIFAR-10 at 16 by 16 pixels: 10,000 images for six epochs (468 steps of
SGD). That is far from converged, a dense network gets to 45 %. At 99 % some 30 weights are left in
each layer.

Full: 27 jobs for two cores, of two to three minutes. Small: 9 jobs, with a single seed.
"""

import dataclasses

from experiments.recipes import resnet20_cifar10
from experiments.sweep import Sweep

METHODS = (
    "dpai",
    "random",
    "random+repair",
    "snip",
    "synflow",
    "synflow-erk+repair",
    "npb",
    "dpai-published",
)


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    base = dataclasses.replace(resnet20_cifar10.SMALL_BASE, width=8)
    return Sweep(base, METHODS, sparsities=(0.99,), seeds=1 if scale == "small" else 3)
