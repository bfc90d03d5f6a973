"""Masks from scores, held against a stable sort, and masks applied to parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

import dpai_jax as dpai

INF = float("inf")
FLOATS = st.floats(width=32, allow_nan=False)


def by_sorting(scores, keep):
    """The mask of the highest scores, ties by index, by a stable sort in float64."""
    scores = np.asarray(scores, np.float64)
    order = np.argsort(-scores.ravel(), kind="stable")
    mask = np.zeros(scores.size, bool)
    mask[order[:keep]] = True
    return mask.reshape(scores.shape)


def by_sorting_copies(scores, keep):
    """The same for each of the layers that the longer axes of `keep` count."""
    stack = [i for i, copies in enumerate(keep.shape) if copies > 1]
    mask = np.zeros(scores.shape, bool)
    for copy in np.ndindex(*keep.shape):
        at = tuple(copy[i] if i in stack else slice(None) for i in range(scores.ndim))
        mask[at] = by_sorting(scores[at], keep[copy])
    return mask


def masks_of(scores, keep):
    return np.asarray(dpai.binarize({"kernel": jnp.asarray(scores)}, {"kernel": keep})["kernel"])


@given(stnp.arrays(np.float32, (4, 5), elements=FLOATS), st.integers(0, 20))
def test_masks_are_those_of_a_stable_sort(scores, keep):
    mask = masks_of(scores, keep)
    assert mask.sum() == keep
    np.testing.assert_array_equal(mask, by_sorting(scores, keep))


@given(
    stnp.arrays(np.float32, (4, 5), elements=st.sampled_from([-INF, -1, -0.0, 0.0, 1, INF])),
    st.integers(0, 20),
)
def test_ties_go_by_index_and_the_count_is_exact(scores, keep):
    mask = masks_of(scores, keep)
    assert mask.sum() == keep
    np.testing.assert_array_equal(mask, by_sorting(scores, keep))


@given(
    stnp.arrays(np.float32, (4, 5), elements=st.sampled_from([-INF, -1, 0.0, 1, 2, INF])),
    stnp.arrays(np.float32, (7,), elements=st.sampled_from([-1, 0.0, 0.5, 1, INF])),
    st.integers(0, 27),
)
def test_one_number_is_that_of_all_layers_together(first, second, keep):
    scores = {"a": jnp.asarray(first), "bias": jnp.float32(0), "c": jnp.asarray(second)}
    masks = dpai.binarize(scores, keep)
    expected = by_sorting(np.concatenate([first.ravel(), second]), keep)
    np.testing.assert_array_equal(masks["a"], expected[:20].reshape(4, 5))
    np.testing.assert_array_equal(masks["c"], expected[20:])
    assert masks["bias"]


def test_one_number_may_be_traced_and_must_be_possible():
    scores = {"a": jnp.arange(6.0), "b": jnp.arange(4.0)}
    masks = jax.jit(dpai.binarize)(scores, jnp.int32(4))
    assert [int(m.sum()) for m in masks.values()] == [3, 1]
    for keep in (-1, 11):
        message = rf"keep must be in \[0, 10\] for all layers, got {keep}"
        with pytest.raises(ValueError, match=message):
            dpai.binarize(scores, keep)


@pytest.mark.parametrize("keep", range(7))
@pytest.mark.parametrize(
    "scores",
    [
        [0.0] * 6,
        [-3.0] * 6,
        [INF] * 6,
        [-INF, INF, -INF, INF, 0.0, -INF],
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0],
        [-0.0, 1.0, 0.0, -1.0, -0.0, 0.0],
        [3.4e38, -3.4e38, 1.2e-38, -1.2e-38, 1.0, 1.0000001],
    ],
)
def test_corner_scores_are_sorted_like_numbers(scores, keep):
    scores = np.asarray(scores, np.float32)
    np.testing.assert_array_equal(masks_of(scores, keep), by_sorting(scores, keep))


@pytest.mark.parametrize("keep", range(7))
def test_subnormal_scores_are_told_apart(keep):
    scores = np.asarray([1e-40, -1e-40, 0.0, 2e-40, -2e-40, -0.0], np.float32)
    np.testing.assert_array_equal(masks_of(scores, keep), by_sorting(scores, keep))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_scores_may_have_any_floating_dtype(dtype):
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((30, 20)), dtype)
    for keep in (0, 1, 299, 300, 599, 600):
        mask = masks_of(scores, keep)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, by_sorting(scores, keep))


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 100_000])
def test_layers_of_any_size_keep_exactly_as_many_as_asked(size):
    # A tenth of the values: ties at every threshold.
    scores = np.random.default_rng(size).integers(0, 1 + size // 10, size).astype(np.float32)
    for keep in {0, 1, size // 3, size - 1, size}:
        np.testing.assert_array_equal(masks_of(scores, keep), by_sorting(scores, keep))


@pytest.mark.parametrize(
    "stack", [(3, 1, 1), (1, 4, 1), (1, 1, 5), (3, 4, 1), (3, 1, 5), (3, 4, 5)]
)
def test_stacked_layers_are_pruned_one_by_one(stack):
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 4, (3, 4, 5)).astype(np.float32)
    for _ in range(3):
        keep = rng.integers(0, scores.size // np.prod(stack) + 1, stack)
        mask = masks_of(scores, keep)
        inner = tuple(i for i in range(3) if stack[i] == 1)
        np.testing.assert_array_equal(mask.sum(inner, keepdims=True), keep)
        np.testing.assert_array_equal(mask, by_sorting_copies(scores, keep))


@given(
    stnp.arrays(np.float32, (2, 3, 4), elements=FLOATS | st.sampled_from([0.0, 1.0])),
    stnp.arrays(np.int64, (2, 1, 1), elements=st.integers(0, 12)),
)
def test_stacked_masks_are_those_of_stable_sorts(scores, keep):
    np.testing.assert_array_equal(masks_of(scores, keep), by_sorting_copies(scores, keep))


@pytest.fixture
def tree():
    """Scores of two layers, one of them stacked, and of a leaf that is not prunable."""
    rng = np.random.default_rng(1)
    scores = {
        "dense": {"kernel": jnp.asarray(rng.integers(0, 9, (6, 7)), jnp.float32)},
        "layers": [jnp.asarray(rng.standard_normal((3, 4, 4)), jnp.float32)],
        "bias": np.float32(0),
    }
    keep = {
        "dense": {"kernel": 11},
        "layers": [np.asarray([3, 16, 0]).reshape(3, 1, 1)],
        "bias": 0,
    }
    return scores, keep


def assert_masks_of_tree(masks, scores, keep):
    np.testing.assert_array_equal(
        masks["dense"]["kernel"], by_sorting(scores["dense"]["kernel"], keep["dense"]["kernel"])
    )
    np.testing.assert_array_equal(
        masks["layers"][0], by_sorting_copies(np.asarray(scores["layers"][0]), keep["layers"][0])
    )
    assert masks["bias"].shape == ()
    assert masks["bias"]


def test_masks_are_a_boolean_tree_with_true_where_nothing_is_prunable(tree):
    scores, keep = tree
    masks = dpai.binarize(scores, keep)
    assert jax.tree.structure(masks) == jax.tree.structure(scores)
    assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, scores)
    assert all(mask.dtype == bool for mask in jax.tree.leaves(masks))
    assert_masks_of_tree(masks, scores, keep)


def test_binarize_is_jittable_with_scores_and_counts_as_arguments(tree):
    scores, keep = tree
    assert_masks_of_tree(jax.jit(dpai.binarize)(scores, keep), scores, keep)


def test_binarize_maps_over_a_batch_of_scores_and_counts(tree):
    scores, keep = tree
    batch = jax.tree.map(lambda s: jnp.stack([s, -s, 2 - s]), scores)
    more = jax.tree.map(lambda k: np.stack([k, k, k // 2]), keep)
    same_counts = jax.vmap(lambda s: dpai.binarize(s, keep))(batch)
    own_counts = jax.vmap(dpai.binarize)(batch, more)
    for i in range(3):
        one, count = jax.tree.map(lambda a, i=i: a[i], (batch, more))
        assert_masks_of_tree(jax.tree.map(lambda a, i=i: a[i], same_counts), one, keep)
        assert_masks_of_tree(jax.tree.map(lambda a, i=i: a[i], own_counts), one, count)


def test_a_tree_without_layers_has_masks_too():
    assert dpai.binarize({"scale": np.float32(0)}, {"scale": 0}) == {"scale": True}


def test_keep_of_another_structure_is_refused(tree):
    scores, keep = tree
    with pytest.raises(ValueError, match="keep must have the tree structure of scores"):
        dpai.binarize(scores, {"dense": keep["dense"]})


@pytest.mark.parametrize("keep", [-1, 13, np.asarray([[1], [7]]), np.asarray([[-1], [2]])])
def test_a_number_to_keep_outside_the_layer_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep must be in \[0, (12|6)\] for hidden/kernel, got"):
        dpai.binarize({"hidden": {"kernel": jnp.ones((2, 6))}}, {"hidden": {"kernel": keep}})


@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64])
def test_scores_that_are_not_floating_are_refused(dtype):
    with pytest.raises(TypeError, match="scores must be floating, but kernel is"):
        dpai.binarize({"kernel": jnp.ones((2, 6), dtype)}, {"kernel": 3})


def test_a_nan_score_is_refused():
    scores = jnp.ones((2, 6)).at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"scores .* kernel has a NaN"):
        dpai.binarize({"kernel": scores}, {"kernel": 3})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8])
def test_masked_parameters_are_zero_where_pruned_and_keep_their_dtype(dtype):
    kernel = np.arange(-6, 6).reshape(3, 4)
    mask = np.random.default_rng(0).random((3, 4)) < 0.5
    params = {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.full(4, 7, dtype)}
    masks = {"kernel": jnp.asarray(mask), "bias": jnp.asarray(True)}
    masked = dpai.apply_masks(params, masks)
    assert masked["kernel"].dtype == masked["bias"].dtype == dtype
    np.testing.assert_array_equal(np.asarray(masked["kernel"], np.float64), kernel * mask)
    np.testing.assert_array_equal(np.asarray(masked["bias"], np.float64), 7)


def test_pruned_weights_that_are_not_numbers_become_zero():
    params = {"kernel": jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 2.0])}
    masked = dpai.apply_masks(params, {"kernel": jnp.asarray([False, False, False, True])})
    np.testing.assert_array_equal(masked["kernel"], [0, 0, 0, 2])


def test_masks_apply_to_numpy_arrays_inside_and_outside_of_jit():
    params = {"kernel": np.ones((2, 2), np.float32)}
    masks = {"kernel": np.eye(2, dtype=bool)}
    np.testing.assert_array_equal(dpai.apply_masks(params, masks)["kernel"], np.eye(2))
    np.testing.assert_array_equal(jax.jit(dpai.apply_masks)(params, masks)["kernel"], np.eye(2))


def test_gradients_of_pruned_weights_are_zero():
    masks = {"kernel": jnp.asarray([True, False])}

    def loss(params):
        return jnp.sum(dpai.apply_masks(params, masks)["kernel"] ** 3 + params["kernel"][:1])

    gradient = jax.grad(loss)({"kernel": jnp.asarray([2.0, jnp.nan])})
    np.testing.assert_array_equal(gradient["kernel"], [14, 0])


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"other": jnp.ones((2, 3), bool)}, ValueError, "tree structure of params"),
        ([jnp.ones((2, 3), bool)], ValueError, "tree structure of params"),
        ({"kernel": jnp.ones((3, 2), bool)}, ValueError, r"shape \(2, 3\) at kernel, got \(3, 2\)"),
        ({"kernel": jnp.ones((3,), bool)}, ValueError, r"shape \(2, 3\) at kernel, got \(3,\)"),
        ({"kernel": jnp.ones((2, 3))}, TypeError, "boolean, but kernel is float32"),
        ({"kernel": jnp.ones((2, 3), jnp.int32)}, TypeError, "boolean, but kernel is int32"),
    ],
)
def test_masks_that_do_not_fit_the_parameters_are_refused(masks, error, message):
    params = {"kernel": jnp.ones((2, 3))}
    with pytest.raises(error, match=f"masks must .*{message}"):
        dpai.apply_masks(params, masks)
