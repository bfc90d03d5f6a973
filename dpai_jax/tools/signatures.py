"""Signatures that tell whether two functions do the same, or arguments have the same shapes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax


def signature(value: Any) -> Hashable:
    """Equal for functions of the same code that close over equal values.

    So a call with a new `optax.adam(0.05)` uses what was compiled for the last one. A value that
    cannot be hashed, such as an array, is equal only to itself.
    """
    return _signature(value, ())


def _signature(value: Any, enclosing: tuple[int, ...]) -> Hashable:
    if id(value) in enclosing:  # a function that closes over itself
        return enclosing.index(id(value))
    inside = (*enclosing, id(value))
    if isinstance(value, types.FunctionType):
        try:
            cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        except ValueError:  # a closed-over variable is not bound yet
            return _Same(value)
        parts = (value.__defaults__, value.__kwdefaults__, cells)
        return value.__code__, id(value.__globals__), _signature(parts, inside)
    if isinstance(value, functools.partial):
        return _signature((value.func, value.args, value.keywords), inside)
    if isinstance(value, types.MethodType):
        return _signature((value.__func__, value.__self__), inside)
    if isinstance(value, tuple | list):
        return type(value), tuple(_signature(item, inside) for item in value)
    if isinstance(value, dict):
        return dict, tuple((key, _signature(item, inside)) for key, item in value.items())
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


def shapes_of(args: tuple[Any, ...]) -> Hashable:
    """Equal for arguments of the same structure, shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(args)
    return treedef, *[
        (x.shape, x.dtype, getattr(x, "weak_type", False))
        if hasattr(x, "dtype")
        else ((), type(x), False)
        for x in leaves
    ]


def of_shapes(signature: Any) -> Any:
    """Shapes in the place of arguments, of which `shapes_of` is the given one."""
    treedef, *avals = signature
    shapes = [jax.ShapeDtypeStruct(s, dtype, weak_type=weak) for s, dtype, weak in avals]
    return jax.tree.unflatten(treedef, shapes)


class Alike:
    """A function that is equal to others that do the same, for use as a static argument."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn, self.signature = fn, signature(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.fn(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike) and self.signature == other.signature

    def __hash__(self) -> int:
        return hash(self.signature)


class _Same:
    """Equal to what holds the very same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
