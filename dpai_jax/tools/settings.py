"""Settings as JSON, for files and records."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def described(value: Any, *, read: bool = True) -> Any:
    """Describes a setting as JSON. Settings that do the same have equal descriptions.

    A function is described by its name and what it closes over, an array by its hash.

    Args:
      value: a dataclass such as a pruning method, a function, an array, or a container of such.
      read: whether to read arrays for their hash. If not, an array is described by its dtype and
        shape, at no cost, even if it is traced or deleted.
    """
    return _described(value, read, ())


def _described(value: Any, read: bool, enclosing: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # JSON has no infinity
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = {"array": f"{value.dtype}{list(value.shape)}"}
        if not read:
            return array
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        content = np.asarray(value).tobytes()
        return array | {"sha256": hashlib.sha256(content).hexdigest()[:16]}
    if id(value) in enclosing:  # a function that closes over itself
        return "itself"
    inside = (*enclosing, id(value))
    parts = _parts(value)
    if isinstance(parts, dict):
        return {str(name): _described(part, read, inside) for name, part in parts.items()}
    return [_described(part, read, inside) for part in parts]


def _parts(value: Any) -> dict[Any, Any] | tuple[Any, ...]:
    """The parts that describe a value."""
    if isinstance(value, type):
        return {"class": value.__qualname__}
    if dataclasses.is_dataclass(value):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    if isinstance(value, types.FunctionType):
        return {"function": f"{value.__module__}.{value.__qualname__}"} | _bound(value)
    if isinstance(value, functools.partial):
        return {"partial": value.func, "args": value.args} | value.keywords
    if isinstance(value, dict):
        return value
    if isinstance(value, tuple | list):
        return tuple(value)
    return {"type": type(value).__qualname__}


def _bound(function: types.FunctionType) -> dict[str, Any]:
    """What a function closes over, and the default values of its arguments."""
    closed = inspect.getclosurevars(function).nonlocals
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    return defaults | dict(closed)
