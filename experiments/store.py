"""The store of all that was measured: one JSON line a record, appended and never rewritten."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.config import ConfigError

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Store:
    """A file of records. Any number of processes may append to it at once.

    Attributes:
        path: The file; it and its folder are made with the first record.
    """

    path: pathlib.Path

    def append(self, record: Record) -> Record:
        """Adds a record, whole or not at all, and waits until it is on disk.

        Args:
            record: Numbers that aren't finite are written as null.

        Returns:
            The record as it is read back.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(plain(record), allow_nan=False)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = _end_of_last_line(file.fileno())
            file.truncate(end)
            try:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:  # the disk is full
                os.ftruncate(file.fileno(), end)
                raise
        return json.loads(line)

    def read(self) -> list[Record]:
        """Returns the records in order; none where there is no file.

        Raises:
            ConfigError: A line is no record.
        """
        if not self.path.exists():
            return []
        # A line without its newline was cut off by a crash: what it told did not finish.
        lines = self.path.read_bytes().split(b"\n")[:-1]
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ConfigError(
                    f"{self.path}, line {number} is damaged; delete that line, or the file."
                )
            records.append(record)
        return records

    def find(self, what: Mapping[str, Any]) -> Record | None:
        """Returns the newest record that says all of this; None where there is none yet."""
        wanted = json.loads(json.dumps(plain(what)))
        for record in reversed(self.read()):
            if all(record.get(key) == value for key, value in wanted.items()):
                return record
        return None


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: str) -> Iterator[None]:
    """Holds a lock file, which the system lets go of when the process ends, however it ends.

    Args:
        path: The file; made if need be, and left behind.
        busy: What to raise as a `ConfigError` where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(busy) from None
        yield


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: numbers that aren't finite become None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _end_of_last_line(file: int) -> int:
    """Returns the number of bytes up to and including the last newline."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    return os.pread(file, size, 0).rfind(b"\n") + 1
