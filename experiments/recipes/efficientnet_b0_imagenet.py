"""EfficientNet-B0 on ImageNet-1K: DPaI against SynFlow on a network of depthwise convolutions.

    python -m experiments sweep efficientnet_b0_imagenet --scale full
    python -m experiments sweep efficientnet_b0_imagenet --scale small

Full: 27 jobs for data-centre accelerators. 410 million multiply-adds an image, 1.27 million images,
90 epochs: about 5 hours a job and 140 hours in all at 15 TFLOP/s in bfloat16, an estimate. The
speed is low because depthwise convolutions are slow. Several processes started with this command on
one folder share the jobs.

Small: 27 jobs for two cores, about an hour, an estimate. Tiny-ImageNet instead of ImageNet-1K, a
quarter of the channels, and 5000 images of 32x32 for 4 epochs.

The paper does not give the sparsities, epochs, batch size, optimizer, precision and number of
seeds. The settings here are those of a ResNet on ImageNet.
"""

import dataclasses

from experiments.config import Config
from experiments.sweep import Sweep

BASE = Config(
    dataset="imagenet",
    model="efficientnet_b0",
    augmentation="resized-crop-flip",
    epochs=90,
    batch_size=256,
    learning_rate=0.1,
    weight_decay=1e-4,
    warmup=0.0,
    drops=(30, 60, 80),
    dtype="bfloat16",
)
SMALL_BASE = dataclasses.replace(
    BASE,
    dataset="tiny_imagenet",
    width=8,
    image_size=32,
    train_images=5000,
    epochs=4,
    batch_size=128,
    drops=(1, 2, 3),
    dtype="float32",
)
METHODS = ("random", "synflow", "dpai-published", "dpai")
SPARSITIES = (0.6838, 0.9)


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    return Sweep(SMALL_BASE if scale == "small" else BASE, METHODS, SPARSITIES)
