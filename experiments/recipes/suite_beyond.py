"""Which method to use where almost nothing is left: 99.9 %, beyond the paper's sparsities.

    python -m experiments sweep suite_beyond --scale full
    python -m experiments sweep suite_beyond --scale small

LeNet-300-100 of `suite`, which keeps 266 weights, and the wider ResNet-20 of `suite_unseen`, which
keeps 273. What is asked of the methods was written down before the first job: see docs/evidence.md.

Full: 169 jobs for two cores, of five to thirty seconds. Small: 26 jobs, with a single seed.
"""

from experiments.recipes import suite, suite_unseen
from experiments.sweep import Sweep


def sweep(scale: str = "full") -> list[Sweep]:
    """Returns the two sweeps: of eight seeds on the first network, of five on the second."""
    return [
        *suite.sweeps([(suite.LENET, (0.999,))], suite_unseen.METHODS, scale, seeds=8),
        *suite.sweeps([(suite_unseen.WIDER, (0.999,))], suite_unseen.METHODS, scale),
    ]
