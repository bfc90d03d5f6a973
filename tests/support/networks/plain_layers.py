"""Convolutions, pooling and dense layers in plain `jax.numpy` and `jax.lax`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.support.networks.case import Built, Case, expand, normal, parameters

Params = dict[str, jax.Array]


def mlp() -> Built:
    """A list of (weights, biases), the function written for one example and vmapped."""
    sizes = (6, 8, 8, 3)
    drawn = [parameters(w=(n, m), b=(n,)) for m, n in pairwise(sizes)]
    params = [(layer["w"], layer["b"]) for layer in drawn]

    def predict(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            x = jnp.maximum(jnp.dot(w, x) + b, 0.0)
        w, b = params[-1]
        logits = jnp.dot(w, x) + b
        return logits - jax.scipy.special.logsumexp(logits)

    return jax.vmap(predict, in_axes=(None, 0)), params, normal(2, 6)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Any = "SAME") -> jax.Array:
    """A two-dimensional convolution, NHWC and HWIO."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)


def uneven_convolutions() -> Built:
    """Even kernels, asymmetric padding, strides, dilations and four dimension orders."""
    params = parameters(
        even=(2, 4, 3, 6),
        cropped=(6, 6, 3, 3),
        dilated=(3, 2, 6, 6),
        flipped=(5, 3, 2, 6),
        upsampled=(3, 3, 5, 4),
    )

    def fn(params: Params, x: jax.Array) -> jax.Array:
        x = jnp.tanh(
            lax.conv_general_dilated(
                x,
                params["even"],
                (1, 2),
                ((0, 1), (3, 2)),
                dimension_numbers=("NHWC", "HWIO", "NCHW"),
            )
        )
        x = jnp.tanh(lax.conv(x, params["cropped"], (1, 1), "SAME"))
        x = jnp.tanh(
            lax.conv_general_dilated(
                x,
                params["dilated"],
                (2, 1),
                ((-1, 2), (1, 0)),
                rhs_dilation=(2, 3),
                dimension_numbers=("NCHW", "HWOI", "CNHW"),
            )
        )
        x = jnp.tanh(
            lax.conv_general_dilated(
                x,
                jnp.flip(params["flipped"], axis=(1, 2)),
                (1, 1),
                ((1, 1), (0, 1)),
                dimension_numbers=("CNHW", "OHWI", "HWNC"),
            )
        )
        return lax.conv_general_dilated(
            x,
            params["upsampled"],
            (2, 1),
            ((1, 3), (2, 1)),
            lhs_dilation=(3, 2),
            dimension_numbers=("HWNC", "HWIO", "NHWC"),
        )

    return fn, params, normal(2, 8, 8, 3)


def wavenet() -> Built:
    """One-dimensional causal convolutions, gated, with residual and skip connections.

    The output reads the skips and the last residual sum.
    """
    dilations = (1, 2, 4)
    params: dict[str, Any] = {
        "layers": [
            parameters(filter=(2, 6, 6), gate=(2, 6, 6), residual=(6, 6), skip=(6, 5))
            for _ in dilations
        ],
        **parameters(stem=(2, 3, 6), last=(6, 5), out=(5, 4)),
    }

    def causal(x: jax.Array, kernel: jax.Array, dilation: int = 1) -> jax.Array:
        padding = ((dilation * (kernel.shape[0] - 1), 0),)
        return lax.conv_general_dilated(
            x,
            kernel,
            (1,),
            padding,
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        x = causal(x, params["stem"])
        skips: list[jax.Array] = []
        for layer, dilation in zip(params["layers"], dilations, strict=True):
            gate = jax.nn.sigmoid(causal(x, layer["gate"], dilation))
            y = jnp.tanh(causal(x, layer["filter"], dilation)) * gate
            skips.append(y @ layer["skip"])
            x = x + y @ layer["residual"]
        return jax.nn.relu(sum(skips, x @ params["last"])) @ params["out"]

    return fn, params, normal(2, 9, 3)


def window_mean(x: jax.Array, window: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """Average pooling that divides by the number of positions inside the map."""
    total = lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME")
    count = lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, window, strides, "SAME")
    return total / count


def pooling() -> Built:
    """Average pooling SAME, max pooling, global max pooling and a log-softmax output."""
    params = parameters(conv1=(3, 3, 3, 6), conv2=(3, 3, 6, 8), head=(8, 5), head_bias=(5,))

    def fn(params: Params, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(conv(x, params["conv1"]))
        x = window_mean(x, (1, 3, 3, 1), (1, 2, 2, 1))
        x = jax.nn.relu(conv(x, params["conv2"]))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
        logits = jnp.max(x, axis=(1, 2)) @ params["head"] + params["head_bias"][None, :]
        return jax.nn.log_softmax(logits)

    return fn, params, normal(2, 7, 7, 3)


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    n, h, w, c = x.shape
    x = x.reshape(n, h // block, block, w // block, block, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // block, w // block, block * block * c)


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, block, block, c // block**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h * block, w * block, c // block**2)


def super_resolution() -> Built:
    """A space-to-depth stem and a pixel-shuffle output, added to the resized input."""
    params = parameters(stem=(3, 3, 12, 8), body=(3, 3, 8, 8), head=(3, 3, 8, 48))

    def fn(params: Params, x: jax.Array) -> jax.Array:
        y = jax.nn.leaky_relu(conv(space_to_depth(x, 2), params["stem"]))
        y = y + jax.nn.leaky_relu(conv(y, params["body"]))
        y = depth_to_space(conv(y, params["head"]), 4)
        n, h, w, c = x.shape
        return y + jax.image.resize(x, (n, 2 * h, 2 * w, c), "nearest")

    return fn, params, normal(2, 6, 6, 3)


def generator() -> Built:
    """A latent vector through a dense layer and transposed convolutions of both conventions."""
    params = parameters(project=(6, 72), up1=(4, 4, 8, 6), up2=(3, 3, 3, 6))

    def fn(params: Params, z: jax.Array) -> jax.Array:
        x = jax.nn.relu(z @ params["project"]).reshape(-1, 3, 3, 8)
        x = jax.nn.relu(lax.conv_transpose(x, params["up1"], (2, 2), "SAME"))
        x = lax.conv_transpose(x, params["up2"], (2, 2), "VALID", transpose_kernel=True)
        return jnp.tanh(x)

    return fn, params, normal(2, 6)


def standardized_convolutions() -> Built:
    """Scaled weight standardisation with a gain, as in normaliser-free residual networks."""
    params = parameters(
        stem=(3, 3, 3, 6), stem_gain=(6,), conv=(3, 3, 6, 6), conv_gain=(6,), head=(6, 4)
    )

    def standardize(kernel: jax.Array, gain: jax.Array) -> jax.Array:
        fan_in = np.prod(kernel.shape[:-1]).item()
        mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        variance = jnp.var(kernel, axis=(0, 1, 2), keepdims=True)
        scale = lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4)) * gain[None, None, None, :]
        return kernel * scale - mean * scale

    def fn(params: Params, x: jax.Array) -> jax.Array:
        x = conv(x, standardize(params["stem"], params["stem_gain"]))
        y = conv(jax.nn.gelu(x) * 1.7, standardize(params["conv"], params["conv_gain"]))
        return jnp.mean(x + 0.2 * y, axis=(1, 2)) @ params["head"]

    return fn, params, normal(2, 6, 6, 3)


def convolution_ensemble() -> Built:
    """Members of an ensemble, each its own kernels, by `jax.vmap` over the parameters."""
    params = parameters(conv1=(3, 3, 3, 2, 4), conv2=(3, 3, 3, 4, 4), head=(3, 4, 5))

    def member(params: Params, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(conv(x, params["conv1"], stride=2))
        x = jax.nn.relu(conv(x, params["conv2"], padding="VALID"))
        return jnp.mean(x, axis=(1, 2)) @ params["head"]

    def fn(params: Params, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(member, in_axes=(0, None))(params, x), axis=0)

    return fn, params, normal(2, 8, 8, 2)


CASES = (
    Case("plain/mlp", mlp, expand("{0,1,2}/0")),
    Case(
        "plain/uneven_convolutions",
        uneven_convolutions,
        expand("{even,cropped,dilated,flipped,upsampled}"),
    ),
    Case(
        "plain/wavenet",
        wavenet,
        expand("{stem,last,out}", "layers/{0,1,2}/{filter,gate,residual,skip}"),
    ),
    Case("plain/pooling", pooling, expand("{conv1,conv2,head}")),
    Case("plain/super_resolution", super_resolution, expand("{stem,body,head}")),
    Case("plain/generator", generator, expand("{project,up1,up2}")),
    Case("plain/standardized_convolutions", standardized_convolutions, expand("{stem,conv,head}")),
    Case("plain/convolution_ensemble", convolution_ensemble, expand("{conv1,conv2,head}")),
)
