"""Residual networks (He et al. 2016): those for small images, and those for ImageNet."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from experiments.models.layers import BatchNorm, Conv, excited, he_fan_out

STEMS = ("small", "imagenet")
"""What can stand before the first stage of an `ImageNetResNet`."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: a 1x1 convolution where the shape changes.

    Attributes:
        conv: Makes the convolutions.
        norm: Makes the norms.
        width: Output channels.
        stride: Step of the first convolution along both image axes.
        reduction: Output channels for each hidden feature of the squeeze-and-excitation that gates
            them, before the shortcut; without one if None.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    width: int
    stride: int = 1
    reduction: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns features (batch, height / stride, width / stride, self.width)."""
        y = self.conv(self.width, (3, 3), strides=self.stride)(x)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(self.width, (3, 3))(y))
        if self.reduction is not None:
            y = excited(y, max(1, self.width // self.reduction), self.conv, nn.relu)
        if x.shape != y.shape:
            x = self.conv(self.width, (1, 1), strides=self.stride, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut as in `BasicBlock`.

    The 3x3 convolution takes the step, as in torchvision ("v1.5"), not the first one.

    Attributes:
        conv: Makes the convolutions.
        norm: Makes the norms.
        width: Channels of the 3x3 convolution; the output has four times as many.
        stride: Step of the 3x3 convolution along both image axes.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns features (batch, height / stride, width / stride, 4 * self.width)."""
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = self.conv(self.width, (3, 3), strides=self.stride)(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.width, (1, 1), strides=self.stride, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The networks for small images: a 3x3 stem, three stages of basic blocks, a linear head.

    Each stage after the first halves the image and doubles the channels. Kernels start at He
    normal by fan-in, the head at LeCun normal.

    Attributes:
        num_classes: Size of the output.
        width: Channels of the stem and the first stage.
        depth: Layers with weights on the longest path, those of gates aside: 6n + 2 for n blocks a
            stage.
        reduction: Of the blocks' squeeze-and-excitation, as in `BasicBlock`.
        dtype: Of the computation and the logits; by default that of images and parameters.
            Parameters are float32.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; Hu et al.,
        Squeeze-and-Excitation Networks, CVPR 2018, for the gates.
    """

    num_classes: int
    width: int = 16
    depth: int = 20
    reduction: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
            ValueError: No number of blocks gives the depth.
        """
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n at least 1; got {self.depth}.")
        conv = functools.partial(Conv, kernel_init=nn.initializers.he_normal(), dtype=self.dtype)
        norm = functools.partial(BatchNorm, use_running_average=not train, dtype=self.dtype)
        x = nn.relu(norm(name="stem_norm")(conv(self.width, (3, 3), name="stem")(x)))
        block = functools.partial(BasicBlock, conv, norm, reduction=self.reduction)
        x = _stages(x, block, (blocks,) * 3, self.width)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x.mean((1, 2)))


class ImageNetResNet(nn.Module):
    """The networks for ImageNet: a stem, four stages of blocks, a linear head.

    Each stage after the first halves the image and doubles the channels. Initial weights as in
    torchvision: kernels He normal by fan-out, the head uniform within 1 / √inputs; but its bias
    starts at 0. Layers with a step pad as XLA's "SAME" does: on images of even size one row less
    at the top and one column less at the left than torchvision.

    Attributes:
        num_classes: Size of the output.
        width: Channels of the stem, and of the first stage's 3x3 convolutions.
        depth: Layers with weights on the longest path: 18 or 34 of basic blocks, 50 of
            bottlenecks.
        stem: "imagenet", a 7x7 convolution and a 3x3 max-pooling, which both halve the image;
            "small", a 3x3 convolution, as usual on CIFAR and Tiny-ImageNet.
        dtype: Of the computation and the logits; by default that of images and parameters.
            Parameters are float32.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, table 1.
    """

    num_classes: int
    width: int = 64
    depth: int = 18
    stem: str = "small"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
            ValueError: The depth or the stem is unknown.
        """
        if self.depth not in _IMAGENET_STAGES:
            raise ValueError(f"depth must be one of {sorted(_IMAGENET_STAGES)}; got {self.depth}.")
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}; got {self.stem!r}.")
        block, blocks = _IMAGENET_STAGES[self.depth]
        conv = functools.partial(Conv, kernel_init=he_fan_out, dtype=self.dtype)
        norm = functools.partial(BatchNorm, use_running_average=not train, dtype=self.dtype)
        if self.stem == "imagenet":
            x = conv(self.width, (7, 7), strides=2, name="stem")(x)
        else:
            x = conv(self.width, (3, 3), name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = _stages(x, functools.partial(block, conv, norm), blocks, self.width)
        head = nn.Dense(self.num_classes, kernel_init=_uniform, dtype=self.dtype, name="head")
        return head(x.mean((1, 2)))


_IMAGENET_STAGES: dict[int, tuple[type[BasicBlock] | type[Bottleneck], Sequence[int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}

# A variance of 1 / (3 · inputs) is that of a uniform distribution within 1 / √inputs.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _stages(
    x: jax.Array, block: Callable[..., nn.Module], blocks: Sequence[int], width: int
) -> jax.Array:
    """Applies stages with these numbers of blocks, inside a network's compact call."""
    for stage, number in enumerate(blocks):
        for index in range(number):
            stride = 2 if stage > 0 and index == 0 else 1
            name = f"stage{stage + 1}_block{index + 1}"
            x = block(width * 2**stage, stride, name=name)(x)
    return x
