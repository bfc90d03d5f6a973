"""ResNet-20 on 8x8 digits, in minutes on two cores."""

from experiments.config import Config
from experiments.sweep import Sweep


def sweep(scale: str) -> Sweep:
    """Returns the sweep. It is small at any scale; the small one has a single seed."""
    return Sweep(
        base=Config(dataset="digits", model="resnet20", width=16, epochs=20),
        methods=(
            "random",
            "random+repair",
            "magnitude",
            "snip",
            "grasp",
            "synflow",
            "dpai",
            "dpai+repair",
        ),
        sparsities=(0.9, 0.99),
        seeds=1 if scale == "small" else 3,
    )
