"""Networks in Haiku."""

from collections.abc import Callable
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from tests.support.networks.case import Built, Case, draw, expand, image, normal, promoting, tokens


def build(forward: Callable[..., Any], x: Any, batch_norm: bool = False) -> Built:
    """`hk.transform_with_state(forward).apply` as a function of the parameters.

    With `batch_norm`, `forward` takes `is_training`: only then does Haiku make the averages.
    """
    network = hk.transform_with_state(forward)
    train, test = ({"is_training": True}, {"is_training": False}) if batch_norm else ({}, {})
    with jax.numpy_dtype_promotion("standard"):  # the averages' first update counts in integers
        shapes, state = jax.eval_shape(partial(network.init, **train), jax.random.key(0), x)
    # Haiku's running variances have four axes, and must be positive all the same.
    state = jax.tree.map(lambda leaf: jnp.asarray(np.abs(leaf)), draw(state))

    def fn(params: Any, x: Any) -> Any:
        output, _ = network.apply(params, state, None, x, **test)
        return output

    return fn, draw(shapes), x


def batch_norm(x: jax.Array, is_training: bool) -> jax.Array:
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
    return norm(x, is_training)


class ResNeXtBlock(hk.Module):
    """A bottleneck block whose middle convolution is grouped."""

    def __init__(self, channels: int, stride: int, groups: int, name: str | None = None):
        super().__init__(name=name)
        self.channels, self.stride, self.groups = channels, stride, groups

    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        norm = partial(batch_norm, is_training=is_training)
        y = hk.Conv2D(self.channels, 1, with_bias=False, name="reduce")(x)
        y = jax.nn.relu(norm(y))
        y = hk.Conv2D(
            self.channels,
            3,
            self.stride,
            feature_group_count=self.groups,
            with_bias=False,
            name="grouped",
        )(y)
        y = jax.nn.relu(norm(y))
        y = norm(hk.Conv2D(2 * self.channels, 1, with_bias=False, name="widen")(y))
        shortcut = hk.Conv2D(2 * self.channels, 1, self.stride, with_bias=False, name="shortcut")
        return jax.nn.relu(y + norm(shortcut(x)))


def resnext(x: jax.Array, is_training: bool) -> jax.Array:
    norm = partial(batch_norm, is_training=is_training)
    x = jax.nn.relu(norm(hk.Conv2D(8, 3, with_bias=False, name="stem")(x)))
    x = hk.max_pool(x, window_shape=(1, 3, 3, 1), strides=(1, 2, 2, 1), padding="SAME")
    x = ResNeXtBlock(8, 1, groups=4, name="block1")(x, is_training)
    x = ResNeXtBlock(12, 2, groups=3, name="block2")(x, is_training)
    return hk.Linear(5, name="head")(jnp.mean(x, axis=(1, 2)))


class SplitAttention(hk.Module):
    """ResNeSt's convolution: `radix` grouped splits, weighed against each other per channel."""

    def __init__(self, channels: int, radix: int, groups: int = 1, name: str | None = None):
        super().__init__(name=name)
        self.channels, self.radix, self.groups = channels, radix, groups

    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        norm = partial(batch_norm, is_training=is_training)
        batch, height, width, _ = x.shape
        y = hk.Conv2D(
            self.channels * self.radix,
            3,
            feature_group_count=self.groups * self.radix,
            with_bias=False,
            name="splits",
        )(x)
        y = jax.nn.relu(norm(y))
        splits = y.reshape(batch, height, width, self.radix, self.channels)
        pooled = jnp.mean(jnp.sum(splits, axis=3), axis=(1, 2), keepdims=True)
        hidden = jax.nn.relu(norm(hk.Conv2D(4, 1, name="squeeze")(pooled)))
        attention = hk.Conv2D(self.channels * self.radix, 1, name="attend")(hidden)
        attention = attention.reshape(batch, 1, 1, self.radix, self.channels)
        return jnp.sum(jax.nn.softmax(attention, axis=3) * splits, axis=3)


def resnest(x: jax.Array, is_training: bool) -> jax.Array:
    norm = partial(batch_norm, is_training=is_training)
    x = jax.nn.relu(norm(hk.Conv2D(8, 3, with_bias=False, name="stem")(x)))
    y = jax.nn.relu(norm(hk.Conv2D(4, 1, with_bias=False, name="reduce")(x)))
    y = SplitAttention(6, radix=2, name="split_attention")(y, is_training)
    y = hk.avg_pool(y, window_shape=(1, 3, 3, 1), strides=(1, 2, 2, 1), padding="SAME")
    y = norm(hk.Conv2D(12, 1, with_bias=False, name="widen")(y))
    x = hk.avg_pool(x, window_shape=(2, 2, 1), strides=(2, 2, 1), padding="SAME")
    x = norm(hk.Conv2D(12, 1, with_bias=False, name="shortcut")(x))
    return hk.Linear(5, name="head")(jnp.mean(jax.nn.relu(x + y), axis=(1, 2)))


def densenet(x: jax.Array, is_training: bool) -> jax.Array:
    """Two dense blocks, each layer reading all earlier ones, and a transition between them."""
    norm = partial(batch_norm, is_training=is_training)

    def dense_block(x: jax.Array, name: str) -> jax.Array:
        for i in range(2):
            y = jax.nn.relu(norm(x))
            y = hk.Conv2D(8, 1, with_bias=False, name=f"{name}_{i}_bottleneck")(y)
            y = jax.nn.relu(norm(y))
            y = hk.Conv2D(4, 3, with_bias=False, name=f"{name}_{i}_grow")(y)
            x = jnp.concatenate([x, y], axis=-1)
        return x

    x = hk.Conv2D(6, 3, with_bias=False, name="stem")(x)
    x = dense_block(x, "block0")
    x = hk.Conv2D(7, 1, with_bias=False, name="transition")(jax.nn.relu(norm(x)))
    x = hk.avg_pool(x, window_shape=(2, 2, 1), strides=(2, 2, 1), padding="VALID")
    x = dense_block(x, "block1")
    return hk.Linear(5, name="head")(jnp.mean(jax.nn.relu(norm(x)), axis=(1, 2)))


def lstm(x: jax.Array) -> jax.Array:
    """A deep LSTM over time-major features, its layers joined by skips."""
    core = hk.DeepRNN([hk.LSTM(6), jnp.tanh, hk.LSTM(6)])
    outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.BatchApply(hk.Linear(3, name="head"))(outputs)


def gru(x: jax.Array) -> jax.Array:
    core = hk.GRU(6)
    _, state = hk.static_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.nets.MLP([8, 3], name="head")(state)


def transformer(ids: jax.Array) -> jax.Array:
    """A causal transformer over token ids, with an untied output layer."""

    def layer_norm(x: jax.Array) -> jax.Array:
        return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

    width, length = 8, ids.shape[1]
    position = hk.get_parameter(
        "pos_embedding", (1, length, width), init=hk.initializers.TruncatedNormal()
    )
    x = hk.Embed(11, width, name="embed")(ids) + position
    causal = jnp.tril(jnp.ones((1, 1, length, length)))
    mask = causal * (ids > 0)[:, None, None, :].astype(jnp.float32)
    for i in range(2):
        attention = hk.MultiHeadAttention(
            num_heads=2,
            key_size=4,
            model_size=width,
            w_init=hk.initializers.VarianceScaling(),
            name=f"attention{i}",
        )
        y = layer_norm(x)
        x = x + attention(y, y, y, mask=mask)
        y = hk.Linear(16, name=f"widen{i}")(layer_norm(x))
        x = x + hk.Linear(width, name=f"narrow{i}")(jax.nn.gelu(y))
    return hk.Linear(11, name="head")(layer_norm(x))


def layer_stack(x: jax.Array) -> jax.Array:
    """Layers stacked by `hk.layer_stack`, which scans over their parameters."""

    def residual(x: jax.Array) -> jax.Array:
        return x + hk.Linear(8, name="narrow")(jax.nn.relu(hk.Linear(12, name="widen")(x)))

    x = hk.Linear(8, name="stem")(x)
    x = hk.layer_stack(3, name="layers")(residual)(x)
    return hk.Linear(3, name="head")(x)


def audio(x: jax.Array) -> jax.Array:
    """One-dimensional convolutions over (batch, time, channels), one of them transposed."""
    y = jax.nn.leaky_relu(hk.Conv1D(6, 4, stride=2, name="down")(x))
    y = jax.nn.leaky_relu(hk.Conv1D(6, 3, rate=2, name="dilated")(y))
    y = hk.Conv1DTranspose(3, 4, stride=2, name="up")(y)
    return jnp.tanh(x + y)


CASES = (
    Case(
        "haiku/resnext",
        lambda: build(resnext, image(), batch_norm=True),
        expand("{stem,head}/w", "block{1,2}/{reduce,grouped,widen,shortcut}/w"),
        free=expand(
            "batch_norm/{scale,offset}",
            "block{1,2}/batch_norm{,_1,_2,_3}/{scale,offset}",
        ),
    ),
    Case(
        "haiku/resnest",
        lambda: build(resnest, image(), batch_norm=True),
        expand("{stem,reduce,widen,shortcut,head}/w", "split_attention/{splits,squeeze,attend}/w"),
        free=expand(
            "batch_norm{,_1,_2,_3}/{scale,offset}",
            "split_attention/batch_norm{,_1}/{scale,offset}",
        ),
    ),
    Case(
        "haiku/densenet",
        promoting(lambda: build(densenet, image(), batch_norm=True)),
        expand(
            "{stem,transition,head}/w",
            "block{0,1}_{0,1}_{bottleneck,grow}/w",
        ),
        free=expand("batch_norm{,_1,_2,_3,_4,_5,_6,_7,_8,_9}/{scale,offset}"),
    ),
    Case(
        "haiku/lstm",
        lambda: build(lstm, normal(5, 2, 4)),
        expand("{lstm,lstm_1}/linear/w", "head/w"),
    ),
    Case(
        "haiku/gru",
        lambda: build(gru, normal(4, 2, 4)),
        expand("gru/{w_i,w_h}", "head/~/linear_{0,1}/w"),
    ),
    Case(
        "haiku/transformer",
        lambda: build(transformer, tokens(2, 6)),
        expand("attention{0,1}/{query,key,value,linear}/w", "{widen,narrow}{0,1}/w", "head/w"),
        free=expand("~/pos_embedding", "embed/embeddings"),
    ),
    Case(
        "haiku/layer_stack",
        lambda: build(layer_stack, normal(2, 6)),
        expand("{stem,head}/w", "layers/{widen,narrow}/w"),
        free=expand("layers/{widen,narrow}/b"),
    ),
    Case(
        "haiku/audio",
        lambda: build(audio, normal(2, 8, 3)),
        expand("{down,dilated,up}/w"),
    ),
)
