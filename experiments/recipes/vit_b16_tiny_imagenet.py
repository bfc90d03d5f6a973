"""ViT-B/16 on Tiny-ImageNet at 224 pixels: the paper's transformer, at 99 %.

    python -m experiments sweep vit_b16_tiny_imagenet --scale full
    python -m experiments sweep vit_b16_tiny_imagenet --scale small

Full: 18 jobs for one data-centre accelerator. 17.6 billion multiply-adds an image, 90,000 images,
100 epochs: about 2.6 hours a job and 50 hours in all at 100 TFLOP/s in bfloat16, an estimate.
Several processes started with this command on one folder share the jobs.

Small: 18 jobs for two cores, about an hour, an estimate. An eighth of the features, and 5000 images
of 64x64, their own size, for 7 epochs.

The paper does not give the epochs, learning rate, weight decay, batch size, warm-up, augmentation,
precision and seeds, nor whether weights were pretrained. Here they are random.
`python -m experiments train --init FILE` starts from the weights of a checkpoint.
"""

import dataclasses

from experiments.config import Config
from experiments.sweep import Sweep

BASE = Config(
    dataset="tiny_imagenet",
    model="vit_b16",
    augmentation="crop-flip",
    image_size=224,
    epochs=100,
    batch_size=128,
    optimizer="adamw",
    learning_rate=5e-4,
    weight_decay=0.05,
    warmup=0.1,
    dtype="bfloat16",
)
SMALL_BASE = dataclasses.replace(
    BASE, width=96, image_size=64, train_images=5000, epochs=7, dtype="float32"
)
METHODS = ("random", "snip", "synflow", "dpai-published", "dpai")


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    return Sweep(SMALL_BASE if scale == "small" else BASE, METHODS, sparsities=(0.99,))
