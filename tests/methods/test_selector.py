"""Selection again and again, as scores change: in chunks of layers as of all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpai_jax as dpai
from dpai_jax.methods import selector
from dpai_jax.methods.selector import LargeSelector, Selector
from dpai_jax.tools import host

# Six large layers of one shape, three of another, and small ones.
SHAPES = [(260, 260)] * 6 + [(260, 300), (300, 260)] * 3 + [(260, 5), (5, 7)]


def network():
    def fn(params, x):
        for kernel in params:
            x = jax.nn.relu(x @ kernel)
        return x

    params = [jnp.ones(shape) for shape in SHAPES]
    return dpai.trace(fn, params, jnp.ones((1, 260)))


def by_sorting(scores, keep):
    """The masks of the highest magnitudes of all layers, ties by index."""
    flat = np.concatenate([np.abs(np.asarray(s, np.float64)).ravel() for s in scores])
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    ends = np.cumsum([np.size(s) for s in scores])[:-1]
    pairs = zip(np.split(mask, ends), scores, strict=True)
    return [part.reshape(np.shape(s)) for part, s in pairs]


def moved(kind):
    """Scores as they change from step to step."""
    rng = np.random.default_rng(0)
    scores = [rng.standard_normal(shape, np.float32) for shape in SHAPES]
    for _ in range(4):
        if kind == "ties":
            yield [np.round(s * 4) / 4 for s in scores]
        elif kind == "equal":
            yield [np.full_like(s, -2.0) for s in scores]
        elif kind == "one layer":  # all that may be the threshold is in a single one
            levels = [np.sign(s) * (9 if i < 3 else 0) for i, s in enumerate(scores)]
            yield [*levels[:3], scores[3], *levels[4:]]
        else:
            yield scores
        scores = [s * np.float32(1.01) + np.float32(1e-3) for s in scores]


@pytest.mark.parametrize("kind", ["floats", "ties", "equal", "one layer"])
def test_chunks_are_searched_as_by_a_sort(kind):
    net = network()
    search = LargeSelector(net)
    for scores, share in zip(moved(kind), (1.0, 0.6, 0.3, 0.0), strict=True):
        keep = round(share * net.size)
        found = search.masks(list(map(jnp.asarray, scores)), np.uint32(keep))
        for mask, expected in zip(found, by_sorting(scores, keep), strict=True):
            np.testing.assert_array_equal(mask, expected)


# Layers by shape; of how many shapes the chunks are, and how many layers are compiled.
CHUNKS = {
    "a block": ({(260, 260): 12, (260, 300): 4, (300, 260): 4}, 1, 5),
    "a block, and others": ({(260, 260): 12, (260, 300): 4, (300, 260): 1, (300, 5): 1}, 2, 6),
    "one shape": ({(260, 260): 36}, 1, 1),
    "a prime number": ({(260, 260): 11}, 1, 1),
    "numbers without a common divisor": ({(260, 260): 9, (260, 300): 8}, 2, 9),
    "each of its own": ({(260, 260): 1, (260, 300): 1}, 1, 2),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_hold_all_layers_and_few_differ_in_shapes(name):
    numbers, n_kinds, n_compiled = CHUNKS[name]
    params = [jnp.ones(shape) for shape, number in numbers.items() for _ in range(number)]
    net = dpai.trace(
        lambda p, x: sum(jnp.sum(x[: w.shape[0]] @ w) for w in p), params, jnp.ones(300)
    )
    chunks = LargeSelector(net)._chunks
    places = [i for chunk in chunks for i in chunk.places]
    assert sorted(places) == list(range(len(params)))
    kinds = {tuple(params[i].shape for i in chunk.places) for chunk in chunks}
    assert len(kinds) == n_kinds
    assert sum(map(len, kinds)) == n_compiled


@pytest.mark.parametrize("kind", [Selector, LargeSelector])
def test_strengths_of_kept_weights_take_the_memory_of_those_before(kind):
    net = network()
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES]
    search = LargeSelector(net) if kind is LargeSelector else Selector(net, shapes, np.uint32(0))
    rng = np.random.default_rng(1)
    strengths = [rng.random(shape, np.float32) for shape in SHAPES]
    given = list(map(jnp.asarray, strengths))
    with host.compiled_only():
        before = list(map(jnp.copy, given))
        # A weight may come back.
        for scores, share in zip(moved("floats"), (1.0, 0.3, 0.5, 0.1), strict=True):
            keep = round(share * net.size)
            own = list(map(jnp.asarray, scores))
            found = search.weighed(before, given, own, np.uint32(keep))
            for x, mask, strength in zip(found, by_sorting(scores, keep), strengths, strict=True):
                np.testing.assert_array_equal(x, np.where(mask, strength, 0))
            assert all(x.is_deleted() for x in before)
            before = found


# Where the density falls the first of four selections keeps everything, as strengths as they are.
@pytest.mark.parametrize(
    ("settings", "searches"), [({}, 3), ({"strength": "one"}, 4), ({"schedule": "constant"}, 4)]
)
def test_a_large_network_is_pruned_as_if_it_were_small(monkeypatch, settings, searches):
    def fn(params, x):
        for kernel in params:
            x = jax.nn.relu(x @ kernel)
        return x

    rng = np.random.default_rng(2)
    params = [rng.standard_normal(shape, np.float32) for shape in SHAPES[:6]]
    how = {"method": dpai.DPaI(steps=3, **settings), "key": jax.random.key(1), "progress": False}
    x = jnp.ones((1, 260))
    expected = dpai.prune(fn, params, x, 0.9, **how)
    monkeypatch.setattr(selector, "_LARGE", 2**16)
    used = []
    search = LargeSelector._searched
    monkeypatch.setattr(LargeSelector, "_searched", lambda *args: used.append(1) or search(*args))
    found = dpai.prune(fn, params, x, 0.9, **how)
    assert len(used) == searches
    for name in ("masks", "scores", "history"):
        pair = (getattr(r, name) for r in (found, expected))
        jax.tree.map(np.testing.assert_array_equal, *pair)
