"""Whether DPaI's default holds on networks that it was not chosen on.

    python -m experiments sweep suite_unseen --scale full
    python -m experiments sweep suite_unseen --scale small

LeNet-5 on Fashion-MNIST for one epoch; ResNet-20 of twice the width of that in `suite`; and a
vision transformer of width 48 (12 blocks). The last two are on 8x8 digits. The training was set by
dense networks alone. What is asked of the methods was written down before the first job: see
docs/evidence.md.

Full: 1098 jobs for two cores, of ten to forty seconds. Small: 183 jobs, with a single seed.
"""

import dataclasses

from experiments.config import Config
from experiments.recipes import digits_resnet20, suite
from experiments.sweep import Sweep

LENET5 = dataclasses.replace(suite.LENET, model="lenet5", epochs=1)
WIDER: Config = digits_resnet20.BASE
VIT = Config(
    dataset="digits",
    model="vit_ti4",
    width=48,
    epochs=20,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=0.05,
)

METHODS = tuple(
    name
    for name in suite.METHODS
    if name not in ("dpai+repair", "dpai[alpha=0]", "grasp")
    and not name.endswith(("+shuffled", "+fresh"))
)
"""The methods of `suite`, without GraSP, variants of DPaI's default, and changed masks."""


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the three sweeps: of eight seeds on the first network, of five on the others."""
    others = [(WIDER, suite.SPARSITIES), (VIT, suite.SPARSITIES)]
    return [
        *suite.sweeps([(LENET5, suite.SPARSITIES)], METHODS, scale, seeds=8),
        *suite.sweeps(others, METHODS, scale),
    ]
