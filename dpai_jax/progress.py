"""A line of progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

_SECONDS_BETWEEN = 0.2


class ProgressLine:
    """Shows how far a method has come, on one line that is overwritten."""

    def __init__(self, label: str, stream: TextIO | None = None):
        self.label = label
        self.stream = sys.stderr if stream is None else stream
        self._start = time.monotonic()
        self._last = float("-inf")
        self._width = 0

    def __call__(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of a step, unless the last ones have just been shown."""
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN and step < steps:
            return
        self._last = now
        shown = "  ".join(f"{name} {float(value):.6g}" for name, value in numbers.items())
        self._write(f"{self.label}  step {step}/{steps}  {shown}  {now - self._start:.0f} s")

    def close(self, line: str) -> None:
        """Replaces the line by one that stays on the terminal."""
        self._write(line)
        self.stream.write("\n")
        self.stream.flush()

    def _write(self, line: str) -> None:
        self.stream.write("\r" + line.ljust(self._width))
        self.stream.flush()
        self._width = len(line)
