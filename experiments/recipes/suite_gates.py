"""How gates should take part in paths: DPaI's default with each choice of `dpai_jax.trace(gates=)`.

    python -m experiments sweep suite_gates --scale full
    python -m experiments sweep suite_gates --scale small

The vision transformer of `suite_unseen` on 8x8 digits: its attention is a softmax.

Full: 12 jobs for two cores, of forty seconds. Small: 4 jobs, with a single seed.
"""

import dataclasses

from experiments.config import GATES
from experiments.recipes import suite, suite_unseen
from experiments.sweep import Sweep


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the sweeps, one for each choice."""
    networks = [(dataclasses.replace(suite_unseen.VIT, gates=gates), (0.99,)) for gates in GATES]
    return suite.sweeps(networks, ("dpai",), scale, seeds=3)
