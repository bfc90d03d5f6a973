"""Gathers, scatters and slices at computed positions, against numpy's indexing."""

import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import dpai_jax as dpai
from dpai_jax.paths import Flow, Independent, Weight
from tests.support.flows import (
    binary,
    counts,
    draw,
    evaluate,
    flow,
    gradients,
    uniform_along_some,
    weight,
)

ROWS = np.asarray([[2, 0], [0, 0], [3, 1]])

# Indexing that JAX and numpy write alike, of an array of shape (4, 3, 2).
INDEXING: dict[str, Callable[[Any, Any], Any]] = {
    "one row": lambda xp, x: x[2],
    "the last row": lambda xp, x: x[-1],
    "rows": lambda xp, x: x[xp.asarray([3, 1, 1])],
    "a table of rows": lambda xp, x: x[xp.asarray(ROWS)],
    "columns": lambda xp, x: x[:, xp.asarray([2, 0])],
    "entries": lambda xp, x: x[xp.asarray([3, 0]), xp.asarray([1, 2])],
    "an outer product of indices": lambda xp, x: x[xp.asarray([[3], [0]]), xp.asarray([1, 2])],
    "indices apart": lambda xp, x: x[xp.asarray([3, 0]), :, xp.asarray([1, 0])],
    "taken": lambda xp, x: xp.take(x, xp.asarray([1, 1, 0]), axis=2),
    "taken along": lambda xp, x: xp.take_along_axis(x, xp.asarray(ROWS)[None, :, :] % 3, axis=1),
    "rolled": lambda xp, x: x[(xp.arange(4) + 1) % 4],
    "permuted by a sort": lambda xp, x: x[xp.argsort(xp.asarray([3, 1, 2, 0]))],
    "shifted as windows are": lambda xp, x: xp.roll(x, (1, -1), (0, 1)),
    "a relative position": lambda xp, x: x[xp.arange(2)[:, None] - xp.arange(3)[None] + 2],
    "a count up": lambda xp, x: x[xp.cumsum(xp.ones(4, int)) - 1],
    "a choice of indices": lambda xp, x: x[xp.where(xp.arange(3) > 1, xp.arange(3), 0)],
    "a triangle": lambda xp, x: x[:3][np.tril_indices(3)],
    "a mask": lambda xp, x: x[np.asarray([True, False, True, False])],
    "a diagonal": lambda xp, x: xp.diagonal(x, axis1=0, axis2=1),
}


@pytest.mark.parametrize("name", INDEXING)
def test_known_indices_move_counts_as_numpy_moves_numbers(name):
    for held in [(4, 3, 2), (1, 3, 1)]:
        x = flow(draw(0, *held), (4, 3, 2), unit="x", ancestors=["input"], exponent=3, at_zero=0.5)
        result = evaluate(lambda x: INDEXING[name](jnp, x), x)
        np.testing.assert_array_equal(counts(result), INDEXING[name](np, counts(x)))
        assert result.lineage >= {"x", "input"}
        assert result.at_zero == 0.5


@pytest.mark.parametrize(("mode", "exact"), [("clip", [4.0, 1.0, 2.0]), ("fill", [0.0, 1.0, 2.0])])
def test_positions_out_of_range_give_what_the_mode_says(mode, exact):
    """An entry that is filled in comes from nowhere: no path leads to it."""
    indices = jnp.asarray([9, 0, 1])
    result = evaluate(lambda x: x.at[indices].get(mode=mode), flow([1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(counts(result), exact)


def gather(
    x: np.ndarray, indices: np.ndarray, dims: lax.GatherDimensionNumbers, sizes: tuple[int, ...]
) -> np.ndarray:
    """A gather with clipped indices, entry by entry."""
    rank = indices.ndim - 1 + len(dims.offset_dims)
    batch_axes = [i for i in range(rank) if i not in dims.offset_dims]
    dropped = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    kept = [i for i in range(x.ndim) if i not in dropped]
    shape = [0] * rank
    for axis, size in zip(batch_axes, indices.shape[:-1], strict=True):
        shape[axis] = size
    for axis, of in zip(dims.offset_dims, kept, strict=True):
        shape[axis] = sizes[of]
    result = np.zeros(shape)
    for place in itertools.product(*map(range, shape)):
        batch = tuple(place[i] for i in batch_axes)
        site = [0] * x.ndim
        for component, axis in enumerate(dims.start_index_map):
            site[axis] = np.clip(indices[(*batch, component)], 0, x.shape[axis] - sizes[axis])
        for axis, of in zip(
            dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True
        ):
            site[axis] = batch[of]
        for axis, of in zip(dims.offset_dims, kept, strict=True):
            site[of] += place[axis]
        result[place] = x[tuple(site)]
    return result


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_any_gather_moves_counts_as_loops_do(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 4, 3).tolist())
    batching = (int(rng.integers(3)),) if rng.random() < 0.5 else ()
    rest = [i for i in range(3) if i not in batching]
    starts = tuple(rng.permutation(rest)[: rng.integers(1, len(rest) + 1)].tolist())
    sizes = [1 if i in batching else int(rng.integers(1, shape[i] + 1)) for i in range(3)]
    collapsed = tuple(i for i in rest if sizes[i] == 1 and rng.random() < 0.5)
    batch = [*(shape[i] for i in batching), *rng.integers(1, 3, rng.integers(3)).tolist()]
    offsets = 3 - len(collapsed) - len(batching)
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(sorted(rng.permutation(len(batch) + offsets)[:offsets].tolist())),
        collapsed_slice_dims=collapsed,
        start_index_map=starts,
        operand_batching_dims=batching,
        start_indices_batching_dims=tuple(range(len(batching))),
    )
    indices = rng.integers(-1, 4, (*batch, len(starts)))
    held = uniform_along_some(rng, shape)
    array = draw(seed, *held)

    def network(array: Any) -> Flow:
        return evaluate(
            lambda x: lax.gather(x, jnp.asarray(indices), dims, sizes, mode="clip"),
            flow(array, shape),
        )

    exact = gather(np.broadcast_to(array, shape), indices, dims, tuple(sizes))
    np.testing.assert_array_equal(counts(network(array)), exact)
    probe, other = draw(1, *exact.shape), draw(2, *held)
    (slope,) = gradients(network, probe, array)
    moved = gather(np.broadcast_to(other, shape), indices, dims, tuple(sizes))
    assert np.sum(slope * other) == np.sum(probe * moved)


def test_axes_that_a_gather_takes_whole_stay_uniform():
    x = flow(draw(0, 4, 1, 1), (4, 3, 2))
    assert evaluate(lambda x: x[jnp.asarray([3, 1])], x).mantissa.shape == (2, 1, 1)


@pytest.mark.parametrize("held", [(4, 3), (1, 3), (4, 1)])
def test_where_an_index_is_unknown_the_gathered_axis_counts_as_a_sum(held):
    x = flow(draw(0, *held), (4, 3))
    rows = counts(x).sum(0)
    # The position of the largest entry, as a pooling by end-of-text token has it.
    best = evaluate(lambda x: x[jnp.argmax(x.sum(1))], x)
    np.testing.assert_array_equal(counts(best), rows)
    several = evaluate(lambda x: x[jnp.argmax(x, 0)], x)
    np.testing.assert_array_equal(counts(several), np.broadcast_to(rows, (3, 3)))
    sliced = evaluate(lambda x: lax.dynamic_slice_in_dim(x, jnp.argmax(x[:, 0]), 2), x)
    np.testing.assert_array_equal(counts(sliced), np.broadcast_to(rows, (2, 3)))


@pytest.mark.parametrize("held", [(2, 4, 3), (1, 4, 3), (2, 1, 1)])
def test_an_unknown_index_of_each_example_stays_in_its_example(held):
    x = flow(draw(0, *held), (2, 4, 3))
    each = counts(x).sum(1)
    best = evaluate(jax.vmap(lambda x: x[jnp.argmax(x[:, 0])]), x)
    np.testing.assert_array_equal(counts(best), each)
    along = evaluate(lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1, keepdims=True), 1), x)
    np.testing.assert_array_equal(counts(along), each[:, None])
    sliced = jax.vmap(lambda x: lax.dynamic_slice_in_dim(x, jnp.argmax(x[:, 0]), 2))
    exact = np.broadcast_to(each[:, None], (2, 2, 3))
    np.testing.assert_array_equal(counts(evaluate(sliced, x)), exact)


def embed(table: Any, tokens: Any) -> Any:
    return table[tokens]


def test_token_ids_start_a_flow_of_ones():
    tokens = flow(np.ones((1, 1)), (2, 5))
    result = evaluate(embed, Independent((7, 3)), tokens, dtypes=[jnp.float32, jnp.int32])
    np.testing.assert_array_equal(counts(result), np.ones((2, 5, 3)))
    assert result.mantissa.size == 1
    result = evaluate(
        lambda table, i: lax.dynamic_slice(table, (i, 0), (1, 3)),
        Independent((7, 3)),
        flow(np.ones(())),
        dtypes=[jnp.float32, jnp.int32],
    )
    np.testing.assert_array_equal(counts(result), np.ones((1, 3)))


def test_a_table_of_tokens_that_is_a_kernel_counts_each_token_once():
    """A tied embedding: any token may come, so a unit has a path from each row that is kept."""
    mask = draw(0, 7, 3)
    tokens = flow(np.ones((1, 1)), (2, 5))
    result = evaluate(embed, weight(mask), tokens, dtypes=[jnp.float32, jnp.int32])
    np.testing.assert_array_equal(counts(result), np.broadcast_to(mask.sum(0), (2, 5, 3)))


def test_a_tied_embedding_is_one_layer():
    def network(p: Any, tokens: Any) -> Any:
        return jax.nn.relu(p["table"][tokens] @ p["w"]) @ p["table"].T

    p = {"table": jnp.ones((7, 3)), "w": jnp.ones((3, 3)), "positions": jnp.ones((5, 3))}
    net = dpai.trace(network, p, jnp.zeros((2, 5), jnp.int32))
    assert {layer.name for layer in net.layers} == {"table", "w"}
    tied = next(layer for layer in net.layers if layer.name == "table")
    assert (tied.inputs, tied.outputs, tied.stack) == ((1,), (0,), ())


@pytest.mark.parametrize(
    ("fn", "exact"),
    [
        (lambda w: w[jnp.asarray([2, 0])], lambda w: w[[2, 0]]),
        (lambda w: w[1], lambda w: w[1]),
        (lambda w: lax.dynamic_slice(w, (1, 0), (2, 2)), lambda w: w[1:3, :2]),
        (lambda w: lax.dynamic_index_in_dim(w, 2, 1, keepdims=False), lambda w: w[:, 2]),
    ],
)
def test_a_kernel_is_seen_through_indices_that_are_known(fn, exact):
    view = evaluate(fn, weight(draw(0, 3, 4), leaf=2))
    np.testing.assert_array_equal(view.array, exact(draw(0, 3, 4)))
    assert [leaf for leaf, _ in view.sources] == [2]


def test_a_kernel_gathered_at_unknown_positions_is_none():
    indices = Independent((2,))
    view = evaluate(embed, weight(draw(0, 3, 4)), indices, dtypes=[jnp.float32, jnp.int32])
    assert isinstance(view, Independent)


def test_a_layer_chosen_at_an_unknown_position_counts_as_all_of_them():
    def chosen(w: Any, i: Any) -> Any:
        return lax.dynamic_index_in_dim(w, i, keepdims=False)

    view = evaluate(
        chosen, weight(draw(0, 3, 4, 2)), Independent(()), dtypes=[jnp.float32, jnp.int32]
    )
    assert isinstance(view, Weight)
    np.testing.assert_array_equal(view.array, draw(0, 3, 4, 2).sum(0))


@pytest.mark.parametrize("held", [(4, 3), (1, 3), (4, 1)])
@pytest.mark.parametrize("start", [0, 1, 3, 9, -1, -2, -9])
def test_slices_at_known_starts_are_kept_inside_as_jax_keeps_them(start, held):
    x = flow(draw(0, *held), (4, 3), unit="x")
    result = evaluate(lambda x: lax.dynamic_slice(x, (start, 0), (2, 3)), x)
    exact = lax.dynamic_slice(jnp.asarray(np.float32(counts(x))), (start, 0), (2, 3))
    np.testing.assert_array_equal(counts(result), exact)
    assert "x" in result.ancestors


@pytest.mark.parametrize("start", [0, 2, 9, -1, -9])
def test_updates_at_known_starts_are_written_where_jax_writes_them(start):
    x = flow(draw(0, 1, 3), (4, 3), exponent=5, ancestors=["input"])
    y = flow(draw(1, 2, 1), (2, 3), ancestors=["input"])
    result = evaluate(lambda x, y: lax.dynamic_update_slice(x, y, (start, 0)), x, y)
    arrays = [jnp.asarray(np.float32(counts(value))) for value in (x, y)]
    exact = lax.dynamic_update_slice(*arrays, (start, 0))
    np.testing.assert_array_equal(counts(result), exact)
    assert result.ancestors == {"input"}


WRITES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[np.ndarray, np.ndarray], None]]] = {
    "scatter": (
        lambda x, y: x.at[jnp.asarray([3, 0])].set(y),
        lambda x, y: operator.setitem(x, [3, 0], y),
    ),
    "scatter-add": (
        lambda x, y: x.at[jnp.asarray([3, 3])].add(y),
        lambda x, y: np.add.at(x, [3, 3], y),
    ),
    "scatter-sub": (
        lambda x, y: x.at[jnp.asarray([3, 3])].subtract(y),
        lambda x, y: np.add.at(x, [3, 3], y),
    ),
    "scatter-max": (
        lambda x, y: x.at[jnp.asarray([3, 1])].max(y),
        lambda x, y: np.add.at(x, [3, 1], y),
    ),
    "scatter-min": (
        lambda x, y: x.at[jnp.asarray([3, 1])].min(y),
        lambda x, y: np.add.at(x, [3, 1], y),
    ),
}


def written(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    result = np.array(x)
    WRITES[name][1](result, y)
    return result


@pytest.mark.parametrize("name", WRITES)
def test_writes_at_known_positions_replace_or_add_counts(name):
    x = flow(draw(0, 1, 3), (4, 3), exponent=5)
    y = flow(draw(1, 2, 1) + 1, (2, 3), exponent=-1)
    both = evaluate(WRITES[name][0], x, y)
    np.testing.assert_array_equal(counts(both), written(name, counts(x), counts(y)))
    onto = evaluate(WRITES[name][0], x, Independent((2, 3)))
    np.testing.assert_array_equal(counts(onto), written(name, counts(x), np.zeros((2, 3))))
    into = evaluate(WRITES[name][0], Independent((4, 3)), y)
    np.testing.assert_array_equal(counts(into), written(name, np.zeros((4, 3)), counts(y)))


def test_a_write_is_alive_at_zero_where_both_its_parts_are():
    x, y = flow(draw(0, 4, 3), at_zero=0.5), flow(draw(1, 2, 3), at_zero=1.0)
    dead = flow(draw(1, 2, 3))
    write = WRITES["scatter"][0]
    assert evaluate(write, x, y).always_alive
    assert not evaluate(write, x, dead).always_alive
    assert not evaluate(lambda y: write(jnp.zeros((4, 3)), y), y).always_alive


@pytest.mark.parametrize("name", ["scatter", "scatter-add"])
def test_the_gradient_of_a_write_reaches_what_is_kept(name):
    def network(x: Any, y: Any) -> Flow:
        return evaluate(WRITES[name][0], flow(x), flow(y))

    probe = draw(0, 4, 3) + 1
    of_x, of_y = gradients(network, probe, draw(1, 4, 3), draw(2, 2, 3))
    for side, slope in enumerate((of_x, of_y)):
        parts = [np.zeros((4, 3)), np.zeros((2, 3))]
        parts[side] = draw(5, *parts[side].shape)
        assert np.sum(slope * parts[side]) == np.sum(probe * written(name, *parts))


def test_a_cache_is_written_and_read():
    """A decoder's cache of keys: zeros, two rows written, all rows read."""

    def network(x: Any) -> Any:
        cache = jnp.zeros((4, 3))
        cache = lax.dynamic_update_slice(cache, x[:1], (0, 0))
        cache = cache.at[1].set(x[1])
        return cache * 2.0

    x = flow(draw(0, 2, 3))
    exact = np.concatenate([counts(x), np.zeros((2, 3))])
    np.testing.assert_array_equal(counts(evaluate(network, x)), exact)


# Writes of y (2, 3) or of parts of it into x (4, 3) at positions i, and the counts where any of the
# writes may have happened at any position.
SOMEWHERE: dict[str, tuple[Any, Any]] = {
    "a row set": (lambda x, y, i: x.at[i[0]].set(y[0]), lambda x, y: x + y[0]),
    "rows added": (lambda x, y, i: x.at[i].add(y), lambda x, y: x + y.sum(0)),
    "rows set to a constant": (lambda x, y, i: x.at[i].set(0.0), lambda x, y: x + 0 * y[0]),
    "columns": (lambda x, y, i: x.at[:, i].add(y.T[:1]), lambda x, y: x + y.sum(0)[0]),
    "entries": (lambda x, y, i: x.at[i, i].max(y[:, 0]), lambda x, y: x + y[:, 0].sum()),
    "a slice": (
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i[0], 0)),
        lambda x, y: x + y.sum(0),
    ),
    "a slice of which one start is known": (
        lambda x, y, i: lax.dynamic_update_slice(x, y[:, :2], (i[0], 1)),
        lambda x, y: x + np.concatenate([[0], y.sum(0)[:2]]),
    ),
    "one row of each example": (
        lambda x, y, i: jax.vmap(lambda x, y, i: x.at[i].add(y))(x.reshape(2, 2, 3), y, i % 2),
        lambda x, y: x.reshape(2, 2, 3) + y[:, None],
    ),
}


@pytest.mark.parametrize("held", [((4, 3), (2, 3)), ((1, 3), (2, 1)), ((4, 1), (1, 3))])
@pytest.mark.parametrize("name", SOMEWHERE)
def test_what_is_written_at_unknown_positions_may_be_at_any(name, held):
    write, exact = SOMEWHERE[name]
    x, y = flow(draw(0, *held[0]), (4, 3), exponent=2), flow(draw(1, *held[1]), (2, 3))
    result = evaluate(write, x, y, Independent((2,)), dtypes=[jnp.float32, jnp.float32, jnp.int32])
    np.testing.assert_array_equal(counts(result), exact(counts(x), counts(y)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("unknown", [False, True])
def test_factors_written_give_the_terms_of_the_derivative(seed, unknown):
    """Against `jax.jvp` of the multiplication itself, at ones and zeros; positions repeat."""
    rng = np.random.default_rng(seed)
    x, y = draw(seed, 5, 2), draw(seed + 10, 3, 2)
    index = np.asarray([2]) if unknown else rng.integers(0, 5, 3)
    y = y[: len(index)]

    def write(x: Any, y: Any, i: Any) -> Any:
        return x.at[i].multiply(y)

    place = Independent(index.shape)
    if unknown:
        result = evaluate(write, flow(x), flow(y), place, dtypes=[jnp.float32] * 2 + [jnp.int32])
    else:
        result = evaluate(lambda x, y: write(x, y, index), flow(x), flow(y))

    def one_by_one(x: Any, y: Any) -> Any:
        for row, factor in zip(index, y, strict=True):
            x = x.at[row].set(x[row] * factor)
        return x

    if unknown:
        # At every position the operand's own paths, and the update's where the operand is alive.
        np.testing.assert_array_equal(counts(result), x + (x > 0) * y)
    else:
        at = [jnp.asarray(np.float32(z > 0)) for z in (x, y)]
        along = [jnp.asarray(np.float32(z)) for z in (x, y)]
        np.testing.assert_array_equal(counts(result), jax.jvp(one_by_one, at, along)[1])


def test_factors_that_are_constants_change_nothing():
    x = flow(draw(0, 4, 3))
    scaled = evaluate(lambda x: x.at[1].multiply(2.0), x)
    np.testing.assert_array_equal(counts(scaled), counts(x))
    into = evaluate(lambda y: jnp.ones((4, 3)).at[jnp.asarray([1, 3])].multiply(y), flow(ROWS_2x3))
    np.testing.assert_array_equal(counts(into)[[1, 3]], ROWS_2x3)
    np.testing.assert_array_equal(counts(into)[[0, 2]], 0)


ROWS_2x3 = draw(7, 2, 3)


@pytest.mark.parametrize("held", [(4, 3), (1, 3), (4, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_sorted_or_chosen_may_be_any_along_the_axis(axis, held):
    x = flow(draw(0, *held), (4, 3), exponent=1, at_zero=0.5, unit="x")
    total = counts(x).sum(axis, keepdims=True)
    operations: dict[str, Any] = {
        "sort": (lambda x: jnp.sort(x, axis=axis), np.broadcast_to(total, (4, 3))),
        "carried along": (
            lambda x: lax.sort((x.sum(axis, keepdims=True) + 0 * x, x), dimension=axis)[1],
            np.broadcast_to(total, (4, 3)),
        ),
        "top_k": (
            lambda x: lax.top_k(x.T if axis == 0 else x, 2)[0],
            np.repeat(total.T if axis == 0 else total, 2, 1),
        ),
        "approx_top_k": (
            lambda x: lax.approx_max_k(x, 2, reduction_dimension=axis)[0],
            np.repeat(total, 2, axis),
        ),
    }
    for name, (operation, exact) in operations.items():
        result = evaluate(operation, x)
        np.testing.assert_array_equal(counts(result), exact, err_msg=name)
        assert result.always_alive
        assert "x" in result.lineage, name


def test_which_entries_are_chosen_carries_no_path():
    x = flow(draw(0, 4, 3))
    for which in (lambda x: lax.top_k(x, 2)[1], lambda x: jnp.argsort(x, axis=0)):
        assert isinstance(evaluate(which, x), Independent)


def test_a_token_s_place_in_its_expert_s_batch_is_unknown():
    """Routing by one-hot dispatch: each expert may get each token, and each token its result."""
    x, router, expert = draw(0, 5, 3), draw(1, 3, 4), draw(2, 4, 3, 3)

    def network(x: Any, router: Any, expert: Any) -> Any:
        gate, chosen = lax.top_k(jax.nn.softmax(x @ router), 1)
        dispatch = jax.nn.one_hot(chosen[:, 0], 4)
        slots = jnp.einsum("te,td->etd", dispatch, x)
        return jnp.einsum("te,etd->td", dispatch * gate, jnp.einsum("etd,edf->etf", slots, expert))

    result = evaluate(network, flow(x), weight(router, 0), weight(expert, 1), gates="signal")
    np.testing.assert_array_equal(counts(result), np.einsum("td,edf->tf", x, expert))


def test_writes_without_a_flow_are_free():
    result = evaluate(
        lambda w, i: w.at[i].set(0.0),
        weight(draw(0, 4, 3)),
        Independent(()),
        dtypes=[jnp.float32, jnp.int32],
    )
    assert isinstance(result, Independent)


def test_saturating_gathers_and_writes_stay_zeros_and_ones():
    x, y = np.asarray([0.0, 1.0, 1.0]), np.asarray([1.0, 0.0])

    def fn(x: Any, y: Any) -> Any:
        return x.at[jnp.asarray([0, 1])].add(y)[jnp.asarray([2, 1, 0, 0])]

    result = evaluate(fn, binary(x), binary(y), saturating=True)
    np.testing.assert_array_equal(result.mantissa, [1, 1, 1, 1])
    result = evaluate(lambda x: x[jnp.argmax(x)], binary(x), saturating=True)
    assert float(result.mantissa) == 1
