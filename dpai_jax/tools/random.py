"""Random numbers on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def numpy_generator(key: Array) -> np.random.Generator:
    """NumPy's generator for a random key, for what is drawn on the host."""
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
