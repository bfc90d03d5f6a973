"""What the documents show runs, and what they link to is there."""

import ast
import doctest
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import documents

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
END_OF_BLOCK = "=== end of block ==="
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_of(document: str) -> str:
    """A document's Python blocks, and the calls of its tables, as one script.

    Every line keeps its number. Where a block ends, the script says so.
    """
    lines = [""] * (document.count("\n") + 1)
    for block in FENCED.finditer(document):
        if block[2] == "python":
            first = document.count("\n", 0, block.start(3))
            code = re.sub(f"^{block[1]}", "", block[3], flags=re.MULTILINE).splitlines()
            lines[first : first + len(code)] = code
            lines[first + len(code)] = f"print({END_OF_BLOCK!r})"
    for number, call in calls_of(document):
        lines[number] = call
    return "\n".join(lines)


def calls_of(document: str) -> list[tuple[int, str]]:
    """The calls in the last column of tables that translate others' calls, by their lines."""
    calls, inside = [], False
    for number, line in enumerate(document.splitlines()):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        inside = line.startswith("| there | here |") or (inside and line.startswith("|"))
        if inside and (call := re.match(r"`([^`]+)`", cells[-1])):
            calls.append((number, call[1]))
    return calls


def outputs_of(document: str) -> list[str | None]:
    """For each Python block, what the document says that it prints: the block `text` behind it."""
    blocks = list(FENCED.finditer(document))
    outputs: list[str | None] = []
    for block, following in itertools.zip_longest(blocks, blocks[1:]):
        if block[2] == "python":
            shown = following and following[2] == "text"
            directly = shown and not document[block.end() : following.start()].strip()
            outputs.append(following[3] if directly else None)
    return outputs


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
    # What one document has compiled, the next need not.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split(f"{END_OF_BLOCK}\n")
    for wanted, got in zip(outputs_of(path.read_text()), printed, strict=False):
        assert wanted is None or doctest.OutputChecker().check_output(wanted, got, SAME), got


def test_the_messages_that_the_page_of_errors_lists_are_the_librarys() -> None:
    """Piece by piece, with `...` for what differs from call to call."""
    said = "\n".join(message for path in ROOT.glob("dpai_jax/**/*.py") for message in texts(path))
    page = (ROOT / "docs" / "errors.md").read_text()
    listed = re.findall(r"^\| `([^`]+)` \|", page.partition("## When tracing")[2], re.MULTILINE)
    messages = [message for message in listed if not message.startswith("result.")]
    assert len(messages) > 10
    for message in messages:
        for piece in filter(None, (piece.strip() for piece in message.split("..."))):
            assert piece in said, message


def texts(path: Path) -> list[str]:
    """The texts in a file of Python; those with values in them without these."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


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
