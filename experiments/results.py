"""Results files: one JSON line per finished job, appended and never rewritten."""

import datetime as dt
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any

import jax

from experiments.config import Config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "dpai_jax")

Record = dict[str, Any]


def make_record(config: Config, metrics: dict[str, Any], seconds: float) -> Record:
    """Returns what a results file says about a finished job.

    Args:
        config: The job.
        metrics: What it measured; numbers that aren't finite are written as null.
        seconds: Its duration, compilation and pruning included.
    """
    return {
        "config": config.as_dict(),
        "metrics": _finite(metrics),
        "seconds": seconds,
        "finished": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
    }


def append(path: pathlib.Path, record: Record) -> None:
    """Adds one line to a results file, whole or not at all, and waits until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(_end_of_last_line(file.fileno()))
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: pathlib.Path) -> list[Record]:
    """Returns a results file's records in order; none where there is no file.

    Raises:
        ValueError: A line is no JSON object.
    """
    if not path.exists():
        return []
    # A line without its newline was cut off by a crash: its job did not finish.
    lines = path.read_text().split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def find(path: pathlib.Path, config: Config) -> Record | None:
    """Returns the newest record of exactly this job, None where it has not finished yet."""
    matches = [record for record in read(path) if record["config"] == config.as_dict()]
    return matches[-1] if matches else None


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


def _end_of_last_line(file: int) -> int:
    """Returns the number of bytes up to and including the last newline."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    return os.pread(file, size, 0).rfind(b"\n") + 1


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cpu_model() -> str:
    """Returns the processor's name; Linux keeps it in a file, others in what Python reports."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
