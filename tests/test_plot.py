"""What is drawn equals the topology's numbers, and paths found by a graph search."""

import dataclasses
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pytest

import dpai_jax as dpai
from dpai_jax.plot import style
from dpai_jax.plot.graph import graph_of

SIZES = {"stem": (4, 6), "a": (6, 5), "b": (5, 6), "head": (6, 3)}


def residual(params, x):
    h = jax.nn.relu(x @ params["stem"])
    h = h + jax.nn.relu(h @ params["a"]) @ params["b"]
    return h @ params["head"]


def convolutional(params, x):
    """A convolution, a depthwise one, and a dense layer on the flattened map."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=dims)
    x = jax.lax.conv_general_dilated(
        x, params["depthwise"], (1, 1), "VALID", dimension_numbers=dims, feature_group_count=4
    )
    return x.reshape(1, -1) @ params["dense"]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def result():
    params = {name: jnp.ones(shape) for name, shape in SIZES.items()}
    return dpai.prune(
        residual, params, jnp.ones((1, 4)), 0.72, method=dpai.Random(), key=jax.random.key(5)
    )


@pytest.fixture
def ascended(result):
    history = {
        "log_paths": np.asarray([-np.inf, 2.0, 4.5]),
        "nodes": np.asarray([10, 20, 15]),
        "kernels": np.asarray([7, 8, 9]),
    }
    return dataclasses.replace(result, history=history)


@pytest.fixture(scope="module")
def of_images():
    params = {
        "conv": jnp.ones((3, 3, 2, 4)),
        "depthwise": jnp.ones((2, 2, 1, 4)),
        "dense": jnp.ones((36, 3)),
    }
    return dpai.prune(
        convolutional, params, jnp.ones((1, 4, 4, 2)), 0.9,
        method=dpai.Random(), key=jax.random.key(1),
    )  # fmt: skip


def paths_of(masks):
    """Every path of the residual network, by a search on a graph drawn by hand."""
    graph = nx.DiGraph()
    joined = {
        "stem": [("x", "stem")],
        "a": [("stem", "a")],
        "b": [("a", "b")],
        "head": [("stem", "head"), ("b", "head")],
    }
    for layer, blocks in joined.items():
        for source, target in blocks:
            # The sum holds feature i of the stem and feature i of b.
            graph.add_edges_from(
                ((source, int(i)), (target, int(o)))
                for i, o in np.argwhere(np.asarray(masks[layer]))
            )
    ends = [("head", o) for o in range(3) if ("head", o) in graph]
    starts = [("x", i) for i in range(4) if ("x", i) in graph]
    found = [path for i in starts for path in nx.all_simple_paths(graph, i, ends)]
    return graph, starts, found


def units_of(graph):
    """The units of a drawn graph, as the search names them."""
    names = ["x" if name == "input" else name for name in graph.names]
    first = [int(np.flatnonzero(graph.block == block)[0]) for block in range(len(names))]
    return [(names[block], i - first[block]) for i, block in enumerate(graph.block)]


def test_a_small_network_is_drawn_with_the_paths_that_a_search_finds(result) -> None:
    graph, starts, found = paths_of(result.masks)
    drawn = graph_of(result.net, result.masks)
    units = units_of(drawn)
    assert len(found) > 10
    for unit, count, alive in zip(units, drawn.paths, drawn.alive, strict=True):
        arriving = [
            path
            for start in starts
            for path in nx.all_simple_paths(graph, start, unit)
            if unit in graph
        ]
        assert count == (1 if unit[0] == "x" else len(arriving)), unit
        assert alive == any(unit in path for path in found), unit
    assert {(units[a], units[b]) for a, b in zip(drawn.source, drawn.target, strict=True)} == set(
        graph.edges
    )
    for a, b, share, effective in zip(
        drawn.source, drawn.target, drawn.share, drawn.effective, strict=True
    ):
        edge = (units[a], units[b])
        passing = [path for path in found if edge in itertools.pairwise(path)]
        assert share == pytest.approx(len(passing) / len(found), abs=1e-6), edge
        assert effective == bool(passing), edge


def test_units_show_their_paths_and_edges_their_share(result) -> None:
    drawn = graph_of(result.net, result.masks)
    ax = dpai.plot.flow(result)
    by_label = {collection.get_label(): collection for collection in ax.collections}
    assert not drawn.alive.all()
    colors = mpl.colors.to_rgba_array(
        [style.BLUE if alive else style.RULE for alive in drawn.alive]
    )
    np.testing.assert_array_equal(by_label["units"].get_facecolors(), colors)
    places = [tuple(place) for place in by_label["units"].get_offsets()]
    counts = {text.get_position(): text.get_text() for text in ax.texts}
    assert [counts[place] for place in places] == [f"{count:.0f}" for count in drawn.paths]
    widths = np.asarray(by_label["paths"].get_linewidths())
    shares = drawn.share[drawn.effective]
    np.testing.assert_allclose(np.corrcoef(widths, shares)[0, 1], 1.0)
    assert widths.argmax() == shares.argmax()
    assert len(by_label["dead"].get_paths()) == np.count_nonzero(~drawn.effective)
    texts = [text.get_text() for text in ax.texts]
    for layer in result.topology.layers:
        assert layer.name in texts
        assert f"{layer.nodes} of {layer.outputs}" in texts


def test_units_of_convolutions_are_as_many_as_the_topology_says(of_images) -> None:
    drawn = graph_of(of_images.net, of_images.masks)
    alive = dict(zip(drawn.names, np.bincount(drawn.block, drawn.alive), strict=True))
    for layer in of_images.topology.layers:
        assert alive[layer.name] == layer.nodes, layer.name
    # Every path passes each of the layers once.
    for target in range(1, len(drawn.names)):
        into = drawn.block[drawn.target] == target
        assert drawn.share[into].sum() == pytest.approx(1, abs=1e-5)


def test_a_larger_network_is_drawn_as_a_band_as_wide_as_its_nodes(result) -> None:
    ax = dpai.plot.flow(result, units=False)
    outputs, nodes = ([bar.get_height() for bar in bars] for bars in ax.containers)
    layers = result.topology.layers
    assert outputs == [layer.outputs for layer in layers] == [6, 5, 6, 3]
    assert nodes == [layer.nodes for layer in layers]


def test_the_density_of_each_layer_is_drawn(result) -> None:
    ax = dpai.plot.density(result)
    kept, alive = (line.get_xdata() for line in ax.lines)
    layers = result.topology.layers
    np.testing.assert_allclose(kept, [layer.weights / layer.size for layer in layers])
    np.testing.assert_allclose(alive, [layer.effective / layer.size for layer in layers])
    assert [label.get_text() for label in ax.get_yticklabels()] == list(SIZES)


def test_a_layer_without_paths_is_named_in_the_picture_of_densities(result) -> None:
    masks = {**result.masks, "a": np.zeros((6, 5), bool)}
    ax = dpai.plot.density(dpai.topology(result.net, masks))
    (_, alive) = (line.get_xdata() for line in ax.lines)
    assert [text.get_text() for text in ax.texts] == ["no path"] * 2
    assert list(np.isnan(alive)) == [False, True, True, False]


def test_the_history_is_drawn_as_shares_of_the_highest_values(ascended) -> None:
    ax = dpai.plot.history(ascended)
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    gap, *log_paths = drawn.pop("log-paths: -inf → 4.5")
    assert np.isnan(gap)  # there was no path
    assert log_paths == [2.0 / 4.5, 1.0]
    assert drawn == {
        "effective nodes: 10 → 15": [0.5, 1.0, 0.75],
        "effective kernels: 7 → 9": [7 / 9, 8 / 9, 1.0],
    }


def test_the_mask_of_a_layer_is_drawn_with_its_taps_summed(of_images) -> None:
    ax = dpai.plot.masks(of_images, "conv")
    mask = np.asarray(of_images.masks["conv"])
    alive = np.asarray(dpai.effective_weights(of_images.net, of_images.masks)["conv"])
    expected = mask.sum((0, 1))
    np.testing.assert_array_equal(ax.images[0].get_array().filled(0), expected)
    dead = (expected > 0) & ~alive.any((0, 1))
    assert dead.any()
    np.testing.assert_array_equal(ax.images[1].get_array().filled(False), dead)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("output", "input")


def test_of_a_grouped_layer_the_inputs_of_a_group_are_drawn(of_images) -> None:
    ax = dpai.plot.masks(of_images.net, "depthwise", of_images.masks)
    expected = np.asarray(of_images.masks["depthwise"]).sum((0, 1))
    assert expected.shape == (1, 4)
    np.testing.assert_array_equal(ax.images[0].get_array().filled(0), expected)


def test_pictures_are_drawn_where_they_are_told_to(result, ascended) -> None:
    _, grid = plt.subplots(2, 2)
    corners = grid.ravel()
    assert dpai.plot.density(result, ax=corners[0]) is corners[0]
    assert dpai.plot.history(ascended, ax=corners[1]) is corners[1]
    assert dpai.plot.masks(result, "a", ax=corners[2]) is corners[2]
    assert dpai.plot.flow(result, ax=corners[3], units=False) is corners[3]
    assert len(plt.get_fignums()) == 1


def test_names_are_shown_without_what_all_of_them_share() -> None:
    assert style.short_names(["params/a/kernel", "params/b/c/kernel"]) == ["a", "b/c"]
    assert style.short_names(["params/a/kernel", "params/b/weight"]) == ["a/kernel", "b/weight"]
    assert style.short_names(["params/a"]) == ["params/a"]


def test_without_matplotlib_a_sentence_says_what_to_install(result, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'dpai_jax[show]'")):
        dpai.plot.density(result)


BAD = {
    "a result is wanted": (lambda r: dpai.plot.density(3), "result must be a Result or a Topology"),
    "a history is wanted": (lambda r: dpai.plot.history(r), "but Random measured nothing"),
    "a layer is wanted": (
        lambda r: dpai.plot.masks(r, "c"),
        "layer must be one of stem, a, b, head",
    ),
    "masks are wanted": (lambda r: dpai.plot.flow(r.net), "masks must be given"),
    "a source is wanted": (lambda r: dpai.plot.flow("net"), "source must be a Result or a Network"),
    "a flag is wanted": (lambda r: dpai.plot.flow(r, units=2), "units must be True or False"),
    "a network is wanted": (
        lambda r: dpai.plot.flow(dataclasses.replace(r, net=None)),
        "source must have its network, but a loaded result has none",
    ),
}


@pytest.mark.parametrize(("draw", "sentence"), BAD.values(), ids=list(BAD))
def test_bad_input_gets_a_sentence(draw, sentence, result) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        draw(result)
