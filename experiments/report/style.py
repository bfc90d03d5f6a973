"""How methods look: the same in every figure, on light and dark backgrounds."""

import dataclasses
import zlib
from typing import Any

from dpai_jax.plot.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    OLIVE,
    ORANGE,
    PAPER,
    PURPLE,
    RULE,
    SKY,
    VERMILLION,
)
from experiments.config import DENSE

DARK = {
    PAPER: "#14171a",
    INK: "#e6e9ec",
    MUTED: "#9aa3ac",
    RULE: "#2c3238",
    BLUE: "#5aaeea",
    SKY: "#9ad4f5",
    ORANGE: "#f0ac2e",
    VERMILLION: "#ff7f4a",
    GREEN: "#35c79b",
    PURPLE: "#e58fc6",
    OLIVE: "#d8cf4a",
    BLACK: "#d5d8db",
    GREY: "#8d949b",
}
"""What each colour becomes on dark ground."""

LOOKS = {
    DENSE: (GREY, ""),
    "random": (ORANGE, "s"),
    "random-er": (ORANGE, "<"),
    "random-uniform": (ORANGE, ">"),
    "magnitude": (BLACK, "p"),
    "magnitude-erk": (BLACK, "h"),
    "snip": (VERMILLION, "^"),
    "snip-erk": (VERMILLION, "d"),
    "iterative-snip": (VERMILLION, "8"),
    "force": (VERMILLION, "H"),
    "grasp": (BLACK, "*"),
    "synflow": (GREEN, "v"),
    "synflow-erk": (GREEN, "p"),
    "phew": (PURPLE, "P"),
    "npb": (OLIVE, "X"),
    "ntk-sap": (PURPLE, "d"),
    "prospr": (OLIVE, "h"),
    "dpai": (BLUE, "o"),
    "dpai-published": (SKY, "D"),
    "imp": (BLACK, "s"),
}
"""The colour and the marker of each method; methods of one family share a colour."""

_LINES = {
    "repair": (0, (4, 1.5)),
    "shuffled": (0, (1, 1.2)),
    "fresh": (0, (5, 1, 1, 1)),
    "permuted": (0, (3, 1, 1, 1, 1, 1)),
    "largest": (0, (2, 2)),
}


@dataclasses.dataclass(frozen=True)
class Look:
    """How one method is drawn.

    Attributes:
        color: The colour of its line and markers.
        marker: Matplotlib's name of the marker; empty for the dense network.
        line: The line style: solid, unless the masks were changed afterwards.
        hollow: Whether the markers are hollow, as for masks that were changed afterwards.
    """

    color: str
    marker: str
    line: Any = "-"
    hollow: bool = False

    @property
    def markers(self) -> dict[str, Any]:
        """Matplotlib's arguments for the markers."""
        return {
            "marker": self.marker or "None",
            "markerfacecolor": PAPER if self.hollow else self.color,
            "markeredgecolor": self.color,
        }


def look(method: str) -> Look:
    """Returns how a method is drawn; an unknown method gets a look that depends on its name.

    With other settings, as in "dpai[beta=0]", it keeps the colour of its family.
    """
    base, _, afterwards = method.partition("+")
    if base in LOOKS:
        color, marker = LOOKS[base]
    else:
        family = LOOKS.get(base.partition("[")[0])
        others = [other for other in LOOKS.values() if other[1] and other != family]
        color, marker = others[zlib.crc32(base.encode()) % len(others)]
        color = family[0] if family else color
    return Look(color, marker, _LINES.get(afterwards, "-"), bool(afterwards))
