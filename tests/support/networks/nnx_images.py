"""Image networks in Flax NNX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.support.networks.case import Built, Case, draw, expand, image, normal


def build(make: Callable[[], nnx.Module], x: Any, as_state: bool = False) -> Built:
    """The split model as a function of its parameters.

    These are a plain nested dictionary, or the `nnx.State` itself, whose paths end in `value`.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    params, rest = nnx.split_state(state, nnx.Param, ...)
    params = draw(params if as_state else nnx.to_pure_dict(params))
    rest = draw(nnx.to_pure_dict(rest))  # arrays: variables belong to the trace that made them

    def fn(params: Any, x: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        return model(*x) if isinstance(x, tuple) else model(x)

    return fn, params, x


class PreActivationBlock(nnx.Module):
    def __init__(self, din: int, dout: int, strides: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.BatchNorm(din, use_running_average=True, rngs=rngs)
        self.conv1 = nnx.Conv(din, dout, (3, 3), strides=strides, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(dout, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(dout, dout, (3, 3), use_bias=False, rngs=rngs)
        self.shortcut = (
            nnx.Conv(din, dout, (1, 1), strides=strides, use_bias=False, rngs=rngs)
            if strides > 1 or din != dout
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = nnx.relu(self.norm2(self.conv1(y)))
        return x + self.conv2(y)


class PreActivationResNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.blocks = nnx.List(
            [PreActivationBlock(6, 6, 1, rngs=rngs), PreActivationBlock(6, 8, 2, rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


class SeparableConv(nnx.Module):
    def __init__(self, din: int, dout: int, strides: int, *, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(
            din, din, (3, 3), strides=strides, feature_group_count=din, use_bias=False, rngs=rngs
        )
        self.norm1 = nnx.BatchNorm(din, rngs=rngs)
        self.pointwise = nnx.Conv(din, dout, (1, 1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(dout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu6(self.norm1(self.depthwise(x)))
        return nnx.relu6(self.norm2(self.pointwise(x)))


class MobileNet(nnx.Module):
    """MobileNetV1, switched to evaluation by `model.eval()`."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.blocks = nnx.Sequential(
            SeparableConv(4, 8, 1, rngs=rngs), SeparableConv(8, 12, 2, rngs=rngs)
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.blocks(self.stem(x)).mean(axis=(1, 2))
        return self.head(self.dropout(x))


def evaluated_mobilenet() -> nnx.Module:
    model = MobileNet(rngs=nnx.Rngs(0))
    model.eval()
    return model


class FiLM(nnx.Module):
    """An image and a conditioning vector, which scales and shifts each block's channels."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.convs = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.GroupNorm(8, num_groups=2, rngs=rngs) for _ in range(2)])
        self.conditions = nnx.List([nnx.Linear(4, 16, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, image: jax.Array, vector: jax.Array) -> jax.Array:
        x = self.stem(image)
        for conv, norm, condition in zip(self.convs, self.norms, self.conditions, strict=True):
            scale, shift = jnp.split(condition(vector)[:, None, None, :], 2, axis=-1)
            x = x + nnx.silu(norm(conv(x)) * (1 + scale) + shift)
        return self.head(x.mean(axis=(1, 2)))


class Autoencoder(nnx.Module):
    """Two outputs: the reconstruction and the class scores of the code."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.encoder = nnx.Sequential(
            nnx.Conv(3, 6, (4, 4), strides=2, rngs=rngs),
            nnx.elu,
            nnx.Conv(6, 8, (4, 4), strides=2, rngs=rngs),
        )
        self.decoder = nnx.Sequential(
            nnx.ConvTranspose(8, 6, (4, 4), strides=2, rngs=rngs),
            nnx.elu,
            nnx.ConvTranspose(6, 3, (4, 4), strides=2, rngs=rngs),
        )
        self.classifier = nnx.Linear(2 * 2 * 8, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        code = self.encoder(x)
        logits = self.classifier(code.reshape(code.shape[0], -1))
        return {"image": nnx.sigmoid(self.decoder(code)), "logits": logits}


class ConvBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.norm = nnx.InstanceNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nnx.gelu(self.norm(self.conv(x)))


class RematNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 6, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.blocks = nnx.List([ConvBlock(6, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(x.mean(axis=(1, 2)))


CASES = (
    Case(
        "nnx/resnet_preactivation",
        lambda: build(lambda: PreActivationResNet(rngs=nnx.Rngs(0)), image()),
        expand(
            "{stem,head}/kernel", "blocks/{0,1}/{conv1,conv2}/kernel", "blocks/1/shortcut/kernel"
        ),
    ),
    Case(
        "nnx/mobilenet",
        lambda: build(evaluated_mobilenet, image(), as_state=True),
        expand(
            "{stem,head}/kernel/value", "blocks/layers/{0,1}/{depthwise,pointwise}/kernel/value"
        ),
    ),
    Case(
        "nnx/film",
        lambda: build(lambda: FiLM(rngs=nnx.Rngs(0)), (image(), normal(2, 4, seed=2))),
        expand("{stem,head}/kernel", "{convs,conditions}/{0,1}/kernel"),
    ),
    Case(
        "nnx/autoencoder",
        lambda: build(lambda: Autoencoder(rngs=nnx.Rngs(0)), image()),
        expand("{encoder,decoder}/layers/{0,2}/kernel", "classifier/kernel"),
    ),
    Case(
        "nnx/remat",
        lambda: build(lambda: RematNet(rngs=nnx.Rngs(0)), image()),
        expand("{stem,head}/kernel", "blocks/{0,1}/conv/kernel"),
    ),
)
