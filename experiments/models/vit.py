"""Vision transformers (Dosovitskiy et al. 2021)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.config import ConfigError
from experiments.models.transformer import TransformerBlock, check_heads


class ViT(nn.Module):
    """Patches and a class token with learned positions, blocks, a linear head on the class token.

    Initial weights as in the authors' code: patch kernel LeCun normal, other kernels Glorot
    uniform, the MLP's biases normal of deviation 1e-6, positions normal of deviation 0.02. But the
    head, which starts at zero there, starts at LeCun normal, as in big_vision with
    `head_zeroinit=False`: weights that are all zero have no saliency.

    Attributes:
        num_classes: Size of the output.
        width: Features of a token: 192 in ViT-Ti, 384 in ViT-S, 768 in ViT-B.
        depth: Number of blocks.
        heads: Attention heads of a block: 3 in ViT-Ti, 6 in ViT-S, 12 in ViT-B.
        patch: Pixels of a patch along each image axis.
        dtype: Of the computation and the logits; by default that of images and parameters.
            Parameters are float32.

    References:
        Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, for ViT-B; Touvron et al.,
        Training Data-Efficient Image Transformers, ICML 2021, for the widths of Ti and S.
    """

    num_classes: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
            ConfigError: Patches don't tile the images, or heads don't share the features evenly.
        """
        del train  # It computes the same in training.
        check_heads(self.width, self.heads)
        batch, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise ConfigError(
                f"images must be a multiple of the patch size {self.patch} along both axes; "
                f"got {height}x{width}."
            )
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, strides=patch, dtype=self.dtype, name="patches")(x)
        x = x.reshape(batch, -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.width))
        x = jnp.concatenate([token, x], axis=1)
        shape = (1, *x.shape[1:])
        x = x + self.param("positions", nn.initializers.normal(0.02), shape).astype(x.dtype)
        for block in range(1, self.depth + 1):
            x = TransformerBlock(
                self.heads,
                epsilon=1e-6,
                kernel_init=nn.initializers.glorot_uniform(),
                residual_init=nn.initializers.glorot_uniform(),
                mlp_bias_init=nn.initializers.normal(1e-6),
                dtype=self.dtype,
                name=f"block{block}",
            )(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, 0])
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
