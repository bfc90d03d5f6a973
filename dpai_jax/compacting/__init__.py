"""Smaller networks: dead channels cut out of the parameters and out of the function."""

from dpai_jax.compacting.networks import Compact, compact

__all__ = ["Compact", "compact"]
