"""Jobs by the grid: methods, sparsities and seeds of one recipe. Imports nothing heavy."""

import dataclasses
from collections.abc import Sequence

from experiments.config import DENSE, Config, ConfigError


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One recipe under several methods, at several sparsities, several times.

    Attributes:
        base: What all jobs have in common; its method, sparsity and seed are replaced.
        methods: Names of methods.
        sparsities: Fractions of the prunable weights to remove.
        seeds: How often each job is run, with other weights, masks and data order.
    """

    base: Config
    methods: Sequence[str]
    sparsities: Sequence[float]
    seeds: int = 3

    def configs(self) -> list[Config]:
        """Returns the jobs, seed by seed: the dense network, then each method at each sparsity.

        Raises:
            ConfigError: There would be none but the dense network.
        """
        for argument, values in (("methods", self.methods), ("sparsities", self.sparsities)):
            if not values:
                raise ConfigError(f"{argument} must name at least one; got none.")
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1; got {self.seeds}.")
        pruned = [
            (name, sparsity)
            for sparsity in self.sparsities
            for name in self.methods
            if name != DENSE
        ]
        return [
            dataclasses.replace(self.base, method=method, sparsity=sparsity, seed=seed)
            for seed in range(self.seeds)
            for method, sparsity in [(DENSE, 0.0), *pruned]
        ]
