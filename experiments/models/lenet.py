"""LeNet-300-100, a network of dense layers."""

from typing import Any

import flax.linen as nn
import jax


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
