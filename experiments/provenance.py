"""Where numbers come from: settings, code, versions and hardware, for the records of a store."""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import pathlib
import platform
import subprocess
from typing import Any

import jax

import dpai_jax as dpai
from experiments import cpu

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "dpai_jax")

_HERE = pathlib.Path(__file__).parent
_COMPUTING = (
    pathlib.Path(inspect.getfile(dpai)).parent,
    *(_HERE / name for name in ("datasets", "models", "benchmarks", "config.py", "cpu.py")),
    *(_HERE / name for name in ("devices.py", "methods.py", "pretrained.py", "steps.py")),
    _HERE / "train.py",
)
"""The code that computes numbers. Everything else shows or stores them."""


# Cached, as a sweep asks for the same file with each job.
@functools.cache
def content(place: pathlib.Path) -> str:
    """Returns a hash of the content of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file():
            with file.open("rb") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.relative_to(place)} {sha256}\n".encode())
    return digest.hexdigest()[:16]


@functools.cache
def code() -> str:
    """Returns a hash of the code that computes numbers, without comments and docstrings.

    A commit that only changes documents or tests does not change it. An uncommitted change of the
    code does.
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
    """Returns the commit, versions and hardware, for information. Records don't match by them."""
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
    """Returns the versions of Python and of the main packages."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Returns the computer's processor and the devices that JAX sees."""
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        # XLA rounds otherwise on one core than on several (see `cpu.compiler_options`).
        "cpu_count": cpu.cores(),
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
    }


def _cpu_model() -> str:
    """Returns the processor's name: on Linux from a file, elsewhere from Python."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
