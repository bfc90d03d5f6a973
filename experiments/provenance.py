"""What a number was made by: settings, code, versions and hardware, for the records of a store."""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import os
import pathlib
import platform
import subprocess
import types
from typing import Any

import jax
import numpy as np

import dpai_jax as dpai

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "dpai_jax")

_HERE = pathlib.Path(__file__).parent
_COMPUTING = (
    pathlib.Path(inspect.getfile(dpai)).parent,
    *(_HERE / name for name in ("datasets", "models", "benchmarks", "config.py", "cpu.py")),
    *(_HERE / name for name in ("devices.py", "methods.py", "pretrained.py", "steps.py")),
    _HERE / "train.py",
)
"""The code that numbers are made by; all else shows or stores them."""


def described(value: Any) -> Any:
    """Returns what a setting is, in JSON's terms: equal for settings that do the same.

    A function is its name and all that it closes over; an array is its hash.

    Args:
        value: A dataclass such as a pruning method, a function, an array, or a container of such.
    """
    return _described(value, ())


def _described(value: Any, enclosing: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # JSON has no infinity
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        return {"array": f"{array.dtype}{list(array.shape)}", "sha256": digest}
    if id(value) in enclosing:  # a function that closes over itself
        return "itself"
    inside = (*enclosing, id(value))
    parts = _parts(value)
    if isinstance(parts, dict):
        return {str(name): _described(part, inside) for name, part in parts.items()}
    return [_described(part, inside) for part in parts]


def _parts(value: Any) -> dict[Any, Any] | tuple[Any, ...]:
    """What a value is made of."""
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
    """What a function closes over, and its arguments' default values."""
    closed = inspect.getclosurevars(function).nonlocals
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    return defaults | dict(closed)


@functools.cache
def code() -> str:
    """Returns a hash of the code that numbers are made by, but for comments and docstrings.

    A commit that changes documents or tests alone leaves it as it is; a change that is not
    committed does not.
    """
    digest = hashlib.sha256()
    for place in _COMPUTING:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.relative_to(place.parent).as_posix().encode())
            digest.update(ast.unparse(_without_docstrings(ast.parse(file.read_bytes()))).encode())
    return digest.hexdigest()[:16]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, scopes):
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    return tree


def _is_text(line: ast.stmt) -> bool:
    value = line.value if isinstance(line, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@functools.cache
def origin() -> dict[str, Any]:
    """Returns the commit, the versions and the hardware; for information, not to match by."""
    return {"commit": _commit(), "versions": versions(), "hardware": hardware()}


def _commit() -> str:
    """The commit that is checked out, with a plus sign where files differ from it."""
    try:
        git = functools.partial(
            subprocess.run, cwd=_HERE, capture_output=True, text=True, check=True, timeout=10
        )
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + "+" * bool(changed)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what the experiments stand on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Returns what the computer is: its processor, and the devices that JAX sees."""
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
    }


def _cpu_model() -> str:
    """Returns the processor's name; Linux keeps it in a file, others in what Python reports."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
