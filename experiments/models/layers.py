"""Layers and initial weights that several families of networks share."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from experiments import cpu

Conv = functools.partial(nn.Conv, use_bias=False, conv_general_dilated=cpu.convolve)
"""A convolution that a norm follows, so without a bias."""

BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
"""Batch normalization with PyTorch's constants; its momentum of 0.1 is 0.9 in Flax's terms."""

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal of variance 2 / (taps · outputs): the backward case of He et al. 2015."""


def excited(
    x: jax.Array,
    squeezed: int,
    conv: Callable[..., nn.Module],
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Gates channels by their means over the image (squeeze-and-excitation); within `nn.compact`.

    Args:
        x: Features (batch, height, width, channels).
        squeezed: Features of the hidden layer between the means and the gates.
        conv: Makes its two 1x1 convolutions, "squeeze" and "excite".
        activation: Of the hidden layer.

    Returns:
        `x` times the gates, which lie in (0, 1).

    References:
        Hu et al., Squeeze-and-Excitation Networks, CVPR 2018.
    """
    gate = x.mean((1, 2), keepdims=True)
    gate = activation(conv(squeezed, (1, 1), use_bias=True, name="squeeze")(gate))
    return x * nn.sigmoid(conv(x.shape[-1], (1, 1), use_bias=True, name="excite")(gate))
