"""The notebooks run from top to bottom, and what they keep is what a reader may see."""

import os
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A path of the machine that ran the notebook.
ABSOLUTE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|var|Users)/")


def outputs_of(notebook: Any) -> list[tuple[str, Any]]:
    """Each output of the code cells, with the cell's code."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [(cell.source, output) for cell in cells for output in cell.outputs]


def text_of(output: Any) -> str:
    data = output.get("data", {})
    shown = [output.get("text", ""), *(data.get(kind, "") for kind in ("text/plain", "text/html"))]
    return "".join(shown)


def kinds_of(notebook: Any) -> list[list[str]]:
    """What each code cell prints or shows, by kind."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kinds = {kind for o in cell.outputs for kind in o.get("data", {"text/plain": ""})}
            found.append(sorted(kinds))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning, and each cell shows what it showed when the notebook was kept."""
    # `make` puts the repository on the path of its environment.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Its reader has no simulated devices, on which it would train much longer.
    flags = os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", " ".join(f for f in flags if "device_count" not in f))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    kept = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=where).execute()
    assert kinds_of(notebook) == kinds_of(kept)
    for source, output in outputs_of(notebook):
        assert output.get("name") != "stderr", (source, output.text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_pictures_and_no_traces_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    outputs = outputs_of(notebook)
    assert any("image/png" in output.get("data", {}) for _, output in outputs)
    for source, output in outputs:
        assert output.output_type != "error", source
        assert output.get("name") != "stderr", source
        assert not ABSOLUTE.search(text_of(output)), source
    # A cell that was run again by hand would have another number.
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
