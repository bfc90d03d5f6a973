"""Layers and initial weights that several families of networks share."""

import functools

import flax.linen as nn

from experiments import cpu

Conv = functools.partial(nn.Conv, use_bias=False, conv_general_dilated=cpu.convolve)
"""A convolution that a norm follows, so without a bias."""

BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
"""Batch normalization with PyTorch's constants; its momentum of 0.1 is 0.9 in Flax's terms."""

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal of variance 2 / (taps · outputs): the backward case of He et al. 2015."""
