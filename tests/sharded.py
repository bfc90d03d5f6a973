"""Small networks, meshes of eight devices, and how parameters lie on them."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any


def mlp(params: PyTree, x: jax.Array) -> jax.Array:
    x = nn.relu(x @ params["1"])
    x = nn.relu(x @ params["2"])
    return x @ params["3"]


class Residual(nn.Module):
    """Convolutions of 3x3 taps beside a shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        y = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv1")(x))
        y = nn.Conv(16, (3, 3), name="conv2")(y)
        x = nn.relu(nn.Conv(16, (1, 1), strides=2, name="shortcut")(x) + y)
        return nn.Dense(8, name="head")(x.mean((1, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        queries, keys, values = jnp.split(nn.Dense(48)(nn.LayerNorm()(x)), 3, -1)
        attention = nn.softmax(queries @ keys.mT)
        x = x + nn.Dense(16)(attention @ values)
        y = nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))
        return x + nn.Dense(16)(y), None


class Transformer(nn.Module):
    """Eight blocks whose kernels are stacked by `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)
        x, _ = blocks(name="blocks")(nn.Dense(16, name="stem")(x), None)
        return nn.Dense(8, name="head")(x.mean(1))


@functools.cache
def network(name: str) -> tuple[Callable[..., jax.Array], PyTree, jax.ShapeDtypeStruct]:
    """A network function, parameters as NumPy's arrays, and the shape of an input."""
    if name == "mlp":
        x = jax.ShapeDtypeStruct((1, 16), jnp.float32)
        fn: Any = mlp
        shapes: Any = {"1": (16, 32), "2": (32, 64), "3": (64, 8)}
        shapes = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
    else:
        module = {"residual": Residual, "transformer": Transformer}[name]()
        x = jax.ShapeDtypeStruct((1, 8, 8, 3) if name == "residual" else (1, 8, 8), jnp.float32)
        fn = module.apply
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return fn, jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes), x


MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


def mesh(name: str, kind: AxisType) -> Mesh:
    """A mesh of eight devices whose axes are automatic or explicit."""
    sizes = MESHES[name]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def spread(params: PyTree, on: Mesh) -> PyTree:
    """The parameters on a mesh, kernels sharded along as many of its axes as divide them.

    "data" takes the axis over stacked layers, if there is one, "fsdp" the first axis (that over
    layers, if it is the mesh's only one) and "tensor" the last.
    """

    def shard(path: Any, leaf: np.ndarray) -> jax.Array:
        spec: list[str | None] = [None] * leaf.ndim
        stacked = "blocks" in jax.tree_util.keystr(path)
        places = {"data": 0 if stacked else None, "fsdp": 0, "tensor": leaf.ndim - 1}
        if stacked and "data" in on.shape:
            places["fsdp"] = 1
        if leaf.ndim >= 2 and on.axis_names != ("data",):
            for name in on.axis_names:
                place = places[name]
                while place is not None and place < leaf.ndim:
                    if spec[place] is None and leaf.shape[place] % on.shape[name] == 0:
                        spec[place] = name
                        break
                    place = place + 1 if name == "fsdp" else place - 1 if place else None
        sharding = NamedSharding(on, PartitionSpec(*spec))
        return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

    return jax.tree_util.tree_map_with_path(shard, params)
