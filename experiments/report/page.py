"""The report as one HTML page that needs no other file, and no network."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config import DENSE, percent
from experiments.grid import Grid
from experiments.report import figures, style, tables
from experiments.report import records as own
from experiments.report.records import Group, Panel
from experiments.report.statistics import LEVEL, Difference
from experiments.store import Record

_CSS = """
:root{color-scheme:light dark;LIGHT}
@media (prefers-color-scheme:dark){:root{DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:break-word;-webkit-text-size-adjust:100%}
main{max-width:76rem;margin:auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.3rem;margin:2.75rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.75rem 0 .5rem}
p,ul{max-width:46rem;margin:.5rem 0}
ul{padding-left:1.2rem}
.muted,.note{color:var(--muted);font-size:.875rem}
code,pre{font:.85em/1.45 ui-monospace,monospace;overflow-wrap:anywhere}
pre{white-space:pre-wrap;border:1px solid var(--rule);border-radius:6px;padding:.6rem .8rem}
.figures{display:grid;gap:2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));
align-items:start}
figure{margin:0;min-width:0;max-width:40rem}
figure svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;margin:.75rem 0 .25rem;max-width:max-content;min-width:0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;text-align:right;white-space:nowrap}
th{font-weight:600;border-bottom:1px solid var(--muted)}
.l{text-align:left}
tbody+tbody tr:first-child td{border-top:1px solid var(--rule)}
summary{cursor:pointer;color:var(--link);margin:.75rem 0}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;margin:.75rem 0}
dt{color:var(--muted)}dd{margin:0}
"""


def html_page(
    records: Sequence[Record],
    panels: Sequence[Panel],
    differences: Mapping[str, Sequence[Difference]],
    drawn: Mapping[str, Mapping[str, str]],
    command: str,
) -> str:
    """Returns the page.

    Args:
        records: All records that were read.
        panels: The same jobs as panels.
        differences: The differences between methods, by the panels' titles.
        drawn: The figures of each panel as SVG: by the panels' titles, then by their kinds.
        command: The command that makes the page.
    """
    titles = ", ".join(panel.title for panel in panels)
    parts = [
        "<h1>Networks pruned at initialization, then trained</h1>",
        f'<p class="muted">{_text(titles)}</p>',
        _summary(records, panels),
        "<h2>Accuracy against sparsity</h2>",
        f"<p>{_ACCURACY}</p>",
        _figures(panels, drawn, "accuracy", "Test accuracy against sparsity"),
        *(_accuracies(panel) for panel in panels),
        "<h2>Which differences are real</h2>",
        f"<p>{_DIFFERENCES}</p>",
        *(_verdicts(panel, differences[panel.title]) for panel in panels),
        "<h2>Time of pruning</h2>",
        _scroll(tables.pruning_times(panels)),
        "<h2>Topology</h2>",
        f"<p>{_PATHS}</p>",
        _figures(panels, drawn, "paths", "Nodes and kernels against log-paths"),
        f"<p>{_LAYERS}</p>",
        _figures(panels, drawn, "layers", "Effective weights and outputs of each layer"),
        "<h2>Where the numbers come from</h2>",
        _origin(records, panels, command),
        *(_settings(panel) for panel in panels),
        _folded("Every job", _scroll(tables.jobs(panels))),
    ]
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Report: {_text(titles)}</title>
<style>{_css()}</style>
</head>
<body><main>
{chr(10).join(parts)}
</main></body>
</html>
"""


_ACCURACY = """\
Test accuracy after the last epoch: means over seeds, with one sample deviation to each side. The
dashed line is the dense network. “2 of 3” beside a point: two of its three seeds have an accuracy.
"""

_DIFFERENCES = f"""\
A paired t-test over seeds, as jobs of one seed share their initial weights and data order. It
assumes that the differences are normally distributed; tests that do not assume so cannot fall below
p = 0.25 with three seeds. Holm's method then corrects p for all pairs at one sparsity of one
network: the chance of any false “apart” among these is at most {100 * LEVEL:.0f} %. Each interval
is for its own difference alone. “Not told apart” does not mean equal."""

_PATHS = """\
Nodes and kernels against log-paths: each point is one job. The dense network is left out, as are
networks without a path from input to output. The dotted line joins the means of the front: of the
methods that no other one surpasses in paths, nodes and kernels at once."""

_LAYERS = """\
Means over seeds for each layer. Left: the share of kept weights that are on a path, 0 if none is
kept. Right: the share of outputs that are on a path."""


def _accuracies(panel: Panel) -> str:
    folded = _folded(
        "Validation-selected accuracy, topology, seeds and records", _scroll(tables.results(panel))
    )
    return _scroll(tables.accuracies(panel)) + folded


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _summary(records: Sequence[Record], panels: Sequence[Panel]) -> str:
    """A list of what has finished, and what failed, diverged or is missing."""
    groups = [(panel, group) for panel in panels for group in panel.groups]
    finished = sum(len(group.records) for _, group in groups)
    failed = own.failed(records)
    missing = sum(len(group.missing) for _, group in groups)
    lost = sum(group.diverged for _, group in groups)
    counts = {"diverged": lost, "failed": len(failed), "seeds missing": missing}
    told = ", ".join(f"{what}: {count}" for what, count in counts.items())
    lines = [f"{finished} jobs finished; {told}"]
    lines += [
        f"{_name(panel, group)}: {group.diverged} of {len(group.records)} diverged"
        for panel, group in groups
        if group.diverged
    ]
    lines += [
        f"{_name(panel, group)}: no result for seed {', '.join(map(str, group.missing))}"
        for panel, group in groups
        if group.missing
    ]
    lines += [
        f"{panel.title}: {method} at {percent(sparsity)} has no result"
        for panel in panels
        for sparsity in panel.sparsities
        for method in panel.methods
        if method != DENSE and all(group.method != method for group in panel.at(sparsity))
    ]
    lines += [
        f"failed: {record['config']['model']} on {record['config']['dataset']}, "
        f"{record['config']['method']} {percent(record['config']['sparsity'])}, "
        f"seed {record['config']['seed']}: {record.get('error', 'no reason given')} "
        f"({record['source']})"
        for record in failed
    ]
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _name(panel: Panel, group: Group) -> str:
    return f"{panel.title}: {group.method} at {percent(group.sparsity)}"


def _verdicts(panel: Panel, found: Sequence[Difference]) -> str:
    """For each sparsity, how many pairs are apart and which are not; the table is folded away."""
    lines = []
    for sparsity in panel.sparsities:
        pairs = [pair for pair in found if pair.sparsity == sparsity]
        if not pairs:
            continue
        unsure: dict[str, list[str]] = {}
        for pair in pairs:
            if not pair.apart:
                unsure.setdefault(pair.better, []).append(pair.other)
        apart = sum(pair.apart for pair in pairs)
        told = f"<b>{percent(sparsity)}</b>: {apart} of {len(pairs)} pairs told apart."
        listed = "; ".join(f"{name} and {', '.join(others)}" for name, others in unsure.items())
        lines.append(told + (f" Not told apart: {_text(listed)}." if unsure else ""))
    if not lines:
        return f"<h3>{_text(panel.title)}</h3><p>There is only one method.</p>"
    items = "".join(f"<li>{line}</li>" for line in lines)
    folded = _folded("All differences", _scroll(tables.differences(panel, found)))
    return f"<h3>{_text(panel.title)}</h3><ul>{items}</ul>{folded}"


def _origin(records: Sequence[Record], panels: Sequence[Panel], command: str) -> str:
    used = [record for panel in panels for group in panel.groups for record in group.records]
    old = sum("metrics" in record and "config" in record for record in records) - len(used)
    other = sum("config" not in record for record in records)
    files = dict.fromkeys(record["source"].rpartition(":")[0] for record in used)
    facts = {
        "records": ", ".join(files),
        "left out": f"{old} replaced by a newer record of the same job, {other} of no job",
        "commits": _distinct(used, lambda record: record["commit"]),
        "code": _distinct(used, lambda record: record["code"]),
        "hardware": _distinct(used, lambda record: _words(record["hardware"])),
        "versions": _distinct(used, lambda record: _words(record["versions"])),
    }
    terms = "".join(f"<dt>{name}</dt><dd>{_text(fact)}</dd>" for name, fact in facts.items())
    return f"<p>This command makes the page:</p><pre>{_text(command)}</pre><dl>{terms}</dl>"


def _distinct(records: Sequence[Record], pick: Any) -> str:
    """The distinct values that records have; older records may have none."""
    found = dict.fromkeys(pick(record) for record in records if "commit" in record)
    return "; ".join(found) or "unknown"


def _words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def _settings(panel: Panel) -> str:
    """The recipe, and the settings of each method."""
    recipe = {name: value for name, value in panel.settings.items() if value != []}
    methods = {group.method: group.records[0].get("method", {}) for group in panel.groups}
    texts = {name: json.dumps(found, ensure_ascii=False) for name, found in methods.items()}
    terms = "".join(
        f"<dt>{_text(name)}</dt><dd><code>{_text(text)}</code></dd>" for name, text in texts.items()
    )
    folded = _folded("Settings of each method", f"<dl>{terms}</dl>")
    return f"<h3>{_text(panel.title)}</h3><p>{_text(_words(recipe))}</p>{folded}"


def _figures(
    panels: Sequence[Panel], drawn: Mapping[str, Mapping[str, str]], kind: str, caption: str
) -> str:
    """One figure for each panel, side by side if there is room."""
    parts = []
    for panel in panels:
        if kind in drawn[panel.title]:
            label = _text(f"{caption}: {panel.title}")
            svg = drawn[panel.title][kind].replace(
                "<svg", f'<svg role="img" aria-label="{label}"', 1
            )
            parts.append(f"<figure>{svg}</figure>")
    return f'<div class="figures">{"".join(parts)}</div>'


def _scroll(grid: Grid) -> str:
    """A table that scrolls in its box if the window is narrow."""
    caption = f'<p class="note">{_text(grid.caption)}</p>' if grid.caption else ""
    label = _text(grid.title)
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{grid.html()}</div>'
    return f"<h3>{label}</h3>{box}{caption}"


def _css() -> str:
    names = {"paper": style.PAPER, "ink": style.INK, "muted": style.MUTED, "rule": style.RULE}
    names["link"] = style.BLUE
    light = ";".join(f"--{name}:{color}" for name, color in names.items())
    dark = ";".join(f"--{name}:{style.DARK[color]}" for name, color in names.items())
    return _CSS.replace("LIGHT", light).replace("DARK", dark) + figures.dark_rules()


def _text(text: str) -> str:
    return html.escape(text)
