"""Tables over several networks: where one method stands, and how far each is from the best."""

import itertools
from collections.abc import Sequence

import numpy as np

from experiments.config import percent
from experiments.grid import Cells, Grid
from experiments.report import records as own
from experiments.report import statistics, tables
from experiments.report.records import Panel


def standing(panels: Sequence[Panel], method: str) -> Grid:
    """Makes the table of how many others a method is ahead of, level with and behind.

    Its own masks, repaired, are no others, and controls such as shuffled masks are none.

    Args:
        panels: The networks. Those that lack the method are left out.
        method: Name of the method.
    """
    rows: list[Cells | None] = []
    for panel in panels:
        of_panel = [_standing(panel, sparsity, method) for sparsity in panel.sparsities]
        found = [cells for cells in of_panel if cells is not None]
        rows += [None] * bool(rows and found)
        rows += [("" if i else panel.title, *cells) for i, cells in enumerate(found)]
    return Grid(
        f"{method} among all methods that were trained: test accuracy",
        ("network", "sparsity", method, "best other", "less it", "ahead of", "level", "behind"),
        tuple(rows),
        left=("network", "best other"),
        caption=f"percent, last epoch; less it: {method} less the best of the others, in points; "
        "ahead, behind: told apart by a paired t-test over seeds, at 5 % in each row after Holm's "
        "correction; level: not told apart",
    )


def _standing(panel: Panel, sparsity: float, method: str) -> Cells | None:
    found = statistics.differences(panel, sparsity, method)
    pairs = [pair for pair in found if _is_rival(pair.lead(method)[1], method)]
    if not pairs:
        return None
    (mine,) = (group for group in panel.at(sparsity) if group.method == method)
    lead, other = min(pair.lead(method) for pair in pairs)
    ahead = sum(pair.apart and pair.better == method for pair in pairs)
    behind = sum(pair.apart and pair.other == method for pair in pairs)
    return (
        percent(sparsity),
        tables.mean_of(mine, own.last),
        other,
        f"{100 * lead:+.1f}",
        *map(str, (ahead, len(pairs) - ahead - behind, behind)),
    )


def _is_rival(name: str, method: str) -> bool:
    """Whether a method is another one, and no control."""
    return name.partition("+")[0] != method and not _is_control(name)


def _is_control(name: str) -> bool:
    """Whether masks or weights were changed after pruning, to learn what a method owes to what."""
    return name.partition("+")[2] not in ("", "repair")


def distances(panels: Sequence[Panel]) -> Grid:
    """Makes the table of each method's mean distance to the best of each network.

    Only methods that were trained on each of the networks at each of their sparsities are shown.
    Controls such as shuffled masks are left out.

    Args:
        panels: The networks.
    """
    by_sparsity: dict[float, list[dict[str, float]]] = {}
    for panel in panels:
        for sparsity in panel.sparsities:
            by_sparsity.setdefault(sparsity, []).append(_distances(panel, sparsity))
    sparsities = sorted(by_sparsity)
    every = list(itertools.chain.from_iterable(by_sparsity[s] for s in sparsities))
    methods = [name for name in every[0] if all(name in found for found in every)]

    def cell(method: str, found: Sequence[dict[str, float]]) -> str:
        points = [100 * of_network[method] for of_network in found]
        return f"{np.mean(points):.1f} ({max(points):.1f})"

    def mean(method: str) -> float:
        return float(np.mean([found[method] for found in every]))

    rows = [
        (name, *(cell(name, by_sparsity[s]) for s in sparsities), cell(name, every))
        for name in sorted(methods, key=mean)
    ]
    headings = [_heading(s, len(by_sparsity[s])) for s in sparsities]
    return Grid(
        "Points of test accuracy below the best of a network: mean (most)",
        ("method", *headings, "all"),
        tuple(rows),
        left=("method",),
        caption="the best: the highest mean over seeds, of all methods trained; last epoch",
    )


def _heading(sparsity: float, networks: int) -> str:
    return f"{percent(sparsity)}, {networks} network{'s' * (networks > 1)}"


def _distances(panel: Panel, sparsity: float) -> dict[str, float]:
    """How far the methods' mean accuracies are below the highest one."""
    means = {
        group.method: float(np.mean(list(group.accuracies.values())))
        for group in panel.at(sparsity)
        if group.accuracies and not _is_control(group.method)
    }
    return {method: max(means.values()) - mean for method, mean in means.items()}
