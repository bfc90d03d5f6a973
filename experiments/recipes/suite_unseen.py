"""Whether DPaI's default holds on networks that it was not chosen on.

    python -m experiments sweep suite_unseen --scale full
    python -m experiments sweep suite_unseen --scale small

LeNet-5 on Fashion-MNIST for one epoch; ResNet-20 of twice the width of that in `suite`, at 99.68 %;
and a vision transformer of width 48 (12 blocks). The last two are on 8x8 digits. The training was
set by dense networks alone. What is asked of the methods was written down before the first job: see
docs/choosing.md.

Full: 180 jobs for two cores, of some forty seconds. Small: 36 jobs, with a single seed.
"""

import dataclasses

from experiments.config import Config
from experiments.recipes import suite
from experiments.sweep import Sweep

LENET5 = dataclasses.replace(suite.LENET, model="lenet5", epochs=1)
WIDER = dataclasses.replace(suite.RESNET, width=16)
VIT = Config(
    dataset="digits",
    model="vit_ti4",
    width=48,
    epochs=20,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=0.05,
)

METHODS = (
    "dpai",
    "dpai-published",
    "random",
    "random+repair",
    "magnitude",
    "snip",
    "iterative-snip",
    "synflow",
    "synflow-erk+repair",
    "phew",
    "npb",
)
"""The methods of `suite`, without GraSP and two controls."""


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the three sweeps."""
    seeds = 1 if scale == "small" else 5
    cells: list[tuple[Config, float]] = [(LENET5, 0.99), (WIDER, 0.9968), (VIT, 0.99)]
    return [Sweep(base, METHODS, (sparsity,), seeds) for base, sparsity in cells]
