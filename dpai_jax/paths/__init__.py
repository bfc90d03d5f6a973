"""Counting paths: a transformation of network functions, like `jax.grad`.

This package knows nothing of pruning. It evaluates the jaxpr of a function with masks in place of
kernels and ones in place of the input, and replaces every primitive by what it does to the number
of paths. The result is an ordinary JAX function of the masks.
"""

from dpai_jax.paths.counting import EXACT, MEAN_FIELD, REACH, Counting
from dpai_jax.paths.interpreter import Interpreter, register_rule
from dpai_jax.paths.kernels import KernelUse
from dpai_jax.paths.network import Layer, Network, trace
from dpai_jax.paths.values import Flow, Independent, Spread, Weight

__all__ = [
    "EXACT",
    "MEAN_FIELD",
    "REACH",
    "Counting",
    "Flow",
    "Independent",
    "Interpreter",
    "KernelUse",
    "Layer",
    "Network",
    "Spread",
    "Weight",
    "register_rule",
    "trace",
]
