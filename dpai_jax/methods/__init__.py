"""Pruning methods, one file each."""

from dpai_jax.methods.dpai import DPaI, ascent
from dpai_jax.methods.random import Random

__all__ = ["DPaI", "Random", "ascent"]
