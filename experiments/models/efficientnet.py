"""EfficientNet (Tan and Le 2019)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from experiments.models.layers import Conv, excited, he_fan_out

_STEM, _TOP = 32, 1280

# Expansion, output channels, blocks, step and filter size of each stage: table 1 of the paper.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)

# TensorFlow's depthwise kernels count one output each, so that their fan-out is their taps;
# of the same kernels in Flax that is the fan-in.
_depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
# A variance of 1 / (3 · outputs) is that of a uniform distribution within 1 / √outputs.
_head_init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


class MBConv(nn.Module):
    """A depthwise convolution between two of 1x1, gated by squeeze-and-excitation.

    The input is added to the output if they have the same shape.

    Attributes:
        conv: Makes the convolutions.
        norm: Makes the norms.
        expansion: Channels of the depthwise convolution for each input channel; if it is 1, there
            is no first 1x1 convolution.
        width: Output channels.
        stride: Step of the depthwise convolution along both image axes.
        taps: Size of its filter along each.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    expansion: int
    width: int
    stride: int
    taps: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns features (batch, height / stride, width / stride, self.width)."""
        inputs = x.shape[-1]
        channels = inputs * self.expansion
        y = x
        if self.expansion > 1:
            y = self.conv(channels, (1, 1), name="expand")(y)
            y = nn.silu(self.norm(name="expand_norm")(y))
        y = self.conv(
            channels,
            (self.taps, self.taps),
            strides=self.stride,
            feature_group_count=channels,
            kernel_init=_depthwise_init,
            name="depthwise",
        )(y)
        y = nn.silu(self.norm(name="depthwise_norm")(y))
        y = excited(y, max(1, inputs // 4), self.conv, nn.silu)
        y = self.conv(self.width, (1, 1), name="project")(y)
        y = self.norm(name="project_norm")(y)
        return x + y if x.shape == y.shape else y


class EfficientNet(nn.Module):
    """A 3x3 stem that halves the image, seven stages of `MBConv`, a 1x1 convolution, a linear head.

    Initial weights as in the authors' code: kernels normal by fan-out, the head uniform within
    1 / √outputs. There is no dropout or stochastic depth; they are not part of the architecture.

    Attributes:
        num_classes: Size of the output.
        width: Channels of the stem. Those of all stages are in proportion; at the 32 of
            EfficientNet-B0 they are the published ones.
        depth: Factor of each stage's blocks, rounded up: 1 for B0.
        dtype: Of the computation and the logits; by default that of images and parameters.
            Parameters are float32.

    References:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks,
        ICML 2019, table 1.
    """

    num_classes: int
    width: int = _STEM
    depth: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels)."""
        conv = functools.partial(Conv, kernel_init=he_fan_out, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.99,
            epsilon=1e-3,
            dtype=self.dtype,
        )

        def scaled(channels: int) -> int:
            return math.ceil(channels * self.width / _STEM)

        x = conv(scaled(_STEM), (3, 3), strides=2, name="stem")(x)
        x = nn.silu(norm(name="stem_norm")(x))
        for stage, (expansion, channels, blocks, stride, taps) in enumerate(_STAGES, start=1):
            for block in range(1, math.ceil(blocks * self.depth) + 1):
                step = stride if block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = MBConv(conv, norm, expansion, scaled(channels), step, taps, name=name)(x)
        x = nn.silu(norm(name="top_norm")(conv(scaled(_TOP), (1, 1), name="top")(x)))
        head = nn.Dense(self.num_classes, kernel_init=_head_init, dtype=self.dtype, name="head")
        return head(x.mean((1, 2)))
