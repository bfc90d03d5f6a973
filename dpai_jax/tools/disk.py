"""Compiled programs on disk, which the next process finds without tracing them again.

JAX's own cache finds a program by what it was lowered to, and tracing and lowering take longer than
reading it. Here a program's name is made of what it would be traced from: the network's program,
the settings, the shapes of the arguments; and of all that they are compiled with. A program of
which that is not known, as it belongs to a function of the user, has no name and is not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import platform
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

from dpai_jax.tools.drafts import write_whole
from dpai_jax.tools.signatures import Alike
from dpai_jax.tools.switches import all_switches

# Functions of these packages are known by their names and the packages' releases.
_KNOWN = ("jax", "jaxlib", "numpy", "optax", "dpai_jax")

_folder: pathlib.Path | None = None


class UnnamedError(Exception):
    """It is not known what a value is."""


def keep_in(folder: pathlib.Path) -> None:
    """Keeps programs in a folder from now on."""
    global _folder  # noqa: PLW0603  (one folder for the process)
    if _folder is None:
        jax.monitoring.register_event_listener(_found_by_jax.listen)
    _folder = folder


def is_on() -> bool:
    """Whether programs are kept."""
    return _folder is not None and jax.process_count() == 1


def fingerprint(*parts: Any) -> str | None:
    """What only equal values have, in any process; None if nothing tells them apart.

    Args:
      *parts: numbers, strings, tuples and lists of them, functions of known packages, dataclasses,
        and what has a `fingerprint` of its own, any of these.

    Returns:
      Hexadecimal digits.
    """
    try:
        return hashlib.sha256(_described(parts).encode()).hexdigest()
    except UnnamedError:
        return None


def name_of(title: str, *parts: Any) -> str | None:
    """A file's name for a program that is made of these parts; None if nothing tells them apart."""
    digits = fingerprint(*parts, _surroundings(), all_switches())
    return None if digits is None else f"{title.strip('_')}-{digits[:40]}"


def has(name: str) -> bool:
    """Whether a program of this name was kept."""
    return _folder is not None and (_folder / name).exists()


def read(name: str, device: jax.Device) -> jax.stages.Compiled | None:
    """The compiled program of this name for a device; None, and removed, if it cannot be read."""
    assert _folder is not None
    try:
        parts: tuple[Any, Any, Any] = pickle.loads((_folder / name).read_bytes())
        return serialize_executable.deserialize_and_load(*parts, execution_devices=[device])
    except Exception:  # noqa: BLE001  (whatever is wrong with a file, its program is compiled anew)
        with contextlib.suppress(OSError):
            (_folder / name).unlink()
        return None


def kept(name: str, compiler: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
    """Compiles a program and keeps it, if it is of a kind that can be kept; warns if that fails.

    What JAX's own cache gave back is not kept: XLA on CPUs writes it without its functions.
    """
    before = _found_by_jax.number
    compiled = compiler()
    if _found_by_jax.number == before:
        _write(name, compiled)
    return compiled


class _FoundByJax(threading.local):
    """How many programs JAX's own cache gave back to this thread."""

    number = 0

    def listen(self, event: str, **_: Any) -> None:
        self.number += event == "/jax/compilation_cache/cache_hits"


_found_by_jax = _FoundByJax()


def _write(name: str, compiled: jax.stages.Compiled) -> None:
    assert _folder is not None
    try:
        parts = serialize_executable.serialize(compiled)
    except (NotImplementedError, ValueError):
        return
    try:
        _folder.mkdir(exist_ok=True)
        write_whole(_folder / name, pickle.dumps(parts))
    except OSError as error:
        warnings.warn(f"a compiled program could not be kept in {_folder}: {error}", stacklevel=2)


def _described(value: Any) -> str:
    """A string that differs for values that make different programs."""
    if isinstance(value, types.NoneType | bool | int | float | str | bytes | np.generic | np.dtype):
        return repr(value)
    if isinstance(value, jax.tree_util.PyTreeDef):
        return str(value)
    if isinstance(value, type):
        return _known(value)
    if callable(value) and not hasattr(value, "fingerprint"):
        return _described_function(value)
    return f"{_known(type(value))}({', '.join(map(_described, _parts_of(value)))})"


def _parts_of(value: Any) -> Sequence[Any]:
    """What tells a value from others of its type."""
    if hasattr(value, "fingerprint"):
        if value.fingerprint is None:
            raise UnnamedError(repr(type(value)))
        return (value.fingerprint,)
    if isinstance(value, tuple | list):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    raise UnnamedError(repr(type(value)))


def _described_function(value: Any) -> str:
    if isinstance(value, Alike):
        return _described(value.fn)
    if isinstance(value, functools.partial):
        return f"partial{_described((value.func, value.args, tuple(value.keywords.items())))}"
    function = getattr(value, "__wrapped__", value)  # of jax.jit
    is_of_file = (
        isinstance(function, types.FunctionType) and function.__code__.co_filename[0] != "<"
    )
    if not is_of_file:  # a function without a file can be another one in the next process
        raise UnnamedError(repr(value))
    code, cells = function.__code__, [cell.cell_contents for cell in function.__closure__ or ()]
    constants = [x for x in code.co_consts if not isinstance(x, types.CodeType)]
    own = code.co_firstlineno, code.co_code, code.co_names, constants
    defaults = function.__defaults__, tuple((function.__kwdefaults__ or {}).items())
    return f"{_known(function)}{_described((own, defaults, cells))}"


def _known(value: Any) -> str:
    module = value.__module__
    if module != "builtins" and module.partition(".")[0] not in _KNOWN:
        raise UnnamedError(f"{module}.{value.__qualname__}")
    return f"{module}.{value.__qualname__}"


@functools.cache
def _surroundings() -> str:
    """All that programs are compiled with and for: sources, releases, device and processor."""
    sources = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    releases = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")]
    device = jax.local_devices()[0]
    compiler = device.device_kind, device.client.platform_version, os.environ.get("XLA_FLAGS")
    return repr((sources.hexdigest(), releases, compiler, jax.device_count(), _processor()))


def _processor() -> str:
    """What the processor can do, on which a CPU's code depends."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("model name", "flags", "Features")
        return repr(sorted({line for line in lines if line.startswith(kinds)}))
    return platform.machine() + platform.processor()
