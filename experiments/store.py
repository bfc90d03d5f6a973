"""The store of all that was measured: one JSON line a record, appended and never rewritten."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.config import ConfigError

Record = dict[str, Any]

_LOG = logging.getLogger(__name__)


class BusyError(ConfigError):
    """Another process holds a lock."""


@dataclasses.dataclass
class _Index:
    """Where the newest record of each content is, in the lines up to a certain one.

    Attributes:
        lines: How many lines have been looked at.
        end: The place in the file where they end.
        places: Where a record begins, by the digest of what it is found by.
    """

    lines: int = 0
    end: int = 0
    places: dict[bytes, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Store:
    """A file of records. Any number of processes may append to it at once.

    Attributes:
        path: The file; it and its folder are made with the first record.
    """

    path: pathlib.Path
    # One for each set of keys that records are found by.
    _indexes: dict[tuple[str, ...], _Index] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        """Returns the records in order; none where there is no file. Damaged lines are left out."""
        return list(self.by_line().values())

    def by_line(self) -> dict[int, Record]:
        """Returns the records by the numbers of their lines, from 1."""
        lines = enumerate(self._records(_Index()), start=1)
        return {line: record for line, (_, record) in lines if record is not None}

    def find(self, what: Mapping[str, Any], since: int = 0) -> Record | None:
        """Returns the newest record that says all of this; None where there is none yet.

        Each line is parsed once in the life of this object, however many records are asked for.

        Args:
            what: Some keys of the record, with their values.
            since: Looks only at records that were appended when the file had this size.
        """
        keys = tuple(sorted(what))
        wanted = _digest(what, keys)
        index = self._indexes.setdefault(keys, _Index())
        if self.size() < index.end:  # another file took its place
            index = self._indexes[keys] = _Index()
        for place, record in self._records(index):
            if record is not None and record.keys() >= set(keys):
                index.places[_digest(record, keys)] = place
        place = index.places.get(wanted, -1)
        return self._at(place) if place >= since else None

    def size(self) -> int:
        """Returns the bytes of the file; 0 where there is none."""
        return self.path.stat().st_size if self.path.exists() else 0

    def _at(self, place: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(place)
            return json.loads(file.readline())

    def _records(self, index: _Index) -> Iterator[tuple[int, Record | None]]:
        """Yields what follows the lines of an index, each with its place, and counts it there."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(index.end)
            for line in file:
                # One without its newline is being written, or was cut off by a crash.
                if not line.endswith(b"\n"):
                    return
                place = index.end
                index.end += len(line)
                index.lines += 1
                record = _record(line)
                if record is None:
                    _LOG.warning("%s, line %d is damaged and left out.", self.path, index.lines)
                yield place, record


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: str) -> Iterator[None]:
    """Holds a lock file, which the system lets go of when the process ends, however it ends.

    Args:
        path: The file; made if need be, and left behind.
        busy: What to raise as a `BusyError` where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(busy) from None
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


def _record(line: bytes) -> Record | None:
    """Returns the record of a line; None of a damaged one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _digest(record: Mapping[str, Any], keys: Sequence[str]) -> bytes:
    """A hash of some of a record's keys and values."""
    text = json.dumps(plain({key: record[key] for key in keys}), sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def _end_of_last_line(file: int) -> int:
    """Returns the number of bytes up to and including the last newline."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    return os.pread(file, size, 0).rfind(b"\n") + 1
