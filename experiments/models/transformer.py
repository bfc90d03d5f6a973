"""The block that transformers are made of."""

from typing import Any

import flax.linen as nn
import jax

from experiments.config import ConfigError


class TransformerBlock(nn.Module):
    """Self-attention, then an MLP of four times the features, each normed before and added.

    Attributes:
        heads: Number of attention heads.
        epsilon: What the norms add to the variance.
        kernel_init: Initial weights of kernels.
        residual_init: The same for the two kernels whose output is added to the block's input.
        mlp_bias_init: Initial biases of the MLP; others start at 0.
        dtype: Of the computation; by default that of inputs and parameters.
    """

    heads: int
    epsilon: float
    kernel_init: nn.initializers.Initializer
    residual_init: nn.initializers.Initializer
    mlp_bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns features of the same shape (batch, length, features).

        Args:
            x: The features.
            mask: Which position (third axis) may attend to which (fourth axis), bool of a shape
                that broadcasts to (batch, heads, length, length); by default each to all.
        """
        width = x.shape[-1]
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="attention_norm")(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            kernel_init=self.kernel_init,
            out_kernel_init=self.residual_init,
            dtype=self.dtype,
            name="attention",
        )(y, mask=mask)
        x = x + y
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="mlp_norm")(x)
        y = nn.Dense(
            4 * width,
            kernel_init=self.kernel_init,
            bias_init=self.mlp_bias_init,
            dtype=self.dtype,
            name="mlp_in",
        )(y)
        y = nn.Dense(
            width,
            kernel_init=self.residual_init,
            bias_init=self.mlp_bias_init,
            dtype=self.dtype,
            name="mlp_out",
        )(nn.gelu(y))
        return x + y


def check_heads(width: int, heads: int) -> None:
    """Checks that the heads share the features evenly.

    Raises:
        ConfigError: They don't.
    """
    if width % heads:
        raise ConfigError(f"width must be a multiple of the {heads} attention heads; got {width}.")
