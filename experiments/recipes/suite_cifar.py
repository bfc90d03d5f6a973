"""Which method to use, on photographs: CIFAR-10.

    python -m experiments sweep suite_cifar --scale full
    python -m experiments sweep suite_cifar --scale small

ResNet-20 of width 8 at 16 by 16 pixels: 10,000 images for six epochs (468 steps of SGD). That is
far from converged, a dense network gets to 45 %. At 99 % some 30 weights are left in each layer.
And LeNet-5 on 10,000 images for five epochs (780 steps of AdamW), where a dense one gets to 54 %;
its learning rate was set by the dense network alone.

Full: 306 jobs for two cores, of half a minute to three minutes. Small: 102 jobs of one seed.
"""

import dataclasses

from experiments.recipes import resnet20_cifar10, suite, suite_unseen
from experiments.sweep import Sweep

RESNET = dataclasses.replace(resnet20_cifar10.SMALL_BASE, width=8)
LENET5 = dataclasses.replace(
    suite_unseen.LENET5, dataset="cifar10", train_images=10_000, epochs=5, learning_rate=3e-3
)

METHODS = (
    "dpai",
    "random",
    "random+repair",
    "snip",
    "synflow",
    "synflow-erk+repair",
    "npb",
    "dpai-published",
)


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the two sweeps; that of LeNet-5 is of all methods of `suite_unseen`."""
    return [
        *suite.sweeps([(RESNET, suite.SPARSITIES)], METHODS, scale, seeds=3),
        *suite.sweeps([(LENET5, suite.SPARSITIES)], suite_unseen.METHODS, scale, seeds=3),
    ]
