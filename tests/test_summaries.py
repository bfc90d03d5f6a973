"""A summary shows the topology's numbers: as text, as HTML, and by rich."""

import dataclasses
import html
import io
import re

import jax
import jax.numpy as jnp
import pytest
import rich.console

import dpai_jax as dpai


def two_layers(params, x):
    return jax.nn.relu(x @ params["first[0]"]) @ params["second<b>"]


@pytest.fixture(scope="module")
def result():
    params = {"first[0]": jnp.ones((20, 60)), "second<b>": jnp.ones((60, 30))}
    return dpai.prune(two_layers, params, jnp.ones((1, 20)), 0.97, method=dpai.Random())


@pytest.fixture(scope="module")
def cells(result):
    """The table that the topology's numbers make."""
    rows = []
    for layer in result.topology.layers:
        assert layer.dead == layer.weights - layer.effective
        density = f"{100 * layer.weights / layer.size:.2f}%"
        shape = "×".join(str(size) for size in layer.shape)
        nodes = f"{layer.nodes} of {layer.outputs}"
        numbers = [layer.effective, nodes, layer.kernels, layer.dead]
        rows.append([layer.name, shape, str(layer.weights), density, *map(str, numbers)])
    assert [row[:2] for row in rows] == [["first[0]", "20×60"], ["second<b>", "60×30"]]
    whole = result.topology
    numbers = [whole.effective, f"{whole.nodes} of 90", whole.kernels, whole.dead]
    return [*rows, ["all layers", "90", "3.00%", *map(str, numbers)]]


def words(line: str) -> list[str]:
    return [cell for cell in re.split(r"\s{2,}", line.strip()) if cell]


def test_as_text_a_summary_has_a_row_for_each_layer_and_the_totals_last(result, cells) -> None:
    title, headings, rule, *rows, last_rule, total, caption = str(result.summary()).splitlines()
    assert title == "Random at sparsity 0.97: 90 of 3,000 weights kept"
    assert words(headings) == [
        "layer",
        "shape",
        *"kept density effective nodes kernels dead".split(),
    ]
    assert set(rule) == set(last_rule) == {"-"}
    assert [words(row) for row in (*rows, total)] == cells
    assert caption.startswith(f"log-paths {result.topology.log_paths:.2f};")
    assert repr(result.summary()) == str(result.summary())
    assert str(result.topology).splitlines()[1:] == str(result.summary()).splitlines()[1:]


def test_in_a_notebook_a_summary_is_a_table_of_the_same_cells(result, cells) -> None:
    text = result.summary()._repr_html_()
    found = [
        [html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", row) if cell]
        for row in re.findall(r"<tr>(.*?)</tr>", text)
    ]
    assert found[1:] == cells
    assert "second<b>" not in text


def test_rich_shows_the_same_cells(result, cells) -> None:
    stream = io.StringIO()
    rich.console.Console(file=stream, width=120).print(result.summary())
    lines = [words(line) for line in stream.getvalue().splitlines()]
    for row in cells:
        assert row in lines


def test_a_loaded_result_has_the_same_summary(result, tmp_path) -> None:
    dpai.save(tmp_path / "file", result)
    loaded = dpai.load(
        tmp_path / "file", {"first[0]": jnp.ones((20, 60)), "second<b>": jnp.ones((60, 30))}
    )
    assert str(loaded.summary()) == str(result.summary())


def test_a_repaired_result_says_so(result) -> None:
    settings = {**result.settings, "repair": True}
    title = dataclasses.replace(result, settings=settings).summary().title
    assert title == "Random and repair at sparsity 0.97: 90 of 3,000 weights kept"


def test_reprs_fit_a_line(result) -> None:
    counts = (
        f"90 of 3,000 weights kept, {result.topology.effective} effective,"
        f" {result.topology.nodes} nodes, {result.topology.kernels} kernels"
    )
    paths = f"log_paths={result.topology.log_paths:.2f}"
    assert repr(result) == f"Result({counts}, {paths})"
    assert repr(result.topology) == f"Topology({counts}, {paths})"
    assert repr(result.topology.layers[0]).startswith("LayerTopology(first[0]: 42 of 1,200 weights")
    assert repr(result.net) == "Network(2 layers, 3,000 weights, gates='balanced')"
    assert repr(result.net.layers[0]) == "Layer(first[0], (20, 60), 20 to 60 features)"


def test_the_repr_of_a_layer_counts_taps_groups_and_copies() -> None:
    layer = dpai.Layer("a", 0, (2, 3, 3, 4, 16), (3,), (4,), (1, 2), (0,), 4)
    assert (
        repr(layer) == "Layer(a, (2, 3, 3, 4, 16), 16 to 16 features, 9 taps, 4 groups, 2 copies)"
    )
