"""Pruning methods by the names that configurations use. A new method is one line here.

To each name "+repair" can be added, for masks whose every kept weight is effective, or "+shuffled",
for the same number of weights in each layer at random places.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import dpai_jax as dpai
from experiments.config import DENSE, ConfigError

Train = Callable[[Any, Any], Any]
"""Trains a network: from its variables and masks to its trained variables."""

AFTERWARDS = ("repair", "shuffled")
"""What can be done to the masks of any method."""


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How a network is pruned.

    Attributes:
        method: The method; or a function that makes it of one that trains the network.
        batches: Batches of ten images a class that it may look at.
        temperature: What the logits are divided by in its loss.
        images: Images in the input that it draws for itself.
        afterwards: What is done to its masks, one of `AFTERWARDS`, or nothing.
    """

    method: dpai.Method | Callable[[Train], dpai.Method]
    batches: int = 0
    temperature: float = 1.0
    images: int = 1
    afterwards: str = ""

    def make(self, train: Train) -> dpai.Method:
        """Returns the method, ready to run."""
        return self.method(train) if callable(self.method) else self.method


METHODS: Mapping[str, Pruning] = {
    # Nothing is removed at sparsity 0, whatever the scores.
    DENSE: Pruning(dpai.Random()),
    "random": Pruning(dpai.Random(dpai.erk)),
    "random-er": Pruning(dpai.Random(dpai.er)),
    "random-uniform": Pruning(dpai.Random(dpai.uniform)),
    "magnitude": Pruning(dpai.Magnitude()),
    "magnitude-erk": Pruning(dpai.Magnitude(dpai.erk)),
    "snip": Pruning(dpai.SNIP(), batches=1),
    "snip-erk": Pruning(dpai.SNIP(dpai.erk), batches=1),
    "iterative-snip": Pruning(dpai.IterativeSNIP(), batches=1),
    "force": Pruning(dpai.FORCE(), batches=1),
    "grasp": Pruning(dpai.GraSP(), batches=1, temperature=200.0),
    "synflow": Pruning(dpai.SynFlow()),
    "synflow-erk": Pruning(dpai.SynFlow(allocation=dpai.erk)),
    "phew": Pruning(dpai.PHEW()),
    "npb": Pruning(dpai.NPB()),
    "ntk-sap": Pruning(dpai.NTKSAP(), images=64),
    "prospr": Pruning(dpai.ProsPr(), batches=4),
    "dpai": Pruning(dpai.DPaI()),
    "dpai-published": Pruning(dpai.DPaI.published()),
    "imp": Pruning(dpai.IMP),
}


def find(name: str) -> Pruning:
    """Returns what a name stands for.

    Raises:
        ConfigError: No method has this name.
    """
    base, plus, afterwards = name.partition("+")
    if base not in METHODS or (plus and afterwards not in AFTERWARDS):
        raise ConfigError(
            f"method must be one of {sorted(METHODS)}, with +repair or +shuffled if you like; "
            f"got {name!r}."
        )
    return dataclasses.replace(METHODS[base], afterwards=afterwards)
