"""Small networks, meshes of eight devices, and how parameters lie on them."""

import functools
import itertools
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
    """Convolutions of 3x3 taps, one of them in groups, beside a shortcut."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.width, (3, 3), name="stem")(x))
        y = nn.relu(nn.Conv(self.width, (3, 3), strides=2, name="conv1")(x))
        y = nn.Conv(self.width, (3, 3), feature_group_count=4, name="conv2")(y)
        x = nn.relu(nn.Conv(self.width, (1, 1), strides=2, name="shortcut")(x) + y)
        return nn.Dense(self.width // 2, name="head")(x.mean((1, 2)))


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        queries, keys, values = jnp.split(nn.Dense(3 * self.width)(nn.LayerNorm()(x)), 3, -1)
        attention = nn.softmax(queries @ keys.mT)
        x = x + nn.Dense(self.width)(attention @ values)
        y = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(y), None


class Transformer(nn.Module):
    """Eight blocks whose kernels are stacked by `nn.scan`."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)
        stem = nn.Dense(self.width, name="stem")
        x, _ = blocks(self.width, name="blocks")(stem(x), None)
        return nn.Dense(self.width // 2, name="head")(x.mean(1))


@functools.cache
def network(
    name: str, wider: int = 1
) -> tuple[Callable[..., jax.Array], PyTree, jax.ShapeDtypeStruct]:
    """A network function, parameters as NumPy's arrays, and the shape of an input."""
    if name == "mlp":
        widths = [wider * n for n in (16, 32, 64, 8)]
        x = jax.ShapeDtypeStruct((1, widths[0]), jnp.float32)
        fn: Any = mlp
        shapes: Any = {
            str(i): jax.ShapeDtypeStruct(shape, np.float32)
            for i, shape in enumerate(itertools.pairwise(widths), 1)
        }
    else:
        module = {"residual": Residual, "transformer": Transformer}[name](16 * wider)
        shape = (1, 4, 4, 3 * wider) if name == "residual" else (1, 8, 8 * wider)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
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
