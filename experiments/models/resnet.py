"""Residual networks for small images (He et al. 2016, section 4.2)."""

import functools

import flax.linen as nn
import jax

_Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
_BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: a 1x1 convolution where the shape changes.

    Attributes:
        width: Output channels.
        stride: Step of the first convolution along both image axes.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns features (batch, height / stride, width / stride, self.width)."""
        y = _Conv(self.width, (3, 3), strides=self.stride)(x)
        y = nn.relu(_BatchNorm(use_running_average=not train)(y))
        y = _Conv(self.width, (3, 3))(y)
        y = _BatchNorm(use_running_average=not train)(y)
        if x.shape != y.shape:
            x = _Conv(self.width, (1, 1), strides=self.stride, name="shortcut")(x)
            x = _BatchNorm(use_running_average=not train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A 3x3 stem, three stages that halve the image and double the channels, a linear head.

    Attributes:
        num_classes: Size of the output.
        width: Channels of the stem and the first stage.
        depth: Layers with weights on the longest path: 6n + 2 for n blocks a stage.
    """

    num_classes: int
    width: int = 16
    depth: int = 20

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels)."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n at least 1; got {self.depth}.")
        x = _Conv(self.width, (3, 3), name="stem")(x)
        x = nn.relu(_BatchNorm(use_running_average=not train, name="stem_norm")(x))
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = BasicBlock(self.width * 2**stage, stride, name=name)(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))
