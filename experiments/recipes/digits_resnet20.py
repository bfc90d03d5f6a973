"""ResNet-20 on 8x8 digits: every step of a comparison, in minutes and without a download.

    python -m experiments sweep digits_resnet20 --scale full
    python -m experiments sweep digits_resnet20 --scale small

Full: 51 jobs for two cores. 1.7 million multiply-adds an image, 1257 images, 20 epochs: seconds a
job. Small: 17 jobs, with one seed. This is not an experiment of the paper: the test split has 360
images, too few to tell good methods apart.
"""

from experiments.config import Config
from experiments.sweep import Sweep

BASE = Config(dataset="digits", model="resnet20", width=16, epochs=20)


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    return Sweep(
        BASE,
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
