"""VGG networks with batch normalization and one linear layer as their head."""

import functools
from typing import Any

import flax.linen as nn
import jax

from experiments.config import ConfigError
from experiments.models.layers import BatchNorm, Conv, he_fan_out

_STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, max-pooling between them, a linear head on the mean.

    The channels double from stage to stage, up to eight times the first's. This is the form that
    papers on pruning use; Simonyan and Zisserman's has three dense layers and no norms. Initial
    weights as in torchvision: kernels He normal by fan-out, the head normal of deviation 0.01.

    Attributes:
        num_classes: Size of the output.
        width: Channels of the first stage.
        depth: Layers with weights in Simonyan and Zisserman's networks: 11, 13, 16 or 19, which
            is two more than here.
        dtype: Of the computation and the logits; by default that of images and parameters.
            Parameters are float32.

    References:
        Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image
        Recognition, ICLR 2015, table 1.
    """

    num_classes: int
    width: int = 64
    depth: int = 19
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
            ValueError: The depth is unknown.
            ConfigError: The images are too small for four poolings.
        """
        if self.depth not in _STAGES:
            raise ValueError(f"depth must be one of {sorted(_STAGES)}; got {self.depth}.")
        height, width = x.shape[1:3]
        if min(height, width) < 16:
            raise ConfigError(
                "images must be at least 16x16 for a VGG, which halves them four times; "
                f"got {height}x{width}."
            )
        conv = functools.partial(Conv, kernel_init=he_fan_out, dtype=self.dtype)
        norm = functools.partial(BatchNorm, use_running_average=not train, dtype=self.dtype)
        for stage, convolutions in enumerate(_STAGES[self.depth], start=1):
            if stage > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            channels = self.width * min(2 ** (stage - 1), 8)
            for index in range(1, convolutions + 1):
                x = conv(channels, (3, 3), name=f"stage{stage}_conv{index}")(x)
                x = nn.relu(norm(name=f"stage{stage}_norm{index}")(x))
        init = nn.initializers.normal(0.01)
        head = nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")
        return head(x.mean((1, 2)))
