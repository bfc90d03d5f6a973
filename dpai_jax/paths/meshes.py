"""Arrays that lie on several devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

PyTree = Any
T = TypeVar("T")
Shardings = Sequence[Sharding | None]
"""How arrays lie on several devices, as `shardings_of` tells."""


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


def explicit_shardings(arrays: Sequence[Any]) -> tuple[NamedSharding | None, ...]:
    """How arrays lie along the explicit axes of a mesh; within `jax.jit` too."""
    return tuple(jax.typeof(x).sharding if _explicit_axes(_mesh(x)) else None for x in arrays)


def laid_out(tree: T, shardings: Shardings) -> T:
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


def moved_off(sharding: NamedSharding, shape: Sequence[int], axes: Sequence[int]) -> NamedSharding:
    """The sharding of an array that leaves some of its axes whole, and splits others the finer.

    Args:
      sharding: how the array lies.
      shape: its shape.
      axes: which to leave whole, where another one can be split in their place.

    Returns:
      The sharding, with as many parts.
    """
    names = mesh_axes(sharding)
    names += [()] * (len(shape) - len(names))
    sizes = sharding.mesh.shape

    def part(axis: int) -> float:
        return shape[axis] / math.prod(sizes[name] for name in names[axis])

    for axis in axes:
        for name in names[axis]:
            others = [i for i in range(len(shape)) if i not in axes and part(i) % sizes[name] == 0]
            if others:
                place = max(others, key=part)
                names[axis] = tuple(other for other in names[axis] if other != name)
                names[place] = (*names[place], name)
    return NamedSharding(sharding.mesh, PartitionSpec(*names))


def mesh_axes(sharding: NamedSharding) -> list[tuple[str, ...]]:
    """The axes of a mesh along which the first axes of an array are split; none for the others."""
    return [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in sharding.spec]


def split_like(x: Array, sharding: NamedSharding | None) -> Array:
    """An array, within `automatic`, to lie so; as it does if nothing is given."""
    if sharding is None:
        return x
    return split_along(x, sharding.mesh, dict(enumerate(mesh_axes(sharding))))


def split_along(x: Array, mesh: Mesh | AbstractMesh, axes: Mapping[int, tuple[str, ...]]) -> Array:
    """An array, within `automatic`, to be split along these axes where that divides them."""
    context = _context()
    divided = [
        axes[i] if i in axes and size % math.prod(mesh.shape[name] for name in axes[i]) == 0 else ()
        for i, size in enumerate(x.shape)
    ]
    sharding = NamedSharding(mesh if context.empty else context, PartitionSpec(*divided))
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
