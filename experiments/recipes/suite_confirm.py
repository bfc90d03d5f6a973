"""Whether DPaI is better with one threshold over all layers, on networks that it was not chosen on.

    python -m experiments sweep suite_confirm --scale full
    python -m experiments sweep suite_confirm --scale small

A perceptron of four layers of width 256 on Fashion-MNIST at 99.68 %; ResNet-32 of width 8 on 8x8
digits; and a vision transformer of width 48 (12 blocks) on 10,000 images of Fashion-MNIST at 12x12
pixels, six epochs. The training is that of the suites' networks of the same kind. What is asked of
the methods was written down before the first job: see docs/evidence.md.

Full: 105 jobs for two cores, of half a minute to two minutes. Small: 21 jobs, with a single seed.
"""

import dataclasses

from experiments.recipes import suite, suite_unseen
from experiments.sweep import Sweep

MLP = dataclasses.replace(suite.LENET, model="mlp4")
RESNET32 = dataclasses.replace(suite.RESNET, model="resnet32")
VIT = dataclasses.replace(
    suite_unseen.VIT,
    dataset=suite.LENET.dataset,
    train_images=10_000,
    image_size=12,
    epochs=6,
)

METHODS = ("dpai", "dpai[allocation=erk]", "synflow", "phew", "snip", "random+repair")


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the three sweeps."""
    networks = [(MLP, (0.9968,)), (RESNET32, (0.99,)), (VIT, (0.99,))]
    return suite.sweeps(networks, METHODS, scale)
