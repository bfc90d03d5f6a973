"""A language model like GPT-2 (Radford et al. 2019)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.config import ConfigError
from experiments.models.transformer import TransformerBlock, check_heads


class GPT2(nn.Module):
    """Embedded tokens with learned positions, causal blocks, logits by the same embedding.

    Kernels, embedding and positions start at normal of deviation 0.02; the two kernels of each
    block that are added to its input at that over √(2 · depth), as the paper describes.

    Attributes:
        num_classes: Size of the vocabulary; 50257 in GPT-2.
        width: Features of a token.
        depth: Number of blocks.
        heads: Attention heads of a block.
        context: Largest length of a sequence.
        dtype: Of the computation and the logits; by default float32, as the parameters are.

    References:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3.
    """

    num_classes: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    context: int = 1024
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, length, num_classes) of the token after each of the given ones.

        Args:
            x: Token ids, integers of shape (batch, length).
            train: Has no effect.

        Raises:
            ConfigError: The input is not token ids or longer than the context, or heads don't share
                the features evenly.
        """
        del train  # It computes the same in training.
        check_heads(self.width, self.heads)
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ConfigError(
                "gpt2 takes integer token ids of shape (batch, length); "
                f"got {x.dtype} of shape {x.shape}."
            )
        length = x.shape[1]
        if length > self.context:
            raise ConfigError(
                f"a sequence must not exceed the context of {self.context} tokens; got {length}."
            )
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(
            self.num_classes, self.width, embedding_init=init, dtype=self.dtype, name="embed"
        )
        mask = nn.make_causal_mask(x, dtype=bool)
        positions = self.param("positions", init, (1, self.context, self.width))
        x = embed(x)
        x = x + positions[:, :length].astype(x.dtype)
        for block in range(1, self.depth + 1):
            x = TransformerBlock(
                self.heads,
                epsilon=1e-5,
                kernel_init=init,
                residual_init=nn.initializers.normal(0.02 / math.sqrt(2 * self.depth)),
                dtype=self.dtype,
                name=f"block{block}",
            )(x, mask)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x))
