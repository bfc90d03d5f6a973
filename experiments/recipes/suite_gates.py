"""How gates should take part in paths: DPaI's default with each choice of `dpai_jax.trace(gates=)`.

    python -m experiments sweep suite_gates --scale full
    python -m experiments sweep suite_gates --scale small

SE-ResNet-20, the ResNet-20 of `suite` whose blocks gate their channels by squeeze-and-excitation;
and the vision transformers of `suite_unseen`, `suite_confirm` and `suite_longer`, whose attention
is a softmax.

Full: 64 jobs for two cores, of half a minute to two minutes. Small: 16 jobs, with a single seed.
"""

import dataclasses

from experiments.config import GATES, Config
from experiments.recipes import suite, suite_confirm, suite_longer, suite_unseen
from experiments.sweep import Sweep

SE_RESNET = dataclasses.replace(suite.RESNET, model="se_resnet20")


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the sweeps, one for each network and choice: of five seeds or of three."""
    five = [*_with(SE_RESNET), *_with(suite_unseen.VIT)]
    three = [*_with(suite_confirm.VIT), *_with(suite_longer.VIT)]
    return [
        *suite.sweeps(five, ("dpai",), scale),
        *suite.sweeps(three, ("dpai",), scale, seeds=3),
    ]


def _with(base: Config) -> list[tuple[Config, tuple[float, ...]]]:
    """The network with each choice, and its sparsity."""
    return [(dataclasses.replace(base, gates=gates), (0.99,)) for gates in GATES]
