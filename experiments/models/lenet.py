"""LeNet-300-100, a network of dense layers, and LeNet-5, one of convolutions."""

from typing import Any

import flax.linen as nn
import jax

from experiments.config import ConfigError


class LeNet(nn.Module):
    """Two hidden dense layers with ReLU, then a linear head, on flattened images.

    Kernels start at Glorot normal, truncated as in TensorFlow, as in the lottery ticket paper.

    Attributes:
        num_classes: Size of the output.
        width: Features of the first hidden layer; the second has a third of them, rounded up.
        dtype: Of the computation and the logits; by default that of images and parameters.
            Parameters are float32.

    References:
        LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998, for the
        layers; Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019, for the rest.
    """

    num_classes: int
    width: int = 300
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels)."""
        del train  # It computes the same in training.
        x = x.reshape(len(x), -1)
        sizes = {"hidden1": self.width, "hidden2": -(-self.width // 3), "head": self.num_classes}
        for name, size in sizes.items():
            init = nn.initializers.glorot_normal()
            x = nn.Dense(size, kernel_init=init, dtype=self.dtype, name=name)(x)
            x = x if name == "head" else nn.relu(x)
        return x


class LeNet5(nn.Module):
    """Two 5x5 convolutions with max-pooling, two dense layers and a linear head; ReLU.

    This is today's common form. LeCun et al. use tanh, sums with a trained scale for pooling, a
    second convolution that reads only some of the channels, and radial basis functions at the end.
    Their images are 32x32. Here the first convolution pads by two pixels, so that images of 28x28
    give the same features. Kernels start at LeCun normal.

    Attributes:
        num_classes: Size of the output.
        width: Channels of the first convolution; all other layers grow with it.
        dtype: Of the computation and the logits; by default that of images and parameters.
            Parameters are float32.

    References:
        LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998, figure 2.
    """

    num_classes: int
    width: int = 6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
            ConfigError: The images are too small for its convolutions.
        """
        del train  # It computes the same in training.
        height, width = x.shape[1:3]
        if min(height, width) < 12:
            raise ConfigError(f"images must be at least 12x12 for LeNet-5; got {height}x{width}.")
        # 6, 16, 120 and 84 at the published width.
        for name, channels, padding in (
            ("conv1", self.width, "SAME"),
            ("conv2", -(-self.width * 8 // 3), "VALID"),
        ):
            conv = nn.Conv(channels, (5, 5), padding=padding, dtype=self.dtype, name=name)
            x = nn.max_pool(nn.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        for name, features in (("hidden1", 20 * self.width), ("hidden2", 14 * self.width)):
            x = nn.relu(nn.Dense(features, dtype=self.dtype, name=name)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
