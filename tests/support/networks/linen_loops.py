"""Flax Linen's lifted transformations, recurrent layers and shared layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.support.networks.case import Case, expand, image, normal, promoting, tokens
from tests.support.networks.linen_images import build


class SequenceTagger(nn.Module):
    """An embedding, a unidirectional LSTM over time, and a label for each token."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(11, 6, name="embed")(ids)
        hidden = nn.RNN(nn.OptimizedLSTMCell(8))(x)
        return nn.Dense(3)(hidden)


class BidirectionalClassifier(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        forward, backward = nn.RNN(nn.GRUCell(6)), nn.RNN(nn.GRUCell(6))
        hidden: Any = nn.Bidirectional(forward, backward)(x)
        return nn.Dense(3)(hidden.max(axis=1))


class VideoNet(nn.Module):
    """A convolutional LSTM over the frames of (batch, time, height, width, channels)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        carry, _ = nn.RNN(nn.ConvLSTMCell(4, (3, 3)), return_carry=True)(x)
        return nn.Dense(3)(carry[1].mean(axis=(1, 2)))


class ResidualMlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y), None


class ScannedMlp(nn.Module):
    """Layers stacked by `nn.scan`, each rematerialised in the backward pass."""

    depth: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8, name="stem")(x)
        layers = nn.scan(
            nn.remat(ResidualMlp, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


class ResidualConv(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.Conv(x.shape[-1], (3, 3))(x))
        return nn.relu(x + nn.Conv(x.shape[-1], (3, 3))(y))


class RematResNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        for _ in range(2):
            x = nn.remat(ResidualConv)()(x)
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(3)(x.reshape((x.shape[0], -1)))


class Siamese(nn.Module):
    """One encoder applied to both inputs, and one of its layers applied twice."""

    def setup(self) -> None:
        self.first = nn.Dense(8)
        self.repeated = nn.Dense(8)
        self.head = nn.Dense(1)

    def encode(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.first(x))
        return nn.relu(self.repeated(nn.relu(self.repeated(x))))

    def __call__(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return self.head(jnp.abs(self.encode(left) - self.encode(right)))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class Ensemble(nn.Module):
    """Members stacked by `nn.vmap`, all reading the same input; their mean."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        members = nn.vmap(
            Mlp,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return members(name="members")(x).mean(axis=0)


class WeightNormMlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.leaky_relu(nn.WeightNorm(nn.Dense(8, name="hidden"))(x))
        return nn.WeightNorm(nn.Dense(3, name="out"))(x)


CASES = (
    Case(
        "linen/lstm",
        lambda: build(SequenceTagger(), tokens(2, 5)),
        expand("Dense_0/kernel", "OptimizedLSTMCell_0/{hf,hg,hi,ho,if,ig,ii,io}/kernel"),
        free=expand("embed/embedding"),
    ),
    Case(
        "linen/bidirectional_gru",
        lambda: build(BidirectionalClassifier(), normal(2, 5, 4)),
        expand("Dense_0/kernel", "GRUCell_{0,1}/{hn,hr,hz,in,ir,iz}/kernel"),
    ),
    Case(
        "linen/conv_lstm",
        lambda: build(VideoNet(), normal(2, 3, 6, 6, 2)),
        expand("Dense_0/kernel", "ConvLSTMCell_0/{hh,ih}/kernel"),
    ),
    Case(
        "linen/scanned_layers",
        lambda: build(ScannedMlp(), normal(2, 6)),
        expand("{stem,head}/kernel", "layers/{Dense_0,Dense_1}/kernel"),
        free=expand("layers/{Dense_0,Dense_1}/bias", "layers/LayerNorm_0/{scale,bias}"),
    ),
    Case(
        "linen/remat",
        promoting(lambda: build(RematResNet(), image())),
        expand("{Conv_0,Dense_0}/kernel", "CheckpointResidualConv_{0,1}/{Conv_0,Conv_1}/kernel"),
    ),
    Case(
        "linen/siamese",
        lambda: build(Siamese(), (normal(2, 6), normal(2, 6, seed=2))),
        expand("{first,repeated,head}/kernel"),
    ),
    Case(
        "linen/ensemble",
        lambda: build(Ensemble(), normal(2, 6)),
        expand("members/{Dense_0,Dense_1}/kernel"),
        free=expand("members/{Dense_0,Dense_1}/bias"),
    ),
    Case(
        "linen/weight_norm",
        lambda: build(WeightNormMlp(), normal(2, 6)),
        expand("{hidden,out}/kernel"),
    ),
)
