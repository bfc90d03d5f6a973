"""Selection by counting, held against a stable sort, and its cost in passes over the scores."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from dpai_jax import selection
from dpai_jax.selection import as_count, cut_of, kept, no_thresholds, select

INF = float("inf")
SHAPES = ((4, 5), (7,), (2, 3, 3))
SIZE = 45

# All draws of hypothesis go through these, each compiled once.
compiled = jax.jit(select, static_argnames="magnitude")


@functools.partial(jax.jit, static_argnames="magnitude")
def compiled_by_seven(*args: Any, magnitude: bool) -> Any:
    """`select` as if the scores were in no cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_IN_CACHE", 0)
        return select(*args, magnitude=magnitude)


def ranking(scores: np.ndarray, magnitude: bool = False) -> np.ndarray:
    """The order of flat scores from the highest on, ties by index."""
    scores = np.asarray(scores, np.float64)
    return np.argsort(-(np.abs(scores) if magnitude else scores), kind="stable")


def by_sorting(scores: np.ndarray, keep: int, magnitude: bool = False) -> np.ndarray:
    mask = np.zeros(scores.size, bool)
    mask[ranking(scores.ravel(), magnitude)[:keep]] = True
    return mask.reshape(scores.shape)


def by_sorting_together(
    scores: Sequence[np.ndarray], keep: int, magnitude: bool = False
) -> list[np.ndarray]:
    """The masks of the highest scores of all layers, ties by index, earlier layers first."""
    mask = by_sorting(np.concatenate([s.ravel() for s in scores]), keep, magnitude)
    ends = np.cumsum([s.size for s in scores])
    parts = zip(scores, np.split(mask, ends[:-1]), strict=True)
    return [part.reshape(s.shape) for s, part in parts]


def assert_masks(masks: Sequence[Any], expected: Sequence[np.ndarray]) -> None:
    assert len(masks) == len(expected)
    for mask, reference in zip(masks, expected, strict=True):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, reference)


VALUES = {
    # Threshold by threshold: hardly a tie, a few, most of them, all.
    "floats": st.floats(width=32, allow_nan=False),
    "few ties": st.integers(-40, 40).map(float),
    "many ties": st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, INF]),
    "all equal": st.just(-2.5),
}
some_values = pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
by_magnitude = pytest.mark.parametrize("magnitude", [False, True], ids=["signed", "magnitude"])


def drawn(data: st.DataObject, values: Any) -> list[np.ndarray]:
    return [data.draw(stnp.arrays(np.float32, shape, elements=values)) for shape in SHAPES]


@some_values
@by_magnitude
@given(st.data())
def test_each_layer_keeps_its_highest_scores(
    values: Any, magnitude: bool, data: st.DataObject
) -> None:
    scores = drawn(data, values)
    keep = [data.draw(st.integers(0, s.size)) for s in scores]
    masks, _ = compiled(scores, [jnp.uint32(k) for k in keep], magnitude=magnitude)
    each = zip(scores, keep, strict=True)
    assert_masks(masks, [by_sorting(s, k, magnitude) for s, k in each])


@some_values
@by_magnitude
@pytest.mark.parametrize("select", [compiled, compiled_by_seven], ids=["by three", "by seven"])
@given(data=st.data())
def test_all_layers_together_keep_the_highest_scores(
    select: Any, values: Any, magnitude: bool, data: st.DataObject
) -> None:
    scores = drawn(data, values)
    keep = data.draw(st.integers(0, SIZE))
    masks, _ = select(scores, jnp.uint32(keep), magnitude=magnitude)
    assert_masks(masks, by_sorting_together(scores, keep, magnitude))


@jax.jit
def by_cut(scores: list[jax.Array], keep: jax.Array) -> list[jax.Array]:
    before = np.cumsum([0, *(s.size for s in scores)])[:-1]
    return kept(scores, before, cut_of(scores, keep, jnp.asarray(no_thresholds(1))))


@some_values
@given(st.data())
def test_a_cut_makes_the_masks_where_they_are_read(values: Any, data: st.DataObject) -> None:
    scores = drawn(data, values)
    keep = data.draw(st.integers(0, SIZE))
    masks = by_cut(scores, jnp.uint32(keep))
    assert_masks(masks, by_sorting_together(scores, keep, magnitude=True))


@pytest.mark.parametrize(
    "shapes",
    [((400, 100), (9, 7), (31, 50)), ((400, 200), (9, 7), (31, 50)), ((64, 64),)],
    ids=["small layers", "and a large one", "of whole lines"],
)
def test_a_cut_ends_anywhere_among_equal_scores(shapes: Sequence[tuple[int, int]]) -> None:
    rng = np.random.default_rng(2)
    scores = [rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes]
    size = sum(s.size for s in scores)
    for keep in (0, 1, size // 3, size // 2, size - 2, size - 1, size):
        masks = by_cut(scores, jnp.uint32(keep))
        assert_masks(masks, by_sorting_together(scores, keep, magnitude=True))


SIZES = (3, 1, 5)
by_size = jax.jit(lambda scores, keep: select(scores, keep, sizes=SIZES))


@some_values
@given(st.data())
def test_of_scores_that_count_more_than_one_as_many_are_kept_as_come_nearest(
    values: Any, data: st.DataObject
) -> None:
    scores = drawn(data, values)
    sizes = np.repeat(SIZES, [s.size for s in scores])
    keep = data.draw(st.integers(0, int(sizes.sum())))
    masks, _ = by_size(scores, jnp.uint32(keep))
    order = ranking(np.concatenate([s.ravel() for s in scores]))
    totals = np.cumsum([0, *sizes[order]])
    # Of two equally near totals the higher one.
    number = min(range(len(totals)), key=lambda i: (abs(int(totals[i]) - keep), -i))
    assert_masks(masks, by_sorting_together(scores, number))


@by_magnitude
def test_ties_under_one_threshold_go_from_layer_to_layer(magnitude: bool) -> None:
    """Every number to keep, so that the ties end at every place of every layer."""
    rng = np.random.default_rng(0)
    scores = [rng.integers(-1, 2, shape).astype(np.float32) for shape in SHAPES]
    for keep in range(SIZE + 1):
        masks, _ = compiled(scores, jnp.uint32(keep), magnitude=magnitude)
        assert_masks(masks, by_sorting_together(scores, keep, magnitude))


@by_magnitude
def test_ties_end_at_every_place_of_a_layer(magnitude: bool) -> None:
    rng = np.random.default_rng(1)
    scores = [rng.integers(-1, 2, shape).astype(np.float32) for shape in SHAPES]
    for keep in range(21):
        each = [jnp.uint32(min(keep, s.size)) for s in scores]
        masks, _ = compiled(scores, each, magnitude=magnitude)
        assert_masks(masks, [by_sorting(s, min(keep, s.size), magnitude) for s in scores])


@by_magnitude
@pytest.mark.parametrize("shape", [(1, 4, 1), (3, 1, 5), (3, 4, 5)])
def test_stacked_layers_have_thresholds_of_their_own(
    shape: tuple[int, ...], magnitude: bool
) -> None:
    rng = np.random.default_rng(0)
    stacked = rng.integers(-3, 4, (3, 4, 5)).astype(np.float32)
    single = rng.standard_normal((4, 5)).astype(np.float32)
    keep = rng.integers(0, stacked.size // np.prod(shape) + 1, shape)
    (mask, other), thresholds = compiled(
        [stacked, single], [as_count(keep), jnp.uint32(7)], magnitude=magnitude
    )
    assert thresholds.shape == (1, keep.size + 1)
    expected = np.zeros(stacked.shape, bool)
    for copy in np.ndindex(*shape):
        at = tuple(i if n > 1 else slice(None) for i, n in zip(copy, shape, strict=True))
        expected[at] = by_sorting(stacked[at], keep[copy], magnitude)
    assert_masks([mask, other], [expected, by_sorting(single, 7, magnitude)])


# The last two thresholds, from the right one.
LAST = {
    "right": lambda right: (right, right),
    "a little off": lambda right: (right, right + np.uint32(900)),
    "on the way there": lambda right: (right - np.uint32(2**22), right - np.uint32(2**21)),
    "on the way back": lambda right: (right + np.uint32(2**22), right + np.uint32(2**21)),
    "below": lambda right: (right - np.uint32(2**22),) * 2,
    "above": lambda right: (right, right + np.uint32(2**25)),
    "far apart": lambda right: (right, right ^ np.uint32(2**31)),
    "zero": lambda right: (np.zeros_like(right),) * 2,
    "the last": lambda right: (np.full_like(right, 2**32 - 1),) * 2,
    "beyond the last": lambda right: (right, np.full_like(right, 2**32 - 1)),
    "of another layer": lambda right: (right[:, ::-1],) * 2,
}


@pytest.mark.parametrize("hint", LAST.values(), ids=LAST.keys())
@by_magnitude
@settings(max_examples=12)
@given(st.data())
def test_thresholds_from_before_never_change_the_masks(
    hint: Any, magnitude: bool, data: st.DataObject
) -> None:
    scores = drawn(data, data.draw(st.sampled_from(list(VALUES.values()))))
    keep = [data.draw(st.integers(0, s.size)) for s in scores]
    for number in ([jnp.uint32(k) for k in keep], jnp.uint32(sum(keep))):
        masks, thresholds = compiled(scores, number, magnitude=magnitude)
        last = jnp.concatenate([jnp.asarray(t) for t in hint(np.asarray(thresholds))])
        again, _ = compiled(scores, number, last, magnitude=magnitude)
        assert_masks(again, [np.asarray(m) for m in masks])


@pytest.mark.parametrize("keep", [0, 1, 44, 45])
def test_the_ends_of_the_range_are_kept_or_not(keep: int) -> None:
    lowest = [np.full(shape, -INF, np.float32) for shape in SHAPES]
    highest = [np.full(shape, INF, np.float32) for shape in SHAPES]
    mixed = [low if i else high for i, (low, high) in enumerate(zip(lowest, highest, strict=True))]
    for scores in (lowest, highest, mixed):
        masks, _ = compiled(scores, jnp.uint32(keep))
        assert_masks(masks, by_sorting_together(scores, keep))


@by_magnitude
@pytest.mark.parametrize("keep", range(8))
def test_subnormal_scores_are_told_apart(keep: int, magnitude: bool) -> None:
    scores = np.asarray([1e-40, -2e-40, 0.0, -1e-30, 2e-40, -0.0, 3.0], np.float32)
    masks, _ = compiled([scores], [jnp.uint32(keep)], magnitude=magnitude)
    assert_masks(masks, [by_sorting(scores, keep, magnitude)])


def test_no_layers_have_no_masks() -> None:
    masks, thresholds = select([], [])
    assert masks == []
    assert thresholds.shape == (1, 0)


@by_magnitude
def test_sharded_scores_have_the_same_masks_and_are_not_gathered(magnitude: bool) -> None:
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=auto)
    spec = jax.sharding.PartitionSpec("rows", "columns")
    scores = np.random.default_rng(0).integers(-20, 20, (64, 32)).astype(np.float32)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    apart = [jax.device_put(scores, sharding)]
    for keep in ([jnp.uint32(700)], jnp.uint32(700)):
        masks, _ = compiled(apart, keep, magnitude=magnitude)
        assert_masks(masks, [by_sorting(scores, 700, magnitude)])
        text = compiled.lower(apart, keep, magnitude=magnitude).compile().as_text()
        # No device holds more than its own 16 x 16 scores.
        assert "f32[64,32]" not in text
        assert "u32[64,32]" not in text


# Sizes that nobody allocates here.


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**32 - 1])
def test_counts_are_held_up_to_two_to_the_32(number: int) -> None:
    for given_as in (number, np.int64(number), np.asarray([[number]])):
        count = as_count(given_as)
        assert count.dtype == jnp.uint32
        assert int(count.ravel()[0]) == number
    assert as_count(jnp.asarray(7)).dtype == jnp.uint32


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_more_weights_under_one_threshold_than_can_be_counted_are_refused() -> None:
    big = abstract(2**16, 2**15)
    message = r"one threshold can be for less than 2\^32 weights, got 4294967296"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda s: select(s, np.int64(5)), [big, big])
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda s: select(s, [5]), [abstract(2**16, 2**16)])
    # A threshold each, they are few enough; so are the copies of a stacked layer.
    jax.eval_shape(lambda s: select(s, [5, 5]), [big, big])
    jax.eval_shape(lambda s: select(s, [np.full((2, 1, 1), 5)]), [abstract(2, 2**16, 2**15)])


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of inner ones too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


@by_magnitude
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_more_than_two_to_the_31_weights_are_counted_without_a_sign(
    shared: bool, magnitude: bool
) -> None:
    scores = [abstract(2**16, 2**15 + 2**14), abstract(2**10, 2**10)]
    numbers = [3_000_000_000, 1000]
    keep = sum(numbers) if shared else numbers
    last = jax.ShapeDtypeStruct((2, 1 if shared else 2), jnp.uint32)

    def run(scores: list[jax.Array], last: jax.Array) -> Any:
        return select(scores, keep, last, magnitude=magnitude)

    masks, thresholds = jax.eval_shape(run, scores, last)
    assert [m.shape for m in masks] == [s.shape for s in scores]
    assert thresholds.dtype == jnp.uint32
    found = list(equations(jax.make_jaxpr(run)(scores, last).jaxpr))
    # Signed are only bits, and which branch of a `cond` to take; all that counts is unsigned.
    signed = [e for e in found if any(v.aval.dtype == jnp.int32 for v in e.outvars)]
    names = {e.primitive.name for e in signed}
    assert not names & {"sub", "mul", "div", "reduce", "reduce_sum", "iota", "while"}
    assert {e.primitive.name for e in found} >= {"while", "reduce", "cond"}
    assert jax.jit(run).lower(scores, last).as_text()


@by_magnitude
def test_nothing_is_sorted(magnitude: bool) -> None:
    for keep in ([3, 4], 7):
        jaxpr = jax.make_jaxpr(lambda s, keep=keep: select(s, keep, magnitude=magnitude))(
            [jnp.zeros((4, 5)), jnp.zeros(6)]
        )
        names = {e.primitive.name for e in equations(jaxpr.jaxpr)}
        assert not {name for name in names if "sort" in name or "top_k" in name}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry with each pass over the scores of all layers."""
    counted: list[int] = []
    counts = selection._counts

    def counting(*args: Any) -> jax.Array:
        jax.debug.callback(lambda: counted.append(1))
        return counts(*args)

    monkeypatch.setattr(selection, "_counts", counting)
    return counted


@pytest.mark.parametrize(
    ("shared", "magnitude", "in_cache"),
    [(False, True, True), (True, False, True), (True, False, False)],
    ids=["each", "shared", "shared, not in a cache"],
)
def test_few_passes_find_a_threshold_and_fewer_one_that_moved_as_expected(
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
    magnitude: bool,
    in_cache: bool,
) -> None:
    if not in_cache:
        monkeypatch.setattr(selection, "_IN_CACHE", 0)
    rng = np.random.default_rng(0)
    scores = [jnp.asarray(rng.standard_normal(n), jnp.float32) for n in (90_000, 10_000)]
    moved = [s + jnp.asarray(rng.choice([-0.005, 0.005], s.size), jnp.float32) for s in scores]
    keep = 5000 if shared else [3000, 2000]

    find = jax.jit(functools.partial(select, magnitude=magnitude))

    def search(
        scores: list[jax.Array], share: float = 1.0, last: Any = None
    ) -> tuple[jax.Array, int]:
        before = len(passes)
        numbers = jax.tree.map(lambda n: jnp.uint32(round(n * share)), keep)
        if last is not None:
            last = jnp.concatenate(last)
        masks, thresholds = find(scores, numbers, last)
        jax.block_until_ready(masks)
        jax.effects_barrier()
        assert sum(int(m.sum()) for m in masks) == sum(map(int, jax.tree.leaves(numbers)))
        return thresholds, len(passes) - before

    thresholds, cold = search(scores)
    _, warm = search(moved, last=[thresholds] * 2)
    assert 0 < cold <= 10
    assert 0 < warm <= 5
    # The density falls by as much from step to step, so the threshold goes on as it did.
    ranks = [search(scores, share)[0] for share in (0.9, 0.81)]
    _, on_the_way = search(scores, 0.729, ranks)
    assert 0 < on_the_way <= 5
