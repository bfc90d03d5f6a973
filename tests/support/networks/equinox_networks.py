"""Networks in Equinox: modules for one example, `jax.vmap` over the batch."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.support.networks.case import Built, Case, draw, expand, normal, tokens


def build(make: Callable[[jax.Array], eqx.Module], x: Any) -> Built:
    """The vmapped model as a function of its floating arrays, the first half of `eqx.partition`."""
    model = draw(eqx.filter_eval_shape(make, jax.random.key(0)))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    return fn, params, x


class MixerBlock(eqx.Module):
    patch_mixer: eqx.nn.MLP
    hidden_mixer: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(self, patches: int, hidden: int, key: jax.Array):
        key1, key2 = jax.random.split(key)
        self.patch_mixer = eqx.nn.MLP(patches, patches, 6, depth=1, key=key1)
        self.hidden_mixer = eqx.nn.MLP(hidden, hidden, 12, depth=1, key=key2)
        self.norm1 = eqx.nn.LayerNorm((hidden, patches))
        self.norm2 = eqx.nn.LayerNorm((patches, hidden))

    def __call__(self, y: jax.Array) -> jax.Array:
        y = y + jax.vmap(self.patch_mixer)(self.norm1(y))
        y = y.T
        y = y + jax.vmap(self.hidden_mixer)(self.norm2(y))
        return y.T


class Mixer(eqx.Module):
    patches: eqx.nn.Conv2d
    blocks: list[MixerBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        first, last, *keys = jax.random.split(key, 4)
        self.patches = eqx.nn.Conv2d(3, 8, 4, stride=4, key=first)
        self.blocks = [MixerBlock(4, 8, key) for key in keys]
        self.norm = eqx.nn.LayerNorm((8, 4))
        self.head = eqx.nn.Linear(8, 5, key=last)

    def __call__(self, image: jax.Array) -> jax.Array:
        y = self.patches(image)
        channels, height, width = y.shape
        y = y.reshape(channels, height * width)
        for block in self.blocks:
            y = block(y)
        return self.head(jnp.mean(self.norm(y), axis=1))


class ResNet(eqx.Module):
    """Batch normalisation keeps its averages in an `eqx.nn.State`."""

    stem: eqx.nn.Conv2d
    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.BatchNorm
    pool: eqx.nn.AdaptiveAvgPool2d
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.stem = eqx.nn.Conv2d(3, 6, 3, stride=2, padding=1, key=keys[0])
        self.conv1 = eqx.nn.Conv2d(6, 6, 3, padding=1, use_bias=False, key=keys[1])
        self.norm1 = eqx.nn.BatchNorm(6, axis_name="batch", mode="ema")
        self.conv2 = eqx.nn.Conv2d(6, 6, 3, padding=1, use_bias=False, key=keys[2])
        self.norm2 = eqx.nn.BatchNorm(6, axis_name="batch", mode="ema")
        self.pool = eqx.nn.AdaptiveAvgPool2d(2)
        self.head = eqx.nn.Linear(24, 5, key=keys[3])

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x = jax.nn.relu(self.stem(x))
        y, state = self.norm1(self.conv1(x), state)
        y, state = self.norm2(self.conv2(jax.nn.relu(y)), state)
        return self.head(jnp.ravel(self.pool(jax.nn.relu(x + y)))), state


def resnet() -> Built:
    model, state = draw(eqx.filter_eval_shape(eqx.nn.make_with_state(ResNet), jax.random.key(0)))
    params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        model = eqx.combine(params, static)
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return batched(x, state)[0]

    return fn, params, normal(2, 3, 8, 8)


class EncoderBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(self, width: int, key: jax.Array):
        key1, key2 = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, width, use_query_bias=True, key=key1)
        self.mlp = eqx.nn.MLP(width, width, 2 * width, 1, activation=jax.nn.gelu, key=key2)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask=mask)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class Encoder(eqx.Module):
    embedding: eqx.nn.Embedding
    position: eqx.nn.Embedding
    blocks: list[EncoderBlock]
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.embedding = eqx.nn.Embedding(11, 8, key=keys[0])
        self.position = eqx.nn.Embedding(6, 8, key=keys[1])
        self.blocks = [EncoderBlock(8, key) for key in keys[2:4]]
        self.dropout = eqx.nn.Dropout(0.1, inference=True)
        self.head = eqx.nn.Linear(8, 3, key=keys[4])

    def __call__(self, ids: jax.Array) -> jax.Array:
        (length,) = ids.shape
        x = jax.vmap(self.embedding)(ids) + jax.vmap(self.position)(jnp.arange(length))
        mask = jnp.broadcast_to((ids > 0)[None, :], (length, length))
        for block in self.blocks:
            x = block(self.dropout(x), mask)
        return self.head(x[0])


class GRUClassifier(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        key1, key2 = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(4, 6, key=key1)
        self.head = eqx.nn.Linear(6, 3, key=key2)

    def __call__(self, x: jax.Array) -> jax.Array:
        def step(hidden: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return self.cell(x, hidden), None

        hidden, _ = jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), x)
        return self.head(hidden)


def volume(key: jax.Array) -> eqx.Module:
    """Three-dimensional convolutions, pooled, in a sequential model with `eqx.nn.Lambda`."""
    keys = jax.random.split(key, 4)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv3d(2, 4, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(eqx.nn.PReLU()),
            eqx.nn.MaxPool3d(2, 2),
            eqx.nn.Conv3d(4, 6, (1, 2, 3), padding="SAME", groups=2, key=keys[1]),
            eqx.nn.GroupNorm(3, 6),
            eqx.nn.Lambda(jax.nn.swish),
            eqx.nn.AvgPool3d((1, 2, 2), (1, 2, 2)),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(12, 5, 8, depth=2, activation=jnp.tanh, key=keys[2]),
        ]
    )


class RotaryBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    rope: eqx.nn.RotaryPositionalEmbedding
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norm1: eqx.nn.RMSNorm
    norm2: eqx.nn.RMSNorm

    def __init__(self, width: int, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.attention = eqx.nn.MultiheadAttention(2, width, key=keys[0])
        self.rope = eqx.nn.RotaryPositionalEmbedding(width // 2)
        self.gate = eqx.nn.Linear(width, 12, use_bias=False, key=keys[1])
        self.up = eqx.nn.Linear(width, 12, use_bias=False, key=keys[2])
        self.down = eqx.nn.Linear(12, width, use_bias=False, key=keys[3])
        self.norm1, self.norm2 = eqx.nn.RMSNorm(width), eqx.nn.RMSNorm(width)

    def rotate(
        self, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        rotate = jax.vmap(self.rope, in_axes=1, out_axes=1)
        return rotate(query), rotate(key), value

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.norm1)(x)
        mask = jnp.tril(jnp.ones((len(x), len(x)), dtype=bool))
        x = x + self.attention(y, y, y, mask=mask, process_heads=self.rotate)
        y = jax.vmap(self.norm2)(x)
        hidden = jax.nn.silu(jax.vmap(self.gate)(y)) * jax.vmap(self.up)(y)
        return x + jax.vmap(self.down)(hidden)


class TiedDecoder(eqx.Module):
    """The embedding and the output layer share one array by `eqx.nn.Shared`."""

    shared: eqx.nn.Shared
    block: RotaryBlock

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        embedding = eqx.nn.Embedding(11, 8, key=keys[0])
        linear = eqx.nn.Linear(8, 11, use_bias=False, key=keys[1])
        self.shared = eqx.nn.Shared(
            (embedding, linear), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight
        )
        self.block = RotaryBlock(8, keys[2])

    def __call__(self, ids: jax.Array) -> jax.Array:
        embedding, linear = self.shared()
        return jax.vmap(linear)(self.block(jax.vmap(embedding)(ids)))


class StackedMlp(eqx.Module):
    """Layers made by `eqx.filter_vmap` and run by `jax.lax.scan`."""

    stem: eqx.nn.Linear
    layers: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        key1, key2, key3 = jax.random.split(key, 3)
        self.stem = eqx.nn.Linear(4, 8, key=key1)
        make_layer = eqx.filter_vmap(lambda key: eqx.nn.MLP(8, 8, 12, depth=1, key=key))
        self.layers = make_layer(jax.random.split(key2, 3))
        self.head = eqx.nn.Linear(8, 3, key=key3)

    def __call__(self, x: jax.Array) -> jax.Array:
        dynamic, static = eqx.partition(self.layers, eqx.is_array)

        def step(x: jax.Array, dynamic: Any) -> tuple[jax.Array, None]:
            return x + eqx.combine(dynamic, static)(x), None

        x, _ = jax.lax.scan(step, self.stem(x), dynamic)
        return self.head(x)


PROJECTIONS = "{query_proj,key_proj,value_proj,output_proj}"

CASES = (
    Case(
        "equinox/mixer",
        lambda: build(Mixer, normal(2, 3, 8, 8)),
        expand(
            "{patches,head}/weight",
            "blocks/{0,1}/{patch_mixer,hidden_mixer}/layers/{0,1}/weight",
        ),
        free=expand(
            "patches/bias", "blocks/{0,1}/{norm1,norm2}/{weight,bias}", "norm/{weight,bias}"
        ),
    ),
    Case(
        "equinox/resnet",
        resnet,
        expand("{stem,conv1,conv2,head}/weight"),
        free=expand("stem/bias"),
    ),
    Case(
        "equinox/encoder",
        lambda: build(Encoder, tokens(2, 6)),
        expand(
            f"blocks/{{0,1}}/attention/{PROJECTIONS}/weight",
            "blocks/{0,1}/mlp/layers/{0,1}/weight",
            "head/weight",
        ),
        free=expand("{embedding,position}/weight"),
    ),
    Case(
        "equinox/gru",
        lambda: build(GRUClassifier, normal(2, 5, 4)),
        expand("cell/{weight_ih,weight_hh}", "head/weight"),
    ),
    Case(
        "equinox/volume",
        lambda: build(volume, normal(2, 2, 4, 4, 4)),
        expand("layers/{0,3}/weight", "layers/8/layers/{0,1,2}/weight"),
        free=expand("layers/{0,3}/bias"),
    ),
    Case(
        "equinox/tied_decoder",
        lambda: build(TiedDecoder, tokens(2, 5)),
        expand(
            "shared/pytree/0/weight",
            f"block/attention/{PROJECTIONS}/weight",
            "block/{gate,up,down}/weight",
        ),
    ),
    Case(
        "equinox/stacked_layers",
        lambda: build(StackedMlp, normal(2, 4)),
        expand("{stem,head}/weight", "layers/layers/{0,1}/weight"),
        free=expand("layers/layers/{0,1}/bias"),
    ),
)
