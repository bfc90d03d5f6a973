"""What a kernel is multiplied by: gains along its features, and a power of two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dpai_jax as dpai
from dpai_jax.methods.balance import Objective
from dpai_jax.paths.counting import COUNTINGS

EVEN = Objective("even", "exact", normalize=False, sharp=True)


def dense(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def heads(p, x):
    """One kernel cut into three, whose features are seen as heads."""
    q, k, v = jnp.split(x @ p["qkv"], 3, -1)
    kernel = p["out"].reshape(4, 2, 5).transpose(1, 0, 2).reshape(8, 5)
    return (q + k * 2 + v) @ kernel


def cut(p, x):
    """Kernels cut out of one, turned round, padded, put together and picked from."""
    a = lax.rev(p["a"], (0,))[:, :6] * 0.5
    b = lax.concatenate([a.T, lax.pad(p["b"], 0.0, ((0, 0, 0), (1, 2, 0)))], 0)
    c = lax.dynamic_slice(b, (1, 0), (8, 6))
    return jax.nn.relu(x[:, :6] @ c.T[:, ::-1]) @ b[:8][jnp.asarray([3, 1, 0, 2, 7, 6, 5, 4])]


def convolved(p, x):
    how = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    x = jax.nn.relu(lax.conv_general_dilated(x, p["a"], (1, 1), **how))
    x = jax.nn.relu(lax.conv_general_dilated(x, p["b"], (2, 2), feature_group_count=2, **how))
    x = lax.conv_general_dilated(x, jnp.transpose(p["c"], (2, 3, 1, 0)), (1, 1), **how)
    return x.mean((1, 2))


def tied(p, tokens):
    """A table that embeds tokens and is the kernel of the output, too."""
    x = p["table"][tokens]
    return (x + jax.nn.gelu(x @ p["a"])) @ p["table"].T


def looped(p, x):
    """Kernels of several layers in one, and one that each of them uses."""

    def body(x, kernel):
        return jax.nn.relu(x @ kernel) @ p["shared"], None

    return lax.scan(body, x, p["stacked"])[0]


def summed(p, x):
    """A kernel that is the sum of two, within a function compiled by itself."""
    kernel = jax.jit(lambda a, b: (a + b).astype(jnp.bfloat16))(p["a"], p["b"])
    return jax.checkpoint(lambda x: x.astype(jnp.bfloat16) @ kernel)(x)


CASES = {
    "dense": (dense, {"a": (4, 6), "b": (6, 3)}, (2, 4)),
    "heads": (heads, {"qkv": (3, 24), "out": (8, 5)}, (2, 3)),
    "cut": (cut, {"a": (6, 8), "b": (5, 3)}, (2, 7)),
    "convolved": (
        convolved,
        {"a": (3, 3, 2, 4), "b": (3, 3, 2, 6), "c": (5, 6, 3, 2)},
        (1, 5, 5, 2),
    ),
    "tied": (tied, {"table": (7, 4), "a": (4, 4)}, (1, 3)),
    "looped": (looped, {"stacked": (3, 4, 6), "shared": (6, 4)}, (2, 4)),
    "summed": (summed, {"a": (4, 5), "b": (4, 5)}, (2, 4)),
}


@pytest.fixture(params=CASES)
def case(request):
    fn, shapes, shape = CASES[request.param]
    params = {name: jnp.ones(size) for name, size in shapes.items()}
    is_text = request.param == "tied"
    net = dpai.trace(fn, params, jnp.ones(shape, jnp.int32 if is_text else jnp.float32))
    rng = np.random.default_rng(0)
    masks = [jnp.asarray(rng.uniform(0.2, 1.0, x.shape), jnp.float32) for x in net.layers]
    return net, masks


@pytest.mark.parametrize("counting", COUNTINGS)
def test_derivatives_by_gains_are_the_shares_of_features(case, counting):
    net, masks = case
    how = COUNTINGS[counting]

    def count(masks, gains):
        return net.log_count(masks, how, gains=gains)

    gains = [tuple(map(jnp.ones, EVEN.shares(layer))) for layer in net.layers]
    value, (gradients, shares) = jax.jit(jax.value_and_grad(count, (0, 1)))(masks, gains)
    expected, plain = jax.value_and_grad(lambda m: net.log_count(m, how))(masks)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for layer, mask, gradient, without, own in zip(
        net.layers, masks, gradients, plain, shares, strict=True
    ):
        np.testing.assert_allclose(gradient, without, rtol=1e-5)
        assert len(own) == (2 if layer.groups == 1 and layer.outputs else 1)
        products = np.asarray(mask, np.float64) * np.asarray(gradient, np.float64)
        for share, summed_over in zip(own, (layer.inputs, layer.outputs), strict=False):
            sums = products.sum((*summed_over, *layer.taps), keepdims=True)
            np.testing.assert_allclose(share, sums, rtol=1e-4)


@pytest.mark.parametrize("counting", COUNTINGS)
def test_a_power_of_two_multiplies_all_of_a_kernel(case, counting):
    net, masks = case
    how = COUNTINGS[counting]
    powers = [3, -2, 5][: len(masks)]
    exponents = [jnp.int32(n) for n in powers]
    found, gradients = jax.value_and_grad(lambda m: net.log_count(m, how, exponents=exponents))(
        masks
    )
    scaled = [m * 2.0**n for m, n in zip(masks, powers, strict=True)]
    expected, of_scaled = jax.value_and_grad(lambda m: net.log_count(m, how))(scaled)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for gradient, other, n in zip(gradients, of_scaled, powers, strict=True):
        np.testing.assert_allclose(gradient, np.asarray(other) * 2.0**n, rtol=1e-5)
