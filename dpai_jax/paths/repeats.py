"""Where a program repeats itself: cut there, all repeats of a block are one program.

Of two runs of equations that do the same only the kernels differ, and other operands; so what is
compiled for one serves the other. Equations are compared by what they do, not by what they read,
and cut where few values pass from one block to the next. Whether two segments are the same program
is decided afterwards, by all that they read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from dpai_jax.paths.rewriting import CALLS, called_jaxpr
from dpai_jax.paths.sameness import ComparableJaxpr, kind_of
from dpai_jax.tools.jaxprs import open_jaxpr

# The equations of a block, at least: each program costs a call.
_FEWEST = 8

_CONTRACTIONS = ("conv_general_dilated", "dot_general", "ragged_dot_general", "scan", "while")


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Equations that follow one another, as a jaxpr is.

    Attributes:
      eqns: the equations.
      invars: what they read, in the order of reading.
      outvars: what is read of theirs afterwards, in the order of writing.
      constvars: nothing.
    """

    eqns: Sequence[JaxprEqn]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    constvars: tuple[()] = ()

    @functools.cached_property
    def program(self) -> ComparableJaxpr:
        """What it does: equal for those that do the same."""
        return ComparableJaxpr(self)


def segments_of(jaxpr: Any, n_sources: int, share: float) -> list[Segment]:
    """A program as segments, of which several do the same.

    Args:
      jaxpr: the program.
      n_sources: how many of its last arguments the first segment takes, read or not.
      share: of all contractions the part that may be left when repeats are not counted.

    Returns:
      The segments; one if more than this part would be left.
    """
    opened, _ = open_jaxpr(jaxpr)
    cuts = _cuts(opened)
    segments = _segments(opened, n_sources, cuts)
    sizes = {segment.program: _size(segment) for segment in segments}
    if sum(sizes.values()) > share * sum(map(_size, segments)):
        return _segments(opened, n_sources, [])
    return segments


def _size(jaxpr: Any) -> int:
    """The number of contractions, also within calls."""
    total = 0
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive.name in CALLS:
            total += _size(called_jaxpr(eqn))
        total += eqn.primitive.name in _CONTRACTIONS
    return total


def _segments(opened: Any, n_sources: int, cuts: Sequence[int]) -> list[Segment]:
    eqns = opened.eqns
    last: dict[Any, int] = {}
    for i, eqn in enumerate(eqns):
        last.update((x, i) for x in eqn.invars if not isinstance(x, Literal))
    last.update((x, len(eqns)) for x in opened.outvars if not isinstance(x, Literal))
    sources = list(opened.invars[len(opened.invars) - n_sources :])
    segments = []
    for start, end in zip([0, *cuts], [*cuts, len(eqns)], strict=True):
        own = sources if start == 0 else []
        written = [x for eqn in eqns[start:end] for x in eqn.outvars]
        inner = {*written, *own}
        atoms = [x for eqn in eqns[start:end] for x in eqn.invars]
        if end == len(eqns):
            atoms += opened.outvars
        read = dict.fromkeys(x for x in atoms if not isinstance(x, Literal) and x not in inner)
        results = [x for x in (*written, *own) if last.get(x, -1) >= end]
        if end == len(eqns):
            results = opened.outvars
        segments.append(Segment(eqns[start:end], [*read, *own], results))
    return segments


def _cuts(opened: Any) -> list[int]:
    """Before which equations to cut, in order."""
    eqns = opened.eqns
    numbers: dict[Any, int] = {}
    kinds = np.asarray([numbers.setdefault(kind_of(eqn), len(numbers)) for eqn in eqns], int)
    crossing = _crossing(opened)
    cuts: list[int] = []
    parts = [(0, len(eqns))]
    while parts:
        first, end = parts.pop()
        run = _longest_run(kinds[first:end])
        if run is None:
            continue
        start, period, length = run
        offsets = range(min(period, length - 2 * period + 1))
        places = [range(first + start + i, first + start + length + 1, period) for i in offsets]
        best = min(places, key=lambda cut: max(crossing[cut]))
        cuts += best
        parts += [(first, best[0]), (best[-1], end)]
    return sorted(set(cuts) - {0, len(eqns)})


def _crossing(opened: Any) -> np.ndarray:
    """How many results of equations before each place are read after it."""
    steps = np.zeros(len(opened.eqns) + 2, int)
    written = {x: i for i, eqn in enumerate(opened.eqns) for x in eqn.outvars}
    last: dict[Any, int] = {}
    for i, eqn in enumerate(opened.eqns):
        last.update((x, i) for x in eqn.invars if not isinstance(x, Literal))
    for x, end in last.items():
        if x in written:
            steps[written[x] + 1] += 1
            steps[end + 1] -= 1
    return np.cumsum(steps)


def _longest_run(kinds: np.ndarray) -> tuple[int, int, int] | None:
    """Where most is repeated: the first place, the period, and the length of all repeats."""
    best, found = 0, None
    for period in range(_FEWEST, len(kinds) // 2 + 1):
        ends = np.flatnonzero(kinds[period:] != kinds[:-period])
        ends = np.concatenate([[-1], ends, [len(kinds) - period]])
        i = int(np.argmax(np.diff(ends)))
        start, length = int(ends[i]) + 1, int(ends[i + 1] - ends[i] - 1) + period
        saved = (length // period - 1) * period
        if saved > best:
            best, found = saved, (start, period, length)
    return found
