"""The documentation site, made by Sphinx; `make docs` builds it in build/site.

Its sources are docs/, notebooks/, CHANGELOG.md and CONTRIBUTING.md as they stand, so that links
between them work on GitHub and on the site alike; hence the source folder is the repository. What
GitHub would show as clutter is added here while a page is read: the navigation, and in place of

    <!-- autodoc: prune Result -->

the docstrings of these names. Nothing is loaded from a network, neither now nor by a reader.
"""

import importlib
import inspect
import re
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dpai_jax as dpai  # noqa: E402

logger = logging.getLogger(__name__)
_setup = ConfigParser()
_setup.read(ROOT / "setup.cfg")

project = "dpai_jax"
release = version = _setup["metadata"]["version"]

root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "CHANGELOG.md", "CONTRIBUTING.md"]
# Also keeps Sphinx from searching folders of thousands of files.
exclude_patterns = [".*", "build", "data", "runs", "dpai_jax", "experiments", "tests"]
nitpicky = True

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The tests run notebooks; the site shows what they have printed.
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# As parameters, not as attributes that repeat the class's own.
napoleon_custom_sections = [("Attributes", "params_style")]
# What stands in single backticks links to what has this name, and is code otherwise.
default_role = "py:obj"

html_theme = "furo"
html_title = f"dpai_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_show_copyright = False
pygments_dark_style = "github-dark"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

AUTODOC = re.compile(r"<!-- autodoc: (.*?) -->", re.DOTALL)

NAVIGATION = {
    "Start": ["tutorial", "idea", "choosing", "coming_from"],
    "Use": "methods paths structure compact errors devices performance extending api".split(),
    "Notebooks": [f"/notebooks/{path.stem}" for path in sorted(ROOT.glob("notebooks/*.ipynb"))],
    "Research": ["experiments", "evidence", "data", "tests"],
    "Project": ["/CHANGELOG", "/CONTRIBUTING"],
}

# A page that has no place above comes after those on use.
_placed = {"index", *(page for pages in NAVIGATION.values() for page in pages)}
NAVIGATION["Use"] += sorted({path.stem for path in ROOT.glob("docs/*.md")} - _placed)

LANDING = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>dpai_jax</title>
<meta http-equiv="refresh" content="0; url=docs/index.html">
</head>
<body><a href="docs/index.html">dpai_jax</a></body>
</html>
"""


def _toctree(pages: list[str], caption: str = "") -> str:
    options = [":hidden:", ":maxdepth: 2", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def _public_names() -> list[str]:
    """The library's public names; in place of a module, the names in it."""
    names = []
    for name in dpai.__all__:
        found = getattr(dpai, name)
        inside = [f"{name}.{own}" for own in found.__all__] if inspect.ismodule(found) else [name]
        names += [f"dpai_jax.{own}" for own in inside]
    return names


def _listed(text: str) -> list[str]:
    """The names that a page documents."""
    names = " ".join(AUTODOC.findall(text)).split()
    return [name if name.startswith("dpai_jax.") else f"dpai_jax.{name}" for name in names]


def _unlisted() -> list[str]:
    """The public names that no page has yet."""
    pages = [path.read_text() for path in ROOT.glob("docs/api/*.md")]
    listed = {name for page in pages for name in _listed(page)}
    return [name for name in _public_names() if name not in listed]


def _directives(names: list[str]) -> str:
    """The directives that document some names."""
    blocks = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        if inspect.isclass(found):
            blocks += [f".. autoclass:: {name}", *_members(found), ""]
        else:
            blocks += [f".. autofunction:: {name}", ""]
    return "\n".join(["```{eval-rst}", *blocks, "```"])


def _members(found: type) -> list[str]:
    """The option that shows a class's methods and properties, but for what all methods have."""
    shown = [
        name
        for name, member in vars(found).items()
        if not name.startswith("_")
        and name not in getattr(found, "__dataclass_fields__", ())
        and (found is dpai.Method or not hasattr(found, "run"))
        and getattr(member, "__doc__", None)
    ]
    shown += ["published"] if hasattr(found, "published") else []
    return [f"   :members: {', '.join(shown)}"] if shown else []


def add_to_page(_app: Sphinx, page: str, source: list[str]) -> None:
    """Adds to a page's source what only the site shows."""
    if page == root_doc:
        source[0] += "".join(_toctree(pages, title) for title, pages in NAVIGATION.items())
    elif page == "docs/api":
        source[0] += _toctree([f"api/{path.stem}" for path in sorted(ROOT.glob("docs/api/*.md"))])
        if names := _unlisted():
            source[0] += f"\n## More\n\n{_directives(names)}\n"
    text = AUTODOC.sub(lambda match: _directives(_listed(match[0])), source[0])
    # A folder is a link on GitHub alone.
    folder = (ROOT / page).parent

    def without_folders(match: re.Match[str]) -> str:
        return match[1] if (folder / match[2]).is_dir() else match[0]

    source[0] = re.sub(r"\[([^\]]+)\]\(([^()\s#]+)\)", without_folders, text)


def escape(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Makes a docstring's |θ| a magnitude: to Sphinx it would be a name to substitute."""
    in_code, literal = False, False
    for i, line in enumerate(lines):
        if not line.strip():
            in_code = False
        elif line.lstrip().startswith(">>>"):
            in_code = True
        indented = line.startswith("    ") or not line.strip()
        literal = literal and indented
        if not in_code and not literal:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)
        literal = literal or line.endswith("::")


def plain_defaults(
    _app: Sphinx,
    _what: str,
    _name: str,
    _obj: Any,
    _options: Any,
    signature: str | None,
    result: str | None,
) -> tuple[str, str | None] | None:
    """Writes defaults of settings as names."""
    if signature is None:
        return None
    return re.sub(r"<function (\w+)>", r"\1", signature), result


def link(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Links the library's own types by their public names; other names stand without a link."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if target.startswith("dpai_jax."):
        public = "dpai_jax." + target.rpartition(".")[2]
        python = env.domains["py"]
        found: nodes.Node | None = python.resolve_xref(
            env, node["refdoc"], app.builder, "obj", public, node, content
        )
        if found is not None or target.rpartition(".")[2] in dpai.__all__:
            return found
    return content


def mathml(translator: Any, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers lay out by themselves."""
    block = isinstance(node, nodes.math_block)
    text = node.astext()
    if block and r"\\" in text and r"\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    try:
        formula = tex2mathml(text, as_block=block)
        # Between a function's name and what it is of.
        named = r"(<mi>(?:log|tanh)</mi>\s*)(<m(?:i|sub|row)>)"
        formula = re.sub(named, r'\1<mspace width="0.1667em"></mspace>\2', formula)
    except MathError as error:
        logger.warning("%s in the formula %s", error, text, location=node)
        formula = text
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def write_landing(app: Sphinx, error: Exception | None) -> None:
    """Makes index.html, which leads to the first page."""
    if error is None:
        (Path(app.outdir) / "index.html").write_text(LANDING)


def setup(app: Sphinx) -> None:
    """Connects the above."""
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("source-read", add_to_page)
    # Before napoleon, which knows nothing of magnitudes.
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("autodoc-process-signature", plain_defaults)
    app.connect("missing-reference", link)
    app.connect("build-finished", write_landing)
