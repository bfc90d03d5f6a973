"""Multilayer perceptrons."""

from typing import Any

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Hidden dense layers of one size with ReLU, then a linear head, on flattened images.

    Kernels start at He normal, the head at LeCun normal.

    Attributes:
        num_classes: Size of the output.
        width: Features of each hidden layer.
        depth: Layers with weights, the head among them.
        dtype: Of the computation and the logits; by default that of images and parameters.
            Parameters are float32.
    """

    num_classes: int
    width: int = 256
    depth: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels)."""
        del train  # It computes the same in training.
        x = x.reshape(len(x), -1)
        init = nn.initializers.he_normal()
        for layer in range(1, self.depth):
            hidden = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=f"hidden{layer}")
            x = nn.relu(hidden(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
