"""Normally distributed scores, the same on any number of devices."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.random import threefry2x32_p
from jax.sharding import Sharding

from dpai_jax.paths import Network
from dpai_jax.tools.meshes import auto_sharded, program, shardings_of
from dpai_jax.tools.sums import written_out

PyTree = Any


def normal_scores(net: Network, key: Array, params: PyTree) -> list[Array]:
    """Scores drawn from N(0, 1), layer by layer.

    Args:
      net: the traced network.
      key: random key.
      params: its parameters; the scores of a layer are sharded as its kernel is.

    Returns:
      A float32 array for each layer, the same for any sharding.
    """
    shardings = shardings_of(net.leaves(params))
    key = _threefry(key)
    if all(sharding is None for sharding in shardings):
        return list(_normal(net, key))
    # Any process and any mesh accepts NumPy arrays.
    key_data = np.asarray(jax.random.key_data(key))
    starts = itertools.accumulate((layer.size for layer in net.layers), initial=0)
    return [
        _drawing(layer.shape, sharding)(key_data, _digits(np.asarray(start, np.uint64)))
        for layer, sharding, start in zip(net.layers, shardings, starts, strict=False)
    ]


def _threefry(key: Array) -> Array:
    """A Threefry key made from a key; with Threefry, any entry can be drawn by itself."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


def compile_ahead(net: Network, key: Array, params: PyTree) -> None:
    """Starts to compile what `normal_scores` runs on one device."""
    if not any(shardings_of(net.leaves(params))):
        _normal.ahead(net, _threefry(key))


def normal_scores_of_many(net: Network, keys: Sequence[Array]) -> list[Array]:
    """What `normal_scores` draws for each of several keys, stacked; on one device."""
    return list(_normal_of_many(net, jnp.stack([_threefry(key) for key in keys])))


@program()
def _normal_of_many(net: Network, keys: Array) -> list[Array]:
    return jax.vmap(functools.partial(_normal.fn, net))(keys)


@program()
def _normal(net: Network, key: Array) -> list[Array]:
    # One draw for all layers, as each draw takes half a second to compile. The partitionable
    # layout, whatever the user's configuration, gives the bits that a mesh draws.
    ends = list(itertools.accumulate(layer.size for layer in net.layers))
    with jax.threefry_partitionable(True):
        noise = jax.random.normal(key, (ends[-1],), jnp.float32)
    parts = jnp.split(written_out(noise), ends[:-1])
    return [x.reshape(layer.shape) for x, layer in zip(parts, net.layers, strict=True)]


@functools.lru_cache
def _drawing(shape: tuple[int, ...], sharding: Sharding | None) -> Callable[..., Array]:
    """Draws a stretch of what `jax.random.normal` draws; each device draws its own part."""
    draw = functools.partial(_normal_at, shape)
    return jax.jit(functools.partial(auto_sharded, draw, like=sharding), out_shardings=sharding)


def _normal_at(shape: tuple[int, ...], key_data: Array, start: Array) -> Array:
    places = start[0], start[1]
    for axis, size in enumerate(shape):
        steps = np.arange(size, dtype=np.uint64) * np.uint64(math.prod(shape[axis + 1 :]))
        high, low = _digits(steps.reshape([-1 if i == axis else 1 for i in range(len(shape))]))
        sum_low = places[1] + low
        places = places[0] + high + (sum_low < low).astype(jnp.uint32), sum_low
    bits = functools.reduce(jnp.bitwise_xor, threefry2x32_p.bind(*key_data, *places))
    ones = jnp.float32(1).view(jnp.uint32)
    fraction = lax.bitcast_convert_type((bits >> 9) | ones, jnp.float32) - 1
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(least, fraction * (np.float32(1) - least) + least)
    return np.float32(math.sqrt(2)) * lax.erf_inv(uniform)


def _digits(places: np.ndarray) -> np.ndarray:
    """Indices as two digits of 32 bits, the higher digit first."""
    return np.stack([places >> np.uint64(32), places & np.uint64(2**32 - 1)]).astype(np.uint32)
