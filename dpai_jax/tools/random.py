"""Random numbers on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def numpy_generator(key: Array) -> np.random.Generator:
    """A NumPy generator seeded by a random key."""
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
