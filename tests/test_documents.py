"""What the documents show runs, and what they link to is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import documents

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_of(document: str) -> str:
    """A document's Python blocks as one script, in which every line keeps its number."""
    lines = [""] * (document.count("\n") + 1)
    for block in FENCED.finditer(document):
        if block[2] == "python":
            first = document.count("\n", 0, block.start(3))
            code = re.sub(f"^{block[1]}", "", block[3], flags=re.MULTILINE).splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


def prose_of(document: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", document))


def headings_of(document: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ +(.*)$", FENCED.sub("", document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


SCRIPTS = {path: python_of(path.read_text()) for path in DOCUMENTS}
SHOWING_CODE = [path for path, script in SCRIPTS.items() if script.strip()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_the_tables_of_a_document_are_those_of_its_records(path: Path) -> None:
    """What `python -m experiments documents` writes is what stands there."""
    assert documents.updated(path) == path.read_text()


def test_the_readme_shows_code_in_six_kilobytes() -> None:
    assert ROOT / "README.md" in SHOWING_CODE
    assert len((ROOT / "README.md").read_bytes()) <= 6 * 1024


@pytest.mark.parametrize("path", SHOWING_CODE, ids=name_of)
def test_the_code_of_a_document_runs_in_a_process_of_its_own(path: Path, tmp_path: Path) -> None:
    script = tmp_path / f"code_of_{path.stem}.py"  # not the name of a package that it imports
    script.write_text(SCRIPTS[path])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_the_files_and_headings_that_a_document_links_to_exist(path: Path) -> None:
    document = path.read_text()
    links = re.findall(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose_of(document))
    for link in (markdown or html for markdown, html in links):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if heading:
            assert heading in headings_of(target.read_text()), link
