"""The documentation site is built without a warning, complete, and needs no network."""

import html.parser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import dpai_jax as dpai

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# What a page loads by itself, and not when its reader follows a link.
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}


class Page(html.parser.HTMLParser):
    """What a page has, links to and loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.text = path.read_text()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.formulas = 0
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.formulas += tag == "math"
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "manifest"):
            self.loads.append(given["href"])
        if tag in LOADS and LOADS[tag] in given:
            self.loads.append(given[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, with no way to a network."""
    folder = tmp_path_factory.mktemp("site")
    command = "-m sphinx -W --keep-going -q -c docs".split()
    command += ["-d", str(folder / "doctrees"), ".", str(folder / "site")]
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> list[Page]:
    return [Page(path) for path in sorted(site.rglob("*.html"))]


def page_of(pages: list[Page], end: str) -> Page:
    (page,) = [page for page in pages if page.path.as_posix().endswith(end)]
    return page


def test_every_document_and_notebook_has_a_page(site: Path) -> None:
    documents = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    documents += [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    for path in documents:
        assert (site / path.relative_to(ROOT)).with_suffix(".html").exists(), path
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


def test_pages_load_nothing_from_a_network(site: Path, pages: list[Page]) -> None:
    for page in pages:
        for load in page.loads:
            assert not re.match(r"(\w+:)?//", load), f"{page.path} loads {load}"
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s;]+)", sheet.read_text())
        assert not [url for url in urls if re.match(r"(https?:)?//", url)], sheet


def test_every_link_within_the_site_leads_somewhere(pages: list[Page]) -> None:
    by_path = {page.path: page for page in pages}
    for page in pages:
        for link in page.links:
            file, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", link) or link == "#":
                continue
            target = (page.path.parent / file).resolve() if file else page.path
            assert target.exists(), f"{page.path.name}: {link}"
            if anchor and target in by_path:
                assert anchor in by_path[target].ids, f"{page.path.name}: {link}"


def test_every_public_name_is_documented_once(pages: list[Page]) -> None:
    ids = [name for page in pages for name in page.ids if name.startswith("dpai_jax.")]
    for name in dpai.__all__:
        inside = getattr(getattr(dpai, name), "__all__", None)  # of a module
        for own in [name] if inside is None else [f"{name}.{part}" for part in inside]:
            assert ids.count(f"dpai_jax.{own}") == 1, own


def test_formulas_are_written_out_by_the_browser(pages: list[Page]) -> None:
    methods = page_of(pages, "docs/methods.html")
    source = (ROOT / "docs" / "methods.md").read_text()
    blocks = source.count("$$") // 2
    assert methods.formulas == blocks + len(re.findall(r"(?<!\$)\$(?!\$)", source)) // 2
    assert "$" not in re.sub(
        r"<script.*?</script>|<pre>.*?</pre>", "", methods.text, flags=re.DOTALL
    )
    for page in pages:
        assert not re.search(r"\\(frac|partial|theta|sum)\b", page.text), page.path


def test_a_notebook_shows_its_pictures(pages: list[Page]) -> None:
    quickstart = page_of(pages, "notebooks/01_quickstart.html")
    pictures = [load for load in quickstart.loads if load.endswith(".png")]
    assert len(pictures) >= 3
    assert all((quickstart.path.parent / picture).exists() for picture in pictures)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_search_answers_from_a_file(site: Path, tmp_path: Path) -> None:
    options = """--headless --no-sandbox --disable-gpu --no-first-run --disable-sync
        --disable-background-networking --disable-component-update --virtual-time-budget=10000
        --dump-dom""".split()
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path}", f"file://{site}/search.html?q=synflow"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = re.findall(
        r'<a href="([^"#?]+)[^"]*"[^>]*>', done.stdout.partition('class="search"')[2]
    )
    assert "docs/methods.html" in found
