"""Image networks in Flax Linen."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.support.networks.case import Built, Case, draw, expand, image, normal, promoting

ModuleDef = Any


def build(module: nn.Module, x: Any, whole: bool = False, **kwargs: Any) -> Built:
    """`module.apply` as a function of the parameters, or of the `whole` variable dictionary."""
    arguments = x if isinstance(x, tuple) else (x,)
    init = partial(module.init, **kwargs)
    variables = draw(jax.eval_shape(init, jax.random.key(0), *arguments))
    if whole:
        return (lambda variables, x: module.apply(variables, x, **kwargs)), variables, x
    params = variables["params"]
    state = {name: tree for name, tree in variables.items() if name != "params"}

    def fn(params: Any, x: Any) -> Any:
        inputs = x if isinstance(x, tuple) else (x,)
        return module.apply({"params": params, **state}, *inputs, **kwargs)

    return fn, params, x


class BasicBlock(nn.Module):
    filters: int
    strides: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.filters, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = self.conv(self.filters, (1, 1), self.strides, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    filters: int
    strides: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.filters, (1, 1), self.strides, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Float32 parameters, computation in `dtype`."""

    block: ModuleDef
    filters: int = 4
    classes: int = 5
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, dtype=self.dtype)
        x = conv(self.filters, (3, 3), name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        for stage, strides in enumerate((1, 2)):
            x = self.block(self.filters * 2**stage, strides, conv, norm)(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=jnp.float32)(x)


def resnet_training() -> Built:
    """The network as a training step sees it: batch statistics, updated, and a dropout mask."""
    module = ResNet(BasicBlock, dropout=0.25)
    x = normal(2, 8, 8, 3)
    variables = draw(jax.eval_shape(partial(module.init, train=False), jax.random.key(0), x))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        logits, _ = module.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            x,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return logits

    return fn, variables["params"], x


class SqueezeExcite(nn.Module):
    reduced: int
    act: Callable[[jax.Array], jax.Array]
    gate: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = self.act(nn.Conv(self.reduced, (1, 1), name="reduce")(y))
        return x * self.gate(nn.Conv(x.shape[-1], (1, 1), name="expand")(y))


class InvertedResidual(nn.Module):
    """MobileNetV2/V3's block and EfficientNet's MBConv: they differ in the activations."""

    filters: int
    strides: int
    kernel: int
    expansion: int
    act: Callable[[jax.Array], jax.Array]
    gate: Callable[[jax.Array], jax.Array]
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x.shape[-1] * self.expansion
        y = nn.Conv(hidden, (1, 1), use_bias=False, name="expand")(x)
        y = self.act(self.norm()(y))
        y = nn.Conv(
            hidden,
            (self.kernel, self.kernel),
            self.strides,
            feature_group_count=hidden,
            use_bias=False,
            name="depthwise",
        )(y)
        y = self.act(self.norm()(y))
        y = SqueezeExcite(hidden // 4, self.act, self.gate)(y)
        y = self.norm()(nn.Conv(self.filters, (1, 1), use_bias=False, name="project")(y))
        return x + y if self.strides == 1 and x.shape == y.shape else y


class MobileNet(nn.Module):
    act: Callable[[jax.Array], jax.Array]
    gate: Callable[[jax.Array], jax.Array]
    kernel: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        block = partial(
            InvertedResidual, kernel=self.kernel, act=self.act, gate=self.gate, norm=norm
        )
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
        x = self.act(norm()(x))
        x = block(4, strides=1, expansion=2)(x)
        x = block(6, strides=2, expansion=3)(x)
        x = self.act(norm()(nn.Conv(12, (1, 1), use_bias=False)(x)))
        return nn.Dense(5)(x.mean(axis=(1, 2)))


class ConvNeXtBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        y = nn.Conv(dim, (7, 7), feature_group_count=dim)(x)
        y = nn.LayerNorm(epsilon=1e-6)(y)
        y = nn.gelu(nn.Dense(4 * dim)(y))
        y = nn.Dense(dim)(y)
        return x + self.param("layer_scale", nn.initializers.constant(1e-6), (1, 1, 1, dim)) * y


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm()(nn.Conv(4, (2, 2), strides=(2, 2), name="patchify")(x))
        x = ConvNeXtBlock()(x)
        x = nn.Conv(8, (2, 2), strides=(2, 2), name="downsample")(nn.LayerNorm()(x))
        x = ConvNeXtBlock()(x)
        return nn.Dense(5, name="head")(nn.LayerNorm()(x.mean(axis=(1, 2))))


class ConvBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.Conv(self.features, (3, 3))(x))
        return x


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        skips = []
        for features in (4, 8):
            x = ConvBlock(features)(x)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = ConvBlock(16)(x)
        for features in (8, 4):
            x = nn.ConvTranspose(features, (2, 2), strides=(2, 2))(x)
            x = ConvBlock(features)(jnp.concatenate([x, skips.pop()], axis=-1))
        return nn.Conv(3, (1, 1))(x)


class StdConv(nn.Conv):
    """A convolution whose kernel is standardised over all but its output features."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            value = value - jnp.mean(value, axis=(0, 1, 2), keepdims=True)
            value = value / (jnp.std(value, axis=(0, 1, 2), keepdims=True) + 1e-5)
        return value


class GroupNormResNet(nn.Module):
    """A pre-activation residual network without batch statistics, as used for transfer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = StdConv(8, (3, 3), use_bias=False, name="stem")(x)
        for filters, strides in ((8, (1, 1)), (12, (2, 2))):
            y = nn.relu(nn.GroupNorm(num_groups=4)(x))
            if x.shape[-1] != filters:
                x = StdConv(filters, (1, 1), strides, use_bias=False, name="shortcut")(y)
            y = StdConv(filters, (3, 3), strides, use_bias=False)(y)
            y = nn.relu(nn.GroupNorm(num_groups=4)(y))
            x = x + StdConv(filters, (3, 3), use_bias=False)(y)
        x = nn.relu(nn.GroupNorm(num_groups=4)(x))
        return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


BASIC_LAYERS = expand(
    "{stem,Dense_0,BasicBlock_0/Conv_0,BasicBlock_0/Conv_1}/kernel",
    "BasicBlock_1/{Conv_0,Conv_1,shortcut}/kernel",
)
MOBILENET_LAYERS = expand(
    "{Conv_0,Conv_1,Dense_0}/kernel",
    "InvertedResidual_{0,1}/{expand,depthwise,project}/kernel",
    "InvertedResidual_{0,1}/SqueezeExcite_0/{reduce,expand}/kernel",
)

CASES = (
    Case(
        "linen/resnet_basic",
        lambda: build(ResNet(BasicBlock), image(), train=False),
        BASIC_LAYERS,
    ),
    Case(
        "linen/resnet_bottleneck",
        promoting(
            lambda: build(
                ResNet(BottleneckBlock, dtype=jnp.bfloat16), image(), whole=True, train=False
            )
        ),
        expand(
            "params/{stem,Dense_0}/kernel",
            "params/BottleneckBlock_{0,1}/{Conv_0,Conv_1,Conv_2,shortcut}/kernel",
        ),
    ),
    Case("linen/resnet_training", resnet_training, BASIC_LAYERS),
    Case(
        "linen/mobilenet_v3",
        lambda: build(MobileNet(nn.hard_swish, nn.hard_sigmoid), image(), train=False),
        MOBILENET_LAYERS,
    ),
    Case(
        "linen/efficientnet",
        lambda: build(MobileNet(nn.silu, nn.sigmoid, kernel=5), image(), train=False),
        MOBILENET_LAYERS,
    ),
    Case(
        "linen/convnext",
        lambda: build(ConvNeXt(), image()),
        expand(
            "{patchify,downsample,head}/kernel",
            "ConvNeXtBlock_{0,1}/{Conv_0,Dense_0,Dense_1}/kernel",
        ),
        free=expand("ConvNeXtBlock_{0,1}/layer_scale"),
    ),
    Case(
        "linen/unet",
        lambda: build(UNet(), image()),
        expand(
            "{Conv_0,ConvTranspose_0,ConvTranspose_1}/kernel",
            "ConvBlock_{0,1,2,3,4}/{Conv_0,Conv_1}/kernel",
        ),
    ),
    Case(
        "linen/weight_standardized",
        lambda: build(GroupNormResNet(), image()),
        expand("{stem,head,shortcut,StdConv_0,StdConv_1,StdConv_2,StdConv_3}/kernel"),
    ),
)
