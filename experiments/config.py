"""What one training job is. Imports nothing heavy, so that `--help` stays quick."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

DTYPES = ("float32", "bfloat16")
"""What a network can compute in."""

OPTIMIZERS = ("sgd", "adamw")
"""What can update the weights."""

AUGMENTATIONS = ("none", "shift", "crop-flip", "resized-crop-flip")
"""What can be done to training images."""

DENSE = "dense"
"""The method that removes no weight."""


class ConfigError(ValueError):
    """A job can't be run as it is configured. The message says what to change."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One job: prune a network at initialization, then train it.

    Attributes:
        dataset: Name of the data set.
        model: Name of the network.
        width: Channels of the network's first stage, or features of its tokens or first hidden
            layer; by default the published number.
        method: Name of the pruning method; "dense" prunes nothing.
        sparsity: Fraction of the prunable weights to remove. "dense" sets it to 0.
        seed: Seed of the initial weights, the pruning and the order of the data.
        init: Checkpoint whose weights the network starts from, instead of random ones.
        train_images: Train on so many images of the training split only.
        augmentation: What is done to training images; by default what suits the data set.
        epochs: Passes over the training split.
        batch_size: Images in a training step. An epoch's incomplete last batch is dropped.
        optimizer: "sgd" or "adamw".
        learning_rate: Peak learning rate.
        momentum: Momentum of SGD, not Nesterov's.
        weight_decay: Of SGD, the factor of the weights added to the gradients; of AdamW, the
            decoupled decay.
        warmup: Fraction of the steps in which the learning rate rises from zero.
        drops: Epochs after which the learning rate falls to a tenth; where there are none it falls
            to zero along a cosine.
        dtype: What the network computes in, "float32" or "bfloat16"; weights, the optimizer and
            the loss are float32.
    """

    dataset: str = "digits"
    model: str = "resnet20"
    width: int | None = None
    method: str = "dpai"
    sparsity: float = 0.99
    seed: int = 0
    init: str | None = None
    train_images: int | None = None
    augmentation: str | None = None
    epochs: int = 30
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    drops: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.method == DENSE:
            object.__setattr__(self, "sparsity", 0.0)

    def check(self) -> None:
        """Raises a `ConfigError` that names the first field whose value makes no sense."""
        for name in ("width", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in [0, 2**32); got {self.seed}.")
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"sparsity must lie in [0, 1); got {self.sparsity}.")
        if not self.learning_rate > 0.0:
            raise ConfigError(f"learning_rate must be positive; got {self.learning_rate}.")
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"momentum must lie in [0, 1); got {self.momentum}.")
        if not self.weight_decay >= 0.0:
            raise ConfigError(f"weight_decay must not be negative; got {self.weight_decay}.")
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError(f"warmup must lie in [0, 1); got {self.warmup}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {DTYPES}; got {self.dtype!r}.")

    @property
    def label(self) -> str:
        """What tells the job from its neighbours in a comparison: "dpai 99%"."""
        return self.method if self.method == DENSE else f"{self.method} {percent(self.sparsity)}"

    @property
    def title(self) -> str:
        """What tells the job from all others of a sweep, but for its recipe's settings."""
        return f"{self.label}, seed {self.seed}, {self.model} on {self.dataset}"

    @property
    def name(self) -> str:
        """A name for files, one per configuration."""
        digest = hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()
        parts = [self.dataset, self.model, self.method, f"{self.sparsity:g}", f"seed{self.seed}"]
        return "-".join([*parts, digest[:8]])

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as they are written to stores."""
        return dataclasses.asdict(self) | {"drops": list(self.drops)}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the configuration that `as_dict` gave these fields of."""
        return cls(**{**fields, "drops": tuple(fields["drops"])})


def percent(fraction: float) -> str:
    """Writes a sparsity as it is read in tables: 0.9684 as "96.84%", 0.9 as "90%"."""
    return f"{100 * fraction:.4g}%"
