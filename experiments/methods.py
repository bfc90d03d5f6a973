"""Pruning methods by the names that configurations use. A new method is one line here."""

import dpai_jax as dpai
from dpai_jax.methods.base import Method
from experiments.config import DENSE, ConfigError

METHODS: dict[str, Method] = {
    # Nothing is removed at sparsity 0, whatever the scores.
    DENSE: dpai.Random(),
    "dpai": dpai.DPaI(),
    "random": dpai.Random(allocation=dpai.erk),
}


def method(name: str) -> Method:
    """Returns the method of this name.

    Raises:
        ConfigError: No method has this name.
    """
    if name not in METHODS:
        raise ConfigError(f"method must be one of {sorted(METHODS)}; got {name!r}.")
    return METHODS[name]
