"""Layers and initial weights that several families of networks share."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax


def convolve(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Returns `lax.conv_general_dilated` of the same arguments, its input written out on CPUs.

    The kernel's gradient reads the input transposed. XLA on CPUs would fuse that with all that
    leads to the input, and so work out the norms and the residual sums of a whole stage once more
    for each layer, in a slow order. A barrier keeps them apart, in programs that are compiled with
    `experiments.steps.compiler_options()`. Convolutions elsewhere may gain by such a fusion.
    """
    if jax.default_backend() == "cpu":
        x = lax.optimization_barrier(x)
    return lax.conv_general_dilated(x, kernel, *args, **kwargs)


Conv = functools.partial(nn.Conv, use_bias=False, conv_general_dilated=convolve)
"""A convolution that a norm follows, so without a bias."""

BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
"""Batch normalization with PyTorch's constants; its momentum of 0.1 is 0.9 in Flax's terms."""

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal of variance 2 / (taps · outputs): the backward case of He et al. 2015."""
