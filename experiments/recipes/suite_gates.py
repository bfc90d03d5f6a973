"""How gates should take part in paths: DPaI's default with each choice of `dpai_jax.trace(gates=)`.

    python -m experiments sweep suite_gates --scale full
    python -m experiments sweep suite_gates --scale small

An EfficientNet of width 8, whose channels are gated by squeeze-and-excitation, and the vision
transformer of `suite_unseen`, whose attention is a softmax. Both on 8x8 digits.

Full: 40 jobs for two cores, of one minute, an estimate. Small: 8 jobs, with a single seed.
"""

import dataclasses

from experiments.config import GATES, Config
from experiments.recipes import suite, suite_unseen
from experiments.sweep import Sweep

EFFICIENTNET = Config(dataset="digits", model="efficientnet_b0", width=8, epochs=20)


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the sweeps, one for each network and choice."""
    networks = [
        (dataclasses.replace(base, gates=gates), (sparsity,))
        for base, sparsity in ((EFFICIENTNET, 0.95), (suite_unseen.VIT, 0.99))
        for gates in GATES
    ]
    return suite.sweeps(networks, ("dpai",), scale)
