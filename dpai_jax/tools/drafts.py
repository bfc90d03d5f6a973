"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import pathlib
import threading


def write_whole(target: pathlib.Path, data: bytes) -> None:
    """Writes a file so that a reader sees all of it or nothing."""
    draft = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with draft.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
