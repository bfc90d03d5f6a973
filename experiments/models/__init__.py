"""Networks by name."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from experiments.config import ConfigError
from experiments.models.efficientnet import EfficientNet
from experiments.models.gpt2 import GPT2
from experiments.models.lenet import LeNet, LeNet5
from experiments.models.mlp import MLP
from experiments.models.resized import Resized, resized_shape
from experiments.models.resnet import ImageNetResNet, ResNet
from experiments.models.vgg import VGG
from experiments.models.vit import ViT

_VIT_SIZES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}


def _resnet(depth: int, stem: str) -> Callable[..., nn.Module]:
    return functools.partial(ImageNetResNet, depth=depth, stem=stem)


def _vit(size: str, patch: int) -> Callable[..., nn.Module]:
    width, heads = _VIT_SIZES[size]
    return functools.partial(ViT, width=width, heads=heads, patch=patch)


# "mlp" has three layers, "lenet" is LeNet-300-100. ResNets of 18, 34 and 50 layers have a stem for
# small images, or ImageNet's if the name says so. Patches of 4, 8 and 16 pixels make 64, 64 and 196
# tokens from images of CIFAR, Tiny-ImageNet and ImageNet.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    **{f"mlp{depth}": functools.partial(MLP, depth=depth) for depth in (2, 4, 8)},
    "lenet": LeNet,
    "lenet5": LeNet5,
    **{f"resnet{depth}": functools.partial(ResNet, depth=depth) for depth in (20, 32, 56)},
    "se_resnet20": functools.partial(ResNet, depth=20, reduction=4),
    **{f"resnet{depth}": _resnet(depth, "small") for depth in (18, 34, 50)},
    **{f"resnet{depth}_imagenet": _resnet(depth, "imagenet") for depth in (18, 34, 50)},
    **{f"vgg{depth}": functools.partial(VGG, depth=depth) for depth in (11, 13, 16, 19)},
    "efficientnet_b0": EfficientNet,
    **{f"vit_{size}{patch}": _vit(size, patch) for size in _VIT_SIZES for patch in (4, 8, 16)},
    "gpt2": GPT2,
}
"""Functions that make each network, at its published width unless `width` is given."""


@functools.lru_cache
def create(
    name: str,
    num_classes: int,
    width: int | None = None,
    dtype: Any = None,
    image_size: int | None = None,
) -> nn.Module:
    """Makes a network, or returns the module made before from the same arguments.

    So anything cached by the module's methods, such as traces of `apply`, is used again.

    Args:
        name: Name of the network, one of `MODELS`.
        num_classes: Size of the output; of a language model, its vocabulary.
        width: Channels of the first stage, or features of a token or of the first hidden layer;
            None for the published number.
        dtype: Of the computation; None for that of images and parameters.
        image_size: Resizes images to this many pixels along both axes; None leaves them.

    Returns:
        A Linen module called as `module.apply(variables, images, train=...)`.

    Raises:
        ConfigError: No network has this name.
    """
    if name not in MODELS:
        raise ConfigError(f"model must be one of {sorted(MODELS)}; got {name!r}.")
    given = {"width": width, "dtype": dtype}
    settings = {field: value for field, value in given.items() if value is not None}
    model = MODELS[name](num_classes=num_classes, **settings)
    return model if image_size is None else Resized(model, image_size)


__all__ = [
    "GPT2",
    "MLP",
    "MODELS",
    "VGG",
    "EfficientNet",
    "ImageNetResNet",
    "LeNet",
    "LeNet5",
    "ResNet",
    "Resized",
    "ViT",
    "create",
    "resized_shape",
]
