"""The channel graph is that of the units: written out edge by edge, or by hand."""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dpai_jax as dpai
from dpai_jax.paths.channels import Channels, channels
from tests.support.graphs import SAME, Shapes, residual
from tests.support.networks import by_name
from tests.support.reference import Graph, JaxLayers, Layers, Network

Edges = set[tuple[Any, Any]]


def grouped(layers: Layers, x: Any) -> Any:
    """Groups of features, and depthwise ones."""
    x = layers.conv("0", x, SAME)
    x = layers.conv("1", x, SAME, groups=2)
    x = layers.conv("depthwise", x, SAME, groups=x.shape[-1])
    return layers.conv("last", x)


def concatenated(layers: Layers, x: Any) -> Any:
    """A transposed convolution beside what was there before; two outputs in one."""
    skip = layers.conv("stem", x, SAME)
    x = layers.conv("up", layers.conv("down", skip, SAME, stride=2), ((1, 2), (1, 2)), spread=2)
    x = layers.numpy.concatenate([x, skip], axis=-1)
    return layers.numpy.concatenate([layers.conv("last", x), skip], axis=-1)


NETWORKS: dict[Network, tuple[Shapes, tuple[int, ...], dict[str, int]]] = {
    residual: (
        {
            "stem": (3, 3, 2, 3),
            "0": (3, 3, 3, 2),
            "1": (3, 3, 2, 3),
            "2": (3, 3, 3, 4),
            "3": (3, 3, 4, 4),
            "shortcut": (1, 1, 3, 4),
            "head": (4 * 4, 2),
        },
        (1, 8, 8, 2),
        {},
    ),
    grouped: (
        {
            "0": (3, 3, 2, 4),
            "1": (3, 3, 2, 6),
            "depthwise": (3, 3, 1, 12),
            "last": (1, 1, 12, 2),
        },
        (1, 4, 4, 2),
        {"1": 2, "depthwise": 6},
    ),
    concatenated: (
        {"stem": (3, 3, 2, 3), "down": (3, 3, 3, 4), "up": (3, 3, 4, 2), "last": (1, 1, 5, 2)},
        (1, 4, 4, 2),
        {},
    ),
}


def ends_of(weight: Any, shapes: Shapes, groups: dict[str, int]) -> tuple[Any, Any]:
    """The features that a weight joins, by the name of its kernel."""
    name, (*_, i, o) = weight
    inputs, outputs = shapes[name][-2:]
    return (name, o // (outputs // groups.get(name, 1)) * inputs + i), (name, o)


def by_hand(
    graph: Graph, shapes: Shapes, groups: dict[str, int]
) -> tuple[Edges, set[Any], set[Any]]:
    """Edges from feature to feature, those the input enters, and those the output reads."""
    onward, holds, reads = defaultdict(set), defaultdict(set), defaultdict(set)
    for a, b, weight in graph.edges:
        if weight is None:
            onward[a].add(b)
        else:
            read, written = ends_of(weight, shapes, groups)
            reads[a].add(read)
            holds[b].add(written)
    for unit in graph.inputs.flat:
        holds[unit].add("input")
    # Units are numbered in the order in which values are made.
    for unit in sorted({*holds, *onward}):
        for after in onward[unit]:
            holds[after] |= holds[unit]
    edges = {(w, r) for unit in list(holds) for w in holds[unit] for r in reads[unit]}
    left = set().union(*(holds[unit] for unit in graph.outputs.flat))
    inner = {(w, r) for w, r in edges if w != "input"}
    return inner, {r for w, r in edges if w == "input"}, left


def features(names: list[str], sizes: list[int]) -> list[tuple[str, int]]:
    return [(name, i) for name, size in zip(names, sizes, strict=True) for i in range(size)]


def named(
    net: dpai.Network, graph: Channels
) -> tuple[list[str], list[tuple[str, int]], list[tuple[str, int]]]:
    """The kernels' names; and of the features read and written, name and number."""
    ends = np.cumsum([layer.size for layer in net.layers])
    first = [k[k >= 0].min() for k in graph.kernels]
    names = [net.layers[i].name for i in np.searchsorted(ends, first, "right")]
    read = features(names, [k.shape[0] * k.shape[1] for k in graph.kernels])
    return names, read, features(names, [k.shape[0] * k.shape[2] for k in graph.kernels])


def found(net: dpai.Network, graph: Channels) -> tuple[Edges, set[Any], set[Any]]:
    _, read, written = named(net, graph)
    edges = {(written[w], read[r]) for w, r in zip(graph.written, graph.read, strict=True)}
    entered = {read[i] for i in np.flatnonzero(graph.entered)}
    return edges, entered, {written[i] for i in np.flatnonzero(graph.left)}


def traced(fn: Any, shapes: Shapes, shape: tuple[int, ...], **arguments: Any) -> dpai.Network:
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return dpai.trace(fn, params, jax.ShapeDtypeStruct(shape, jnp.float32), **arguments)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_graph_is_that_of_the_units(network):
    shapes, shape, groups = NETWORKS[network]
    net = traced(lambda params, x: network(JaxLayers(params), x), shapes, shape)
    units = Graph(network, shapes, shape)
    graph = channels(net)
    assert found(net, graph) == by_hand(units, shapes, groups)

    starts = np.cumsum([0, *(layer.size for layer in net.layers[:-1])])
    first = {layer.name: start for layer, start in zip(net.layers, starts, strict=True)}
    names, _, _ = named(net, graph)
    for name, kernel in zip(names, graph.kernels, strict=True):
        numbers = np.arange(kernel.size).reshape(shapes[name]) + first[name]
        for index in np.ndindex(*shapes[name]):
            (_, r), (_, w) = ends_of((name, index), shapes, groups)
            group, i = divmod(r, kernel.shape[1])
            tap = np.ravel_multi_index(index[:-2], shapes[name][:-2]) if index[:-2] else 0
            assert kernel[group, i, w % kernel.shape[2], tap] == numbers[index]


def every(a: str, b: str, pairs: Any) -> Edges:
    return {((a, i), (b, j)) for i, j in pairs}


def same(a: str, b: str, size: int) -> Edges:
    return every(a, b, ((i, i) for i in range(size)))


def test_attention_reads_queries_and_keys_of_its_head_and_the_value_itself():
    heads, width = 2, 3

    def fn(p, x):
        q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in ("q", "k", "v"))
        logits = jnp.einsum("shk,thk->hst", q, k)
        values = jnp.einsum("hst,thk->shk", jax.nn.softmax(logits), v)
        return jnp.einsum("shk,hkd->sd", values, p["out"])

    kernel = (5, heads, width)
    net = traced(fn, {"q": kernel, "k": kernel, "v": kernel, "out": (heads, width, 4)}, (6, 5))
    edges, entered, left = found(net, channels(net))
    n = heads * width
    of_head = [(i, j) for i in range(n) for j in range(n) if i // width == j // width]
    assert edges == every("q", "out", of_head) | every("k", "out", of_head) | same("v", "out", n)
    assert entered == {(name, i) for name in "qkv" for i in range(5)}
    assert left == {("out", i) for i in range(4)}


def test_gates_transposed_kernels_and_normalisation():
    def fn(p, x):
        y = (x @ p["a"]) * jax.nn.sigmoid(x @ p["b"].T)
        y = (y - jnp.mean(y, -1, keepdims=True)) / jnp.std(y, -1, keepdims=True)
        return jax.nn.relu(y)[..., ::-1] @ p["c"]

    net = traced(fn, {"a": (3, 4), "b": (4, 3), "c": (4, 2)}, (1, 3))
    graph = channels(net)
    turned = [(i, 3 - i) for i in range(4)]
    assert found(net, graph)[0] == every("a", "c", turned) | every("b", "c", turned)
    b = graph.kernels[1]
    np.testing.assert_array_equal(b[0, :, :, 0], 12 + np.arange(12).reshape(4, 3).T)


def test_each_step_of_a_scan_is_a_use_of_its_own():
    def fn(p, x):
        x, states = lax.scan(lambda x, w: (x + jnp.tanh(x @ w),) * 2, x, p["stack"])
        return x @ p["head"], states

    net = traced(fn, {"stack": (3, 4, 4), "head": (4, 2)}, (1, 4))
    graph = channels(net)
    stack = np.arange(48).reshape(3, 1, 4, 4, 1)
    for kernel, step in zip(graph.kernels[:3], stack, strict=True):
        np.testing.assert_array_equal(kernel, step)
    pairs = set(zip(graph.written.tolist(), graph.read.tolist(), strict=True))
    later = [(a, b) for a in range(4) for b in range(4) if a < b]
    assert pairs == {(4 * a + i, 4 * b + i) for a, b in later for i in range(4)}
    np.testing.assert_array_equal(graph.entered, np.ones(16, bool))
    np.testing.assert_array_equal(graph.left, np.ones(14, bool))


def test_a_loop_run_by_scan_has_the_graph_of_the_one_written_out():
    (fn, params, x), (unrolled, _, _) = (
        by_name(f"plain/lstm_{kind}").make() for kind in ("scanned", "unrolled")
    )
    a, b = (channels(dpai.trace(f, params, x)) for f in (fn, unrolled))
    read, written = uses(a)
    other_read, other_written = uses(b)
    # The head reads all steps at once, or each for itself: its features are the same.
    assert len(a.kernels) == len(b.kernels)
    assert set(zip(written[a.written], read[a.read], strict=True)) == set(
        zip(other_written[b.written], other_read[b.read], strict=True)
    )
    assert len(a.written) == len(b.written)


def uses(graph: Channels) -> tuple[np.ndarray, np.ndarray]:
    n = range(len(graph.kernels))
    shapes = [k.shape for k in graph.kernels]
    return np.repeat(n, [s[0] * s[1] for s in shapes]), np.repeat(n, [s[0] * s[2] for s in shapes])


def test_a_kernel_used_twice_is_passed_twice():
    net = traced(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": (3, 3)}, (1, 3))
    graph = channels(net)
    assert len(graph.kernels) == 2
    assert set(zip(graph.written, graph.read, strict=True)) == {(i, 3 + i) for i in range(3)}
    np.testing.assert_array_equal(graph.entered, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(graph.left, [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("mapped", [False, True])
def test_a_tied_table_of_tokens_is_entered_at_every_token(mapped):
    def embed(table, ids):
        return jax.vmap(lambda i: table[i])(ids) if mapped else table[ids]

    def fn(p, ids):
        return jnp.tanh(embed(p["table"], ids) @ p["mix"]) @ p["table"].T

    params = {"table": jnp.ones((5, 3)), "mix": jnp.ones((3, 3))}
    net = dpai.trace(fn, params, jnp.zeros((2, 4), jnp.int32))
    graph = channels(net)
    assert [k.shape for k in graph.kernels] == [(1, 5, 3, 1), (1, 3, 3, 1), (1, 3, 5, 1)]
    table, _, head = (kernel[0, :, :, 0] for kernel in graph.kernels)
    np.testing.assert_array_equal(table.T, head)
    np.testing.assert_array_equal(graph.entered, [1] * 5 + [0] * 6)
    pairs = {(i, 5 + i) for i in range(3)} | {(3 + i, 8 + i) for i in range(3)}
    assert set(zip(graph.written, graph.read, strict=True)) == pairs


def test_weights_that_nobody_prunes_let_paths_pass():
    def fn(p, x):
        x = jnp.tanh(x @ p["first"])
        x = jnp.tanh(x @ jnp.concatenate([p["pruned"], p["fixed"]], axis=1))
        return x @ p["last"]

    shapes = {"first": (3, 4), "pruned": (4, 2), "fixed": (4, 3), "last": (5, 2)}
    net = traced(fn, shapes, (1, 3), prunable=lambda name, leaf: name != "fixed")
    graph = channels(net)
    assert np.all(graph.kernels[1][0, :, 2:] == -1)
    through = every("first", "last", ((i, o) for i in range(4) for o in (2, 3, 4)))
    # The kernel of both holds five output features, three of which no weight to prune writes.
    beside = same("first", "pruned", 4) | same("pruned", "last", 5)
    assert found(net, graph)[0] == through | beside


def test_weights_that_a_constant_takes_away_are_none():
    triangle = np.tril(np.ones((3, 3), np.float32))
    net = traced(lambda p, x: x @ (p["w"] * triangle), {"w": (3, 3)}, (1, 3))
    (kernel,) = channels(net).kernels
    np.testing.assert_array_equal(kernel[0, :, :, 0] >= 0, triangle)


def test_graph_turned_round_twice_is_the_same():
    shapes, shape, _ = NETWORKS[grouped]
    net = traced(lambda params, x: grouped(JaxLayers(params), x), shapes, shape)
    graph = channels(net)
    again = graph.reversed().reversed()
    assert found(net, again) == found(net, graph)
    for a, b in zip(again.kernels, graph.kernels, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name",
    ["haiku/densenet", "equinox/encoder", "nnx/stacked_layers", "plain/wavenet"],
)
def test_weights_between_dead_ends_are_those_that_no_path_passes(name):
    """The search by gradients, of `effective_weights`, finds the same weights."""
    fn, params, x = by_name(name).make()
    net = dpai.trace(fn, params, x)
    ones = [np.ones(layer.shape, bool) for layer in net.layers]
    effective = dpai.effective_weights(net, net.tree(ones, lambda: np.True_))
    kept = np.concatenate([np.asarray(e).ravel() for e in net.leaves(effective)])
    kernels = channels(net).without_dead_ends().kernels
    numbers = np.unique(np.concatenate([k.ravel() for k in kernels]))
    in_graph = np.zeros(net.size, bool)
    in_graph[numbers[numbers >= 0]] = True
    np.testing.assert_array_equal(kept & ~in_graph, False)
    # Of a tap that only ever reads padding the graph knows nothing.
    taps = np.concatenate([np.full(layer.size, len(layer.taps) > 0) for layer in net.layers])
    np.testing.assert_array_equal(in_graph & ~kept & ~taps, False)


def test_dead_ends_are_left_out():
    def fn(p, x):
        y = jnp.tanh(x @ p["a"])
        dead = jnp.argmax(y @ p["b"])
        return y[..., :2] @ p["c"] + dead.astype(jnp.float32)

    net = traced(fn, {"a": (3, 4), "b": (4, 2), "c": (2, 3)}, (1, 3))
    graph = channels(net).without_dead_ends()
    _, b, _ = graph.kernels
    assert np.all(b == -1)
    np.testing.assert_array_equal(graph.kernels[0][0, :, :, 0] >= 0, [[1, 1, 0, 0]] * 3)
