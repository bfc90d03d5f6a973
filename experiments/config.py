"""The configuration of a training job. Imports nothing heavy, so that `--help` stays quick."""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Self

DTYPES = ("float32", "bfloat16")
"""What a network can compute in."""

OPTIMIZERS = ("sgd", "adamw")
"""What can update the weights."""

GATES = ("balanced", "jacobian", "signal")
"""How a gate can take part in paths (see `dpai_jax.trace`)."""

AUGMENTATIONS = ("none", "shift", "crop-flip", "resized-crop-flip")
"""What can be done to training images."""

_NUMBERS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda x: 0 <= x < 2**32, "lie in [0, 2**32)"),
    "sparsity": (lambda x: 0.0 <= x < 1.0, "lie in [0, 1)"),
    "learning_rate": (lambda x: 0.0 < x < math.inf, "be positive and finite"),
    "momentum": (lambda x: 0.0 <= x < 1.0, "lie in [0, 1)"),
    "weight_decay": (lambda x: 0.0 <= x < math.inf, "be finite and not negative"),
    "warmup": (lambda x: 0.0 <= x < 1.0, "lie in [0, 1)"),
}
"""What a field's number must be, as a test and in words."""

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
        granularity: Which weights stand or fall together: "kernel", "channel", or N:M such as
            "2:4"; by default each stands alone. "dense" has none.
        gates: How a factor that only modulates another one takes part in paths, one of `GATES`; by
            default as `dpai_jax.trace` has it. "dense" has none.
        seed: Seed of the initial weights, the pruning and the order of the data.
        init: Checkpoint whose weights the network starts from, instead of random ones.
        train_images: Train on this many images of the training split only.
        augmentation: How training images are augmented; by default as suits the data set.
        image_size: The network first resizes images to this many pixels along both axes,
            bilinearly; by default it does not.
        epochs: Passes over the training split.
        batch_size: Images in a training step. An epoch's incomplete last batch is dropped.
        optimizer: "sgd" or "adamw".
        learning_rate: Peak learning rate.
        momentum: Momentum of SGD, not Nesterov's.
        weight_decay: Of SGD, the factor of the weights added to the gradients; of AdamW, the
            decoupled decay. Biases and norms decay too, as they do by default in PyTorch.
        warmup: Fraction of the steps in which the learning rate rises from zero.
        drops: Epochs after which the learning rate falls to a tenth, none of them in the warm-up;
            if empty, it falls to zero along a cosine.
        dtype: What the network computes in, "float32" or "bfloat16"; weights, the optimizer and
            the loss are float32.
    """

    dataset: str = "digits"
    model: str = "resnet20"
    width: int | None = None
    method: str = "dpai"
    sparsity: float = 0.99
    granularity: str | None = None
    gates: str | None = None
    seed: int = 0
    init: str | None = None
    train_images: int | None = None
    augmentation: str | None = None
    image_size: int | None = None
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
            object.__setattr__(self, "granularity", None)
            object.__setattr__(self, "gates", None)

    def check(self) -> None:
        """Raises a `ConfigError` that names the first field whose value makes no sense."""
        for name in ("width", "epochs", "batch_size", "train_images", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}.")
        choices = {"optimizer": OPTIMIZERS, "dtype": DTYPES}
        optional = {"augmentation": AUGMENTATIONS, "gates": GATES}
        for name, allowed in (choices | optional).items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name in optional):
                raise ConfigError(f"{name} must be one of {allowed}; got {value!r}.")
        for name, (is_right, demand) in _NUMBERS.items():
            value = getattr(self, name)
            if not is_right(value):
                raise ConfigError(f"{name} must {demand}; got {value}.")
        self._check_drops()

    def _check_drops(self) -> None:
        rising = all(a < b for a, b in itertools.pairwise(self.drops))
        if not rising or not all(1 <= epoch < self.epochs for epoch in self.drops):
            raise ConfigError(
                f"drops must rise and lie in [1, {self.epochs}), the epochs; got {self.drops}."
            )
        if self.drops and self.drops[0] < self.warmup * self.epochs:
            raise ConfigError(
                f"drops must come after the warm-up, which takes {self.warmup * self.epochs:g} "
                f"epochs; got {self.drops}."
            )

    @property
    def label(self) -> str:
        """What tells the job from its neighbours in a comparison: "dpai 99%"."""
        if self.method == DENSE:
            return self.method
        by = "" if self.granularity is None else f" by {self.granularity}"
        gates = "" if self.gates is None else f" with gates {self.gates}"
        return f"{self.method} {percent(self.sparsity)}{by}{gates}"

    @property
    def title(self) -> str:
        """A name for the job within a sweep; it leaves out the recipe's settings."""
        return f"{self.label}, seed {self.seed}, {self.model} on {self.dataset}"

    @property
    def name(self) -> str:
        """A name for files, one per configuration."""
        digest = hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()
        # Of a path, only the file's name.
        dataset = pathlib.PurePath(self.dataset.replace(":", "/")).name
        parts = [dataset, self.model, self.method, f"{self.sparsity:g}", f"seed{self.seed}"]
        plain = [re.sub(r"[^\w.+=-]+", "_", part)[:60] for part in parts]
        return "-".join([*plain, digest[:8]])

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as they are written to stores."""
        return dataclasses.asdict(self) | {"drops": list(self.drops)}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the configuration with these fields, as `as_dict` returns them."""
        return cls(**{**fields, "drops": tuple(fields["drops"])})


def percent(fraction: float) -> str:
    """Returns a sparsity as tables show it: 0.9684 as "96.84%", 0.9 as "90%"."""
    return f"{100 * fraction:.4g}%"
