"""Which method to use: all methods on two small networks, on which differences exceed the noise.

    python -m experiments sweep suite --scale full
    python -m experiments sweep suite --scale small

LeNet-300-100 on Fashion-MNIST, as Debian's package `dataset-fashion-mnist` installs it (843 steps
of AdamW an epoch, two epochs), and ResNet-20 of width 8 on 8x8 digits (380 steps of SGD).

Full: 1248 jobs for two cores, about ten seconds each. Small: 192 jobs, with a single seed.
"""

from collections.abc import Sequence

from experiments.config import Config
from experiments.sweep import Sweep

LENET = Config(
    dataset="idx:/usr/share/datasets/fashion-mnist",
    model="lenet",
    epochs=2,
    batch_size=64,
    optimizer="adamw",
    learning_rate=1.2e-3,
    weight_decay=0.0,
)
RESNET = Config(dataset="digits", model="resnet20", width=8, epochs=20)

METHODS = (
    "dpai",
    "dpai[allocation=erk]",
    "dpai+repair",
    "dpai+shuffled",
    "dpai+fresh",
    "dpai[alpha=0]",
    "dpai-published",
    "random",
    "random+repair",
    "magnitude",
    "snip",
    "iterative-snip",
    "grasp",
    "synflow",
    "synflow+shuffled",
    "synflow-erk+repair",
    "phew",
    "npb",
    "npb+shuffled",
)
"""All that prune before training, and as controls repaired random masks, masks that are shuffled
within their layers, and DPaI's with weights drawn anew."""

SPARSITIES = (0.6838, 0.9, 0.9684, 0.99, 0.9968)
"""Those of the paper."""


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the two sweeps: of eight seeds on the first network, of five on the second."""
    return [
        *sweeps([(LENET, SPARSITIES)], METHODS, scale, seeds=8),
        *sweeps([(RESNET, SPARSITIES)], METHODS, scale),
    ]


def sweeps(
    networks: Sequence[tuple[Config, Sequence[float]]],
    methods: Sequence[str],
    scale: str,
    seeds: int = 5,
) -> list[Sweep]:
    """Returns a sweep for each network, at its sparsities; of one seed if the scale is "small"."""
    seeds = 1 if scale == "small" else seeds
    return [Sweep(base, methods, sparsities, seeds) for base, sparsities in networks]
