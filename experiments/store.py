"""The store of all measurements: one line of JSON for each record, appended, never rewritten."""

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
    """Where to find records in the lines of a file that have been read so far.

    Attributes:
        lines: How many lines have been read.
        end: The position in the file where they end.
        places: Where the newest record begins, by the digest of the keys that it is found by.
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
    # One index for each set of keys that records are found by.
    _indexes: dict[tuple[str, ...], _Index] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def append(self, record: Record) -> Record:
        """Appends a record completely or not at all, and waits until it is on disk.

        Args:
            record: Numbers that aren't finite are written as null.

        Returns:
            The record as `read` would return it.
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
        """Returns the records in order, or none if there is no file. Damaged lines are skipped."""
        return list(self.by_line().values())

    def by_line(self) -> dict[int, Record]:
        """Returns the records by their line numbers, from 1."""
        lines = enumerate(self._records(_Index()), start=1)
        return {line: record for line, (_, record) in lines if record is not None}

    def find(self, what: Mapping[str, Any], since: int = 0) -> Record | None:
        """Returns the newest record with these keys and values, or None.

        This object parses each line only once, however many records are asked for.

        Args:
            what: Some keys of the record, with their values.
            since: Ignore records that were there when the file had this size.
        """
        keys = tuple(sorted(what))
        wanted = _digest(what, keys)
        index = self._indexes.setdefault(keys, _Index())
        if self.size() < index.end:  # the file was replaced
            index = self._indexes[keys] = _Index()
        for place, record in self._records(index):
            if record is not None and record.keys() >= set(keys):
                index.places[_digest(record, keys)] = place
        place = index.places.get(wanted, -1)
        return self._at(place) if place >= since else None

    def size(self) -> int:
        """Returns the size of the file in bytes; 0 if there is none."""
        return self.path.stat().st_size if self.path.exists() else 0

    def _at(self, place: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(place)
            return json.loads(file.readline())

    def _records(self, index: _Index) -> Iterator[tuple[int, Record | None]]:
        """Yields the records after an index's lines, each with its position, and advances it."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(index.end)
            for line in file:
                # A line without its newline is being written, or was cut off by a crash.
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
    """Holds a lock file. The system releases it when the process ends, even by a crash.

    Args:
        path: The file; made if it does not exist, and never deleted.
        busy: The message of the `BusyError` that is raised if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(busy) from None
        yield


def plain(value: Any) -> Any:
    """Returns a value for JSON: numbers that aren't finite become None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _record(line: bytes) -> Record | None:
    """Returns the record of a line, or None if it is damaged."""
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
