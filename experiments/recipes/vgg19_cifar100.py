"""VGG-19 with batch normalization on CIFAR-100: the second panel of the paper's figure.

    python -m experiments sweep vgg19_cifar100 --scale full
    python -m experiments sweep vgg19_cifar100 --scale small

Full: 108 jobs for one accelerator. 310 million multiply-adds an image, 45,000 images, 160 epochs:
about 22 minutes a job and 40 hours in all at 10 TFLOP/s, an estimate.

Small: 33 jobs for two cores, about an hour, an estimate. An eighth of the channels, 10,000 images
for 5 epochs, two sparsities, and no PHEW and NPB.

The paper's networks are probably trained on all 50,000 images; here a part of them is the
validation split. The paper's seeds are unknown.
"""

import dataclasses

from experiments.config import Config
from experiments.recipes import paper
from experiments.sweep import Sweep

BASE = Config(
    dataset="cifar100",
    model="vgg19",
    augmentation="crop-flip",
    epochs=160,
    batch_size=128,
    learning_rate=0.1,
    weight_decay=1e-4,
    warmup=0.0,
    drops=(60, 120),
)
SMALL_BASE = dataclasses.replace(BASE, width=8, train_images=10_000, epochs=5, drops=(2, 4))


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    return paper.panel(scale, BASE, SMALL_BASE)
