"""Networks by name."""

import functools
from collections.abc import Callable

import flax.linen as nn

from experiments.config import ConfigError
from experiments.models.resnet import ResNet

MODELS: dict[str, Callable[..., nn.Module]] = {"resnet20": functools.partial(ResNet, depth=20)}


@functools.lru_cache
def create(name: str, num_classes: int, width: int) -> nn.Module:
    """Makes a network, or returns the very module made before of the same arguments.

    Whatever is cached by the module's methods, such as traces of `apply`, then serves again.

    Args:
        name: Name of the network, one of `MODELS`.
        num_classes: Size of the output.
        width: Channels of the first stage.

    Returns:
        A Linen module called as `module.apply(variables, images, train=...)`.

    Raises:
        ConfigError: No network has this name.
    """
    if name not in MODELS:
        raise ConfigError(f"model must be one of {sorted(MODELS)}; got {name!r}.")
    return MODELS[name](num_classes=num_classes, width=width)


__all__ = ["MODELS", "ResNet", "create"]
