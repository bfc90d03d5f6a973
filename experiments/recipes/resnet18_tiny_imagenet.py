"""ResNet-18 on Tiny-ImageNet: the third panel of the paper's figure.

    python -m experiments sweep resnet18_tiny_imagenet --scale full
    python -m experiments sweep resnet18_tiny_imagenet --scale small

Full: 108 jobs for one accelerator of a data centre. 2.1 billion multiply-adds an image, 90,000
images, 100 epochs: about an hour a job and 110 hours in all at 30 TFLOP/s, an estimate. Started
several times on one folder, the command shares the jobs.

Small: 33 jobs for two cores, about an hour, an estimate. An eighth of the channels and images of
32x32, on 10,000 of them for 6 epochs, at two sparsities and without PHEW and NPB.

The published validation images are the test split, as usual, and a part of the training images is
the validation split. Not known of the paper's run: the augmentation, taken as on CIFAR; the weight
decay, taken as on CIFAR; the seeds.
"""

import dataclasses

from experiments.config import Config
from experiments.recipes import paper
from experiments.sweep import Sweep

BASE = Config(
    dataset="tiny_imagenet",
    model="resnet18",
    augmentation="crop-flip",
    epochs=100,
    batch_size=128,
    learning_rate=0.01,
    weight_decay=1e-4,
    warmup=0.0,
    drops=(30, 60, 80),
)
SMALL_BASE = dataclasses.replace(
    BASE, width=8, image_size=32, train_images=10_000, epochs=6, drops=(2, 4, 5)
)


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    return paper.panel(scale, BASE, SMALL_BASE)
