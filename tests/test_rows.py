"""Many small arrays in one row: sums, counts and the largest entry of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpai_jax.tools import rows
from dpai_jax.tools.rows import Copies, Row, counts_of, sums_of

SHAPES = [(3,), (4, 5), (1,), (2, 3, 7), (65,), (16, 16), (0,)]


@pytest.fixture(params=[2**22, 0], ids=["few arrays", "very many"])
def _either_way(request, monkeypatch):
    monkeypatch.setattr(rows, "_MOST_MEMBERS", request.param)


def drawn(scale=1.0):
    rng = np.random.default_rng(0)
    return [(rng.random(shape) ** 8 * scale).astype(np.float32) for shape in SHAPES]


@pytest.mark.usefixtures("_either_way")
def test_blocks_hold_the_arrays_and_give_them_back():
    arrays = drawn()
    row = Row([x.size for x in arrays])
    blocks = row.blocks([jnp.asarray(x) for x in arrays], -1.0)
    for found, array in zip(row.arrays(blocks), arrays, strict=True):
        np.testing.assert_array_equal(found, array.ravel())
    padding = np.asarray(blocks) == -1.0
    assert padding.sum() == blocks.size - sum(x.size for x in arrays)
    of_array = row.spread(jnp.arange(len(arrays)))[:, 0]
    np.testing.assert_array_equal(of_array, row.array)


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_sums_are_those_of_float64_in_any_order(scale):
    arrays = drawn(scale)
    in_row = [i % 3 != 1 for i in range(len(arrays))]
    found = jax.jit(lambda xs: sums_of(xs, in_row))(arrays)
    backwards = jax.jit(lambda xs: sums_of([x[::-1] for x in xs], in_row))(arrays)
    exact = [x.astype(np.float64).sum() for x in arrays]
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_array_equal(found, backwards)


@pytest.mark.usefixtures("_either_way")
def test_counts_stand_in_the_order_of_the_arrays():
    flags = [x > 0.01 for x in drawn()]
    expected = [x.sum() for x in flags]
    for in_row in ([True] * 7, [False] * 7, [False, True, True, False, True, False, True]):
        found = jax.jit(lambda xs, in_row=in_row: counts_of(xs, in_row))(flags)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == jnp.uint32


@pytest.mark.usefixtures("_either_way")
def test_the_largest_of_each():
    arrays = [x for x in drawn() if x.size]
    row = Row([x.size for x in arrays])
    found = row.largest(row.blocks([jnp.asarray(x) for x in arrays], 0.0))
    np.testing.assert_array_equal(found, [x.max() for x in arrays])


def test_copies_lie_in_a_row_each_by_itself_and_come_back():
    shapes, stacks = [(3, 4, 5), (7,), (2, 1, 6), (4, 2, 3)], [(1,), (), (0, 1), (0, 2)]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(1, 9, shape).astype(np.uint32) for shape in shapes]
    copies = Copies(shapes, stacks)
    blocks = copies.blocks(list(map(jnp.asarray, arrays)))
    (sums,) = copies.row.sums([blocks])
    for array, stack, back, numbers in zip(
        arrays, stacks, copies.arrays(blocks), copies.numbers(sums), strict=True
    ):
        np.testing.assert_array_equal(back, array)
        others = tuple(i for i in range(array.ndim) if i not in stack)
        np.testing.assert_array_equal(numbers, array.sum(others, keepdims=True))
