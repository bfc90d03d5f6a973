"""ResNet-20 on CIFAR-10: the first panel of the paper's figure.

    python -m experiments sweep resnet20_cifar10 --scale full
    python -m experiments sweep resnet20_cifar10 --scale small

Full: 108 jobs for one accelerator. 38 million multiply-adds an image, 45,000 images, 160 epochs:
about 3 minutes a job and 5 hours in all at 10 TFLOP/s, an estimate.

Small: 33 jobs for two cores. The same network on 10,000 images of 16 by 16 pixels for six epochs
(468 steps), two sparsities, and no PHEW and NPB. On two cores of an AMD EPYC it took 66 minutes, a
process on each core; the results are in docs/experiments.md.

The paper's networks are probably trained on all 50,000 images; here a part of them is the
validation split. The paper's seeds are unknown.
"""

import dataclasses

from experiments.config import Config
from experiments.recipes import paper
from experiments.sweep import Sweep

BASE = Config(
    dataset="cifar10",
    model="resnet20",
    augmentation="crop-flip",
    epochs=160,
    batch_size=128,
    learning_rate=0.1,
    weight_decay=1e-4,
    warmup=0.0,
    drops=(80, 120),
)
SMALL_BASE = dataclasses.replace(BASE, train_images=10_000, image_size=16, epochs=6, drops=(3, 5))


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    return paper.panel(scale, BASE, SMALL_BASE)
