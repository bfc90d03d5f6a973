"""Transformers in Flax Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.support.networks.case import Case, expand, image, promoting, tokens
from tests.support.networks.linen_images import build


class MlpBlock(nn.Module):
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        y = nn.gelu(nn.Dense(2 * x.shape[-1], dtype=self.dtype)(x))
        y = nn.Dropout(self.dropout)(y, deterministic)
        return nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class EncoderBlock(nn.Module):
    """A pre-norm encoder block."""

    heads: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, dtype=self.dtype, deterministic=deterministic
        )(y, y)
        x = x + y
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + MlpBlock(dtype=self.dtype)(y, deterministic)


class AttentionPooling(nn.Module):
    """A learned query attends to all tokens."""

    heads: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, _, dim = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, dim))
        probe = jnp.tile(probe, (batch, 1, 1))
        x = nn.MultiHeadDotProductAttention(num_heads=self.heads)(probe, x)
        x = x + MlpBlock()(nn.LayerNorm()(x))
        return x[:, 0]


class VisionTransformer(nn.Module):
    pool: str = "class_token"
    width: int = 8
    depth: int = 2
    patch: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        patch = (self.patch, self.patch)
        x = nn.Conv(
            self.width, patch, strides=patch, padding="VALID", dtype=self.dtype, name="patches"
        )(x)
        x = jnp.reshape(x, (x.shape[0], -1, self.width))
        if self.pool == "class_token":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width)).astype(self.dtype)
            x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        position = self.param(
            "pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + position.astype(self.dtype)
        for _ in range(self.depth):
            x = EncoderBlock(dtype=self.dtype)(x, deterministic=not train)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        x = x[:, 0] if self.pool == "class_token" else AttentionPooling()(x)
        return nn.Dense(5, dtype=jnp.float32, name="head")(x)


class Bert(nn.Module):
    """A post-norm encoder over token ids, with a pooler over the first token."""

    vocabulary: int = 11
    width: int = 8
    depth: int = 2

    @nn.compact
    def __call__(self, ids: jax.Array, segments: jax.Array) -> jax.Array:
        mask = nn.make_attention_mask(ids > 0, ids > 0)
        positions = jnp.arange(ids.shape[1])[None, :]
        x = nn.Embed(self.vocabulary, self.width, name="token")(ids)
        x = x + nn.Embed(2, self.width, name="segment")(segments)
        x = x + nn.Embed(16, self.width, name="position")(positions)
        x = nn.LayerNorm(epsilon=1e-12)(x)
        for _ in range(self.depth):
            y = nn.MultiHeadDotProductAttention(num_heads=2)(x, mask=mask)
            x = nn.LayerNorm(epsilon=1e-12)(x + y)
            x = nn.LayerNorm(epsilon=1e-12)(x + MlpBlock()(x))
        pooled = nn.tanh(nn.Dense(self.width, name="pooler")(x[:, 0]))
        return nn.Dense(3, name="classifier")(pooled)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of a (batch, length, heads, features) array."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None, :]
    sin, cos = jnp.sin(angle)[None, :, None, :], jnp.cos(angle)[None, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class DecoderBlock(nn.Module):
    heads: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]

        def project(name: str, y: jax.Array) -> jax.Array:
            features = (self.heads, width // self.heads)
            return nn.DenseGeneral(features, use_bias=False, name=name)(y)

        y = nn.RMSNorm()(x)
        query, key = rotate(project("query", y)), rotate(project("key", y))
        y = nn.dot_product_attention(query, key, project("value", y), mask=mask)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="out")(y)
        y = nn.RMSNorm()(x)
        gate = nn.silu(nn.Dense(12, use_bias=False, name="gate")(y))
        y = gate * nn.Dense(12, use_bias=False, name="up")(y)
        return x + nn.Dense(width, use_bias=False, name="down")(y)


class Decoder(nn.Module):
    vocabulary: int = 11
    width: int = 8

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        x = embed(ids)
        mask = nn.make_causal_mask(ids)
        for _ in range(2):
            x = DecoderBlock()(x, mask)
        return embed.attend(nn.RMSNorm()(x))


ATTENTION = "MultiHeadDotProductAttention_0"
ENCODER_LAYERS = expand(
    "{patches,head}/kernel",
    f"EncoderBlock_{{0,1}}/{ATTENTION}/{{query,key,value,out}}/kernel",
    "EncoderBlock_{0,1}/MlpBlock_0/{Dense_0,Dense_1}/kernel",
)
ENCODER_FREE = expand("pos_embedding", f"EncoderBlock_{{0,1}}/{ATTENTION}/{{query,key,value}}/bias")

CASES = (
    Case(
        "linen/vit_class_token",
        promoting(lambda: build(VisionTransformer(dtype=jnp.bfloat16), image())),
        ENCODER_LAYERS,
        free=ENCODER_FREE | {"cls"},
    ),
    Case(
        "linen/vit_attention_pooling",
        lambda: build(VisionTransformer(pool="attention"), image()),
        ENCODER_LAYERS
        | expand(
            f"AttentionPooling_0/{ATTENTION}/{{key,value,out}}/kernel",
            "AttentionPooling_0/MlpBlock_0/{Dense_0,Dense_1}/kernel",
        ),
        free=ENCODER_FREE
        | expand(
            "AttentionPooling_0/probe",
            f"AttentionPooling_0/{ATTENTION}/query/kernel",
            f"AttentionPooling_0/{ATTENTION}/{{query,key,value}}/bias",
        ),
    ),
    Case(
        "linen/bert",
        lambda: build(Bert(), (tokens(2, 6), tokens(2, 6, size=2))),
        expand(
            "MultiHeadDotProductAttention_{0,1}/{query,key,value,out}/kernel",
            "MlpBlock_{0,1}/{Dense_0,Dense_1}/kernel",
            "{pooler,classifier}/kernel",
        ),
        free=expand(
            "{token,segment,position}/embedding",
            "MultiHeadDotProductAttention_{0,1}/{query,key,value}/bias",
        ),
    ),
    Case(
        "linen/decoder",
        lambda: build(Decoder(), tokens(2, 6)),
        expand(
            "embed/embedding",
            "DecoderBlock_{0,1}/{query,key,value,out,gate,up,down}/kernel",
        ),
    ),
)
