"""Grids of jobs: methods, sparsities and seeds of one recipe. Imports nothing heavy."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from experiments import recipes
from experiments.config import DENSE, Config, ConfigError


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One recipe with several methods, sparsities and seeds.

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
            ConfigError: There would be no job besides the dense network.
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

    def changed(
        self,
        *,
        dataset: str | None = None,
        methods: Sequence[str] | None = None,
        sparsities: Sequence[float] | None = None,
        seeds: int | None = None,
        epochs: int | None = None,
    ) -> Self:
        """Returns the sweep with some of its settings replaced.

        If the epochs are, the learning rate falls at the same fractions of them.
        """
        base = self.base
        if dataset is not None:
            base = dataclasses.replace(base, dataset=dataset)
        if epochs is not None:
            drops = tuple(round(epoch * epochs / base.epochs) for epoch in base.drops)
            base = dataclasses.replace(base, epochs=epochs, drops=drops)
        given = {"methods": methods, "sparsities": sparsities, "seeds": seeds}
        changes: dict[str, Any] = {
            name: value for name, value in given.items() if value is not None
        }
        return dataclasses.replace(self, base=base, **changes)


def configs(names: Sequence[str], scale: str, **changes: Any) -> list[Config]:
    """Returns the jobs of recipes.

    Args:
        names: Names of recipes, or files.
        scale: "full" or "small".
        **changes: Settings that replace those of the recipes; see `Sweep.changed`.

    Raises:
        ConfigError: There is no such recipe, or it gives no jobs.
    """
    if not names:
        raise ConfigError("recipes must name at least one; got none.")
    found: list[Config] = []
    for name in names:
        sweeps = recipes.find(name).sweep(scale)
        for one in [sweeps] if isinstance(sweeps, Sweep) else sweeps:
            found += one.changed(**changes).configs()
    return list(dict.fromkeys(found))  # sweeps can share their dense networks
