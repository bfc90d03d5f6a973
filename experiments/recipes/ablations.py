"""The paper's ablations of DPaI, on ResNet-20 and CIFAR-10: what each part contributes.

    python -m experiments sweep ablations --scale full
    python -m experiments sweep ablations --scale small

Full: 93 jobs for one accelerator, like those of `resnet20_cifar10`: about 5 hours at 10 TFLOP/s, an
estimate. Small: 33 jobs for two cores, like those of its small scale, but only at 99 %: about an
hour, an estimate.

The paper does not say what it replaces ERK by (here one density for all layers), nor the other
values of α and β.
"""

from experiments.recipes import resnet20_cifar10
from experiments.sweep import Sweep

METHODS = (
    "dpai-published",  # α = 0.99, β = 0.5
    "dpai-published[allocation=uniform]",  # no ERK
    "dpai-published[beta=1]",  # no nodes
    "dpai-published[beta=0]",  # no kernels
    "dpai-published[alpha=0]",  # neither: paths alone
    "dpai-published[alpha=1]",  # no paths
    "dpai-published[alpha=0.5]",
    "dpai-published[alpha=0.9]",
    "dpai-published[beta=0.25]",
    "dpai-published[beta=0.75]",
)


def sweep(scale: str = "full") -> Sweep:
    """Returns the sweep."""
    if scale == "small":
        return Sweep(resnet20_cifar10.SMALL_BASE, METHODS, sparsities=(0.99,))
    return Sweep(resnet20_cifar10.BASE, METHODS, sparsities=(0.9, 0.9684, 0.99))
