"""Every public name has an example that runs, and the page of methods says what docstrings say."""

import dataclasses
import doctest
import inspect
import math
import re
from pathlib import Path

import optax
import pytest

import dpai_jax as dpai
from dpai_jax import methods

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
METHODS = sorted(
    name for name in methods.__all__ if dataclasses.is_dataclass(getattr(methods, name))
)
METHODS = [name for name in METHODS if hasattr(getattr(methods, name), "run")]


def section_of(name: str) -> str:
    """What the page of methods says under a heading."""
    (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return section


def row_of(name: str, head: str) -> str:
    (row,) = re.findall(rf"^\| {head} \| (.*) \|$", section_of(name), re.MULTILINE)
    return row


@pytest.mark.parametrize("name", dpai.__all__)
def test_a_public_name_has_an_example(name: str) -> None:
    """That it runs is tested where it stands, as `pytest` collects doctests."""
    found = getattr(dpai, name)
    parts = [getattr(found, part) for part in found.__all__] if inspect.ismodule(found) else [found]
    for part in parts:
        (own, *_) = doctest.DocTestFinder(recurse=False).find(inspect.unwrap(part), name)
        assert own.examples, part


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_methods_has_the_settings_of_a_method(name: str) -> None:
    said = dict(re.findall(r"`(\w+)=?([^`]*)`", row_of(name, "settings")))
    fields = {field.name: field for field in dataclasses.fields(getattr(dpai, name))}
    assert said.keys() == fields.keys()
    for setting, text in said.items():
        default = fields[setting].default
        if text:
            value = eval(text, {"math": math, "dpai": dpai, "optax": optax})
            # Two optimizers are never equal; `...` stands for one of DPaI's own.
            is_optimizer = isinstance(default, optax.GradientTransformation)
            assert value == default or (value is ... and is_optimizer)
        else:
            assert default is dataclasses.MISSING


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_methods_has_the_references_of_a_method(name: str) -> None:
    docstring = inspect.getdoc(getattr(dpai, name)) or ""
    references = " ".join(docstring.partition("References:")[2].split()).rstrip(".")
    assert references
    for reference in re.sub(r" \(ERK\)", "", references).split("; "):
        assert reference in row_of(name, "reference")


def test_the_page_of_methods_has_all_methods() -> None:
    linked = set(re.findall(r"\[(\w+)\]\(#\w+\)", PAGE))
    assert linked == set(METHODS)
