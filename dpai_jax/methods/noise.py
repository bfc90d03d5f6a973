"""Normally distributed scores: of one key the same ones on any number of devices."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import random as extended
from jax.sharding import Sharding

from dpai_jax.methods.base import score_tree
from dpai_jax.paths import Network

PyTree = Any


def normal_scores(net: Network, key: Array, params: PyTree) -> PyTree:
    """Scores drawn from N(0, 1), layer by layer; 0 where nothing can be pruned.

    Args:
      net: the traced network.
      key: random key.
      params: its parameters; the scores of a layer are sharded as its kernel is.

    Returns:
      Pytree of float32 arrays, the same for any sharding.
    """
    shardings = layout(net, params)
    key = _threefry(key)
    if all(sharding is None for sharding in shardings):
        return score_tree(net, _normal(tuple(layer.shape for layer in net.layers), key))
    starts = itertools.accumulate((layer.size for layer in net.layers), initial=0)
    scores = []
    for layer, sharding, start in zip(net.layers, shardings, starts, strict=False):
        block = functools.partial(_block, jax.random.key_data(key), start, layer.shape)
        if sharding is None:
            scores.append(jnp.asarray(block((slice(None),) * len(layer.shape))))
        else:
            scores.append(jax.make_array_from_callback(layer.shape, sharding, block))
    return score_tree(net, scores)


def layout(net: Network, params: PyTree) -> tuple[Sharding | None, ...]:
    """How the layers' kernels lie on several devices; nothing for those that lie on one."""
    shardings = [getattr(leaf, "sharding", None) for leaf in net.leaves(params)]
    return tuple(
        s if isinstance(s, Sharding) and len(s.device_set) > 1 else None for s in shardings
    )


def _threefry(key: Array) -> Array:
    """A key of the generator whose numbers can be had one by one."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


@functools.partial(jax.jit, static_argnums=0)
def _normal(shapes: tuple[tuple[int, ...], ...], key: Array) -> list[Array]:
    # One draw for all layers: each draw of its own would take half a second to compile.
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    parts = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _block(
    key_data: Array, start: int, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """A part of a layer's numbers in `_normal`, where the layer's begin at `start`."""
    places = np.asarray(start, np.uint64)
    for axis, (size, part) in enumerate(zip(shape, index, strict=True)):
        along = np.arange(*part.indices(size), dtype=np.uint64) * math.prod(shape[axis + 1 :])
        places = places[..., None] + along
    counters = np.stack([places >> np.uint64(32), places & np.uint64(2**32 - 1)])
    return np.asarray(_normal_at(key_data, counters.astype(np.uint32)))


@jax.jit
def _normal_at(key_data: Array, counters: Array) -> Array:
    """What `jax.random.normal` draws at some places, by their two digits of 32 bits."""
    high, low = extended.threefry_2x32(key_data, counters.ravel()).reshape(2, -1)
    ones = jnp.float32(1).view(jnp.uint32)
    fraction = lax.bitcast_convert_type(((high ^ low) >> 9) | ones, jnp.float32) - 1
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(least, fraction * (np.float32(1) - least) + least)
    normal = np.float32(math.sqrt(2)) * lax.erf_inv(uniform)
    return normal.reshape(counters.shape[1:])
