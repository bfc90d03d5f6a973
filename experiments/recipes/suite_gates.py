"""How gates should take part in paths: DPaI's default with each choice of `dpai_jax.trace(gates=)`.

    python -m experiments sweep suite_gates --scale full
    python -m experiments sweep suite_gates --scale small

SE-ResNet-20, the ResNet-20 of `suite` whose blocks gate their channels by squeeze-and-excitation;
and the vision transformer of `suite_unseen`, whose attention is a softmax. Both on 8x8 digits.

Full: 40 jobs for two cores, of half a minute. Small: 8 jobs, with a single seed.
"""

import dataclasses

from experiments.config import GATES
from experiments.recipes import suite, suite_unseen
from experiments.sweep import Sweep

SE_RESNET = dataclasses.replace(suite.RESNET, model="se_resnet20")


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the sweeps, one for each network and choice."""
    networks = [
        (dataclasses.replace(base, gates=gates), (0.99,))
        for base in (SE_RESNET, suite_unseen.VIT)
        for gates in GATES
    ]
    return suite.sweeps(networks, ("dpai",), scale)
