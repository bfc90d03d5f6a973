"""Arrays that lie on several devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, Sharding

PyTree = Any
T = TypeVar("T")


def automatic(fn: Callable[..., T], *args: PyTree, like: PyTree) -> T:
    """What a function within `jax.jit` computes, the compiler laying it out on the devices.

    Along the explicit axes of a mesh, which `jax.make_mesh` makes unless told otherwise, the
    sharding of an array belongs to its type, and an operation that could leave its result in
    several ways must be told which. Within `fn` nothing need be told.

    Args:
      fn: function of pytrees of arrays.
      args: its arguments.
      like: pytree, or the upper part of one, of what the results lie like: arrays or shardings;
        nothing for a result that is whole on every device.

    Returns:
      `fn(*args)`.
    """
    mesh = next(filter(_explicit_axes, map(_mesh, jax.tree.leaves((args, like)))), _context())
    axes = _explicit_axes(mesh)
    if not axes:
        return fn(*args)

    def of_result(x: Any) -> NamedSharding:
        spec = None if x is None else x.spec if _is_named(x) else jax.typeof(x).sharding.spec
        return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

    shardings = jax.tree.map(of_result, like, is_leaf=lambda x: x is None)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=shardings)(*args)


def _explicit_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _mesh(x: Any) -> AbstractMesh:
    return x.mesh.abstract_mesh if _is_named(x) else jax.typeof(x).sharding.mesh


def _context() -> AbstractMesh:
    return jax.sharding.get_abstract_mesh()


def _is_named(x: Any) -> bool:
    return isinstance(x, NamedSharding)


def shardings_of(arrays: Iterable[Any]) -> tuple[Sharding | None, ...]:
    """How arrays lie on several devices; nothing for those on one, and within `jax.jit`."""
    return tuple(map(_sharding, arrays))


def _sharding(array: Any) -> Sharding | None:
    if not isinstance(array, jax.Array | jax.ShapeDtypeStruct) or isinstance(
        array, jax.core.Tracer
    ):
        return None
    sharding = array.sharding
    return sharding if sharding is not None and len(sharding.device_set) > 1 else None


def laid_out(tree: T, shardings: Sequence[Sharding | None]) -> T:
    """The arrays of a tree, within `jax.jit`, to lie as `shardings_of` says."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, shardings, strict=True)
    result: T = jax.tree.unflatten(
        treedef, [x if sharding is None else _constrained(x, sharding) for x, sharding in pairs]
    )
    return result


def _constrained(x: Array, sharding: Sharding) -> Array:
    if isinstance(sharding, NamedSharding) and _explicit_axes(sharding.mesh.abstract_mesh):
        return jax.sharding.reshard(x, sharding)
    return lax.with_sharding_constraint(x, sharding)


def placed_like(tree: PyTree, params: PyTree) -> PyTree:
    """A tree parallel to the parameters, its arrays on the devices where the parameters are.

    Leaves without dimensions stay where they are.
    """

    def place(x: Any, param: Any) -> Any:
        sharding = _sharding(param)
        return x if sharding is None or jnp.ndim(x) == 0 else jax.device_put(x, sharding)

    return jax.tree.map(place, tree, params)


def whole_beside(arrays: Iterable[Any]) -> Sharding | None:
    """How small arrays lie beside larger ones on a mesh: whole on every device."""
    named = (s for s in shardings_of(arrays) if isinstance(s, NamedSharding))
    return next((NamedSharding(s.mesh, PartitionSpec()) for s in named), None)


def placed(tree: PyTree, sharding: Sharding | None) -> PyTree:
    """A tree whose arrays, but for those that lie on several devices already, lie so."""

    def place(x: Any) -> Any:
        if sharding is None or _sharding(x) is not None:
            return x
        array = np.asarray(x)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, tree)


def on_host(array: Any) -> np.ndarray:
    """An array as NumPy's, gathered from all processes."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
