"""ResNet-18 on Tiny-ImageNet: the third panel of the paper's figure.

    python -m experiments sweep resnet18_tiny_imagenet --scale full
    python -m experiments sweep resnet18_tiny_imagenet --scale small

Full: 108 jobs for one data-centre accelerator. 2.1 billion multiply-adds an image, 90,000 images,
100 epochs: about an hour a job and 110 hours in all at 30 TFLOP/s, an estimate. Several processes
started with this command on one folder share the jobs.

Small: 33 jobs for two cores, about an hour, an estimate. An eighth of the channels, 10,000 images
of 32x32 for 6 epochs, two sparsities, and no PHEW and NPB.

As usual, the published validation images are the test split. A part of the training images is the
validation split. The paper does not give the augmentation and the weight decay (here those for
CIFAR), nor the seeds.
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
